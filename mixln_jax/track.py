"""A track: all but the placement held fixed, so that entries made anywhere can be compared.

A track is a recipe of `configs/tracks/`: `get_config`, whose fields are the fixed ones, and `TRACK`, which says what is
free, how an entry is tuned, and how many seeds it needs. What was measured once for all entries (the noise of the
baseline) lies in a JSON file of the same name beside it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixln_jax import config as config_lib
from mixln_jax import recipes
from mixln_jax.config import FIELDS, FREE, Config
from mixln_jax.errors import InputError
from mixln_jax.files import COUNT, TEXT, Kind, Kinds, read_json
from mixln_jax.text import shown

PLACEMENT_FIELD, RATE_FIELD, SEED_FIELD = "model.placement", "optimizer.learning_rate", "seed"
# Initial values belong to a placement: many papers state theirs.
INITIAL_FIELDS = ("model.init_deviation", "model.embedding_deviation", "model.matrix_std_multiplier")
FREE_FIELDS = (PLACEMENT_FIELD, RATE_FIELD, SEED_FIELD, *INITIAL_FIELDS)
LOSS, SLOPE = "loss", "slope"
SCORES = (LOSS, SLOPE)

Shape = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Track:
  """What entries have in common, and how they are compared.

  Attributes:
    name: of the class: cpu, gpu, depth.
    title, question: for a reader.
    fixed: the config of `get_config`, flat; each field of it that changes what is computed is fixed, but for the free.
    rates: the published grid of peak learning rates, rising.
    first_rates: those of them that every entry tries first.
    placements: those of the board.
    baseline: the placement that all others are compared with.
    seeds: that every entry has at its best rate.
    close_seeds: that it has where its mean difference from the baseline is below `close`, in nats, and in a study
      without the baseline.
    baseline_seeds: that the baseline has; the noise is measured on them.
    close: that difference.
    added: what a placement may learn besides gains of norms, as a fraction of the baseline's parameters.
    fingerprint: of the records; empty where it is not fixed yet, and entries must then have that of the baseline.
    validation_tokens: counted in each evaluation; 0 where it is not fixed yet.
    shapes: what may move together besides, each a shape with its fields; empty where there is one shape.
    score: loss, or slope (of the loss with depth).
    claims: what the board judges; `reporting/claims.py` has their keys.
    noise: what is stored of the baseline's noise; empty before it was measured.
    path: of the recipe.
  """

  name: str
  title: str
  fixed: Mapping[str, Any]
  rates: tuple[float, ...]
  first_rates: tuple[float, ...]
  placements: tuple[str, ...]
  question: str = ""
  baseline: str = "pre"
  seeds: int = 3
  close_seeds: int = 8
  baseline_seeds: int = 20
  close: float = 0.05
  added: float = 0.001
  fingerprint: str = ""
  validation_tokens: int = 0
  shapes: tuple[Shape, ...] = ()
  score: str = LOSS
  claims: tuple[Mapping[str, Any], ...] = ()
  noise: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  path: Path = Path("track.py")

  @property
  def shape_fields(self) -> tuple[str, ...]:
    return tuple(self.shapes[0]) if self.shapes else ()

  @property
  def noise_file(self) -> Path:
    """Where what is measured of the track's noise is stored."""
    return self.path.with_suffix(".json")

  def departures(self, flat: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What a config may not have: (field, its value, what the track has, in words).

    Args:
      flat: a config, flat. A field that it lacks is taken for its default.
    """
    shape = {field: flat.get(field) for field in self.shape_fields}
    for field in (*FIELDS, *sorted(set(flat) - set(FIELDS))):
      value = flat.get(field, FIELDS[field].default if field in FIELDS else None)
      if field == RATE_FIELD and value not in self.rates:
        yield field, value, f"one of {', '.join(f'{rate:g}' for rate in self.rates)}"
      elif field in self.shape_fields:
        if shape not in self.shapes:
          listed = " or ".join(str(known[field]) for known in self.shapes)
          yield field, value, f"{listed}, with the rest of that shape"
      elif field not in FREE_FIELDS and _changes_the_run(field) and value != self.fixed.get(field):
        yield field, value, f"{self.fixed.get(field)!r}"

  def departures_in_words(self, flat: Mapping[str, Any]) -> list[str]:
    """As `departures`, `config.optimizer.clip_norm=0.0, the track has 1.0` each."""
    return [f"config.{field}={value!r}, the track has {has}" for field, value, has in self.departures(flat)]

  def study(self, placements: Sequence[str] = ()) -> dict[str, Any]:
    """The study of an entry, or of the whole board: what a recipe has as STUDY.

    Each placement is tuned on one seed, at the first rates and beyond them where the best is at an edge. At its best
    rate it then has the seeds that the track asks for. An entry without the baseline can't know how close it is to it,
    and has the seeds of one that is close.
    """
    grid: dict[Any, Any] = {SEED_FIELD: (0,), PLACEMENT_FIELD: tuple(placements or self.placements)}
    if self.shapes:
      grid[self.shape_fields] = tuple(tuple(shape.values()) for shape in self.shapes)
    grid[RATE_FIELD] = self.first_rates
    with_baseline = self.baseline in grid[PLACEMENT_FIELD]
    seeds = self.seeds if with_baseline else self.close_seeds
    stages: list[dict[str, Any]] = [
      {"best": RATE_FIELD, "widen": self.rates},
      {"best": RATE_FIELD, "grid": {SEED_FIELD: range(seeds)}},
    ]
    if with_baseline:
      near = {"field": PLACEMENT_FIELD, "value": self.baseline, "within": self.close}
      only = {PLACEMENT_FIELD: (self.baseline,)}
      if self.close_seeds > self.seeds:
        stages.append({"best": RATE_FIELD, "grid": {SEED_FIELD: range(self.close_seeds)}, "near": near})
      if self.baseline_seeds > self.seeds:
        stages.append({"best": RATE_FIELD, "grid": {SEED_FIELD: range(self.baseline_seeds)}, "only": only})
    return {
      "title": self.title,
      "question": self.question,
      "grids": [grid],
      "then": stages,
      "claims": self.claims,
    }


def _changes_the_run(field: str) -> bool:
  return field not in FIELDS or FIELDS[field].on_resume != FREE


def check_claims(claims: Sequence[Mapping[str, Any]], where: str) -> None:
  """Rejects claims that say what is `lower` in a form that can't be judged; `reporting/claims.py` has their keys.

  Raises:
    InputError: naming the claim, the key and what it must be.
  """
  for claim in claims:
    if not isinstance(claim, Mapping):
      raise InputError(f"{where}: the claim {claim!r} must be a mapping, as {{'id': …, 'claim': …}}")
    if "lower" not in claim:
      continue
    name, lower, than, by = claim.get("id"), claim["lower"], claim.get("than"), claim.get("by", 0.0)
    others = [than] if isinstance(than, str) else than
    if not isinstance(name, str) or not isinstance(lower, str):
      raise InputError(f"{where}: the claim with lower={lower!r} needs id and lower, both text")
    if not isinstance(others, (list, tuple)) or not others or not all(isinstance(one, str) for one in others):
      raise InputError(f"{where}: claim {name!r}: than={than!r} must be a placement, or a list of them")
    if lower in others:
      raise InputError(f"{where}: claim {name!r}: {lower!r} can't be lower than itself")
    if type(by) not in (int, float) or not 0 <= by < math.inf:
      raise InputError(f"{where}: claim {name!r}: by={by!r} must be a number of nats, at least 0")


def _list_of(words: str, fits: Callable[[Any], bool]) -> Kind:
  """A list with something in it, all of one kind."""
  return Kind(words, lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(map(fits, value)))


_NATS = Kind("a finite number, at least 0", lambda value: type(value) in (int, float) and 0 <= value < math.inf)
_SEEDS = Kind("a whole number, at least 1", lambda value: COUNT.fits(value) and value > 0)
_RATES = _list_of("a list of learning rates", FIELDS[RATE_FIELD].admits)
_SHAPES = _list_of("a list of shapes, each its fields and their values", lambda value: isinstance(value, Mapping))
REQUIRED = ("name", "title", "rates", "first_rates", "placements")
# What a recipe's TRACK may have, and what each must be.
KINDS: Kinds = {
  "name": TEXT,
  "title": TEXT,
  "rates": _RATES,
  "first_rates": _RATES,
  "placements": _list_of("a list of placements", TEXT.fits),
  "question": TEXT,
  "baseline": TEXT,
  "seeds": _SEEDS,
  "close_seeds": _SEEDS,
  "baseline_seeds": _SEEDS,
  "close": _NATS,
  "added": _NATS,
  "fingerprint": TEXT,
  "validation_tokens": COUNT,
  "shapes": _SHAPES,
  "score": TEXT,
  "claims": Kind("a list of claims", lambda value: isinstance(value, (list, tuple))),
}


def load_track(recipe: str | Path) -> tuple[Track, Config]:
  """The track that a recipe defines beside its `get_config`, and its config.

  Raises:
    InputError: there is no such file, or it defines no track, or an invalid one.
  """
  resolved, colon, _ = recipes.resolve(str(recipe), "track").partition(":")
  if colon:
    raise InputError(f"track={recipe}: a track has no variants; leave out what follows the colon")
  path = Path(resolved)
  content = recipes.run(resolved)
  track, get_config = content.get("TRACK"), content.get("get_config")
  if not isinstance(track, Mapping) or get_config is None:
    raise InputError(f"track={recipe}: defines no TRACK beside its get_config; the tracks lie in configs/tracks/")
  unknown = [str(name) for name in track if name not in KINDS]
  missing = [name for name in REQUIRED if name not in track]
  if unknown or missing:
    wrong = f"does not know {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
    raise InputError(f"track={recipe}: TRACK {wrong}; it has {', '.join(KINDS)}")
  for name, value in track.items():
    if not KINDS[name].fits(value):
      raise InputError(f"track={recipe}: TRACK has {name}={shown(value)}, which must be {KINDS[name].words}")
  with recipes.running(resolved):
    config = get_config()
    config_lib.validate(config)
  made = Track(fixed=config_lib.flatten(config), path=path, **track)
  if made.noise_file.is_file():
    made = dataclasses.replace(made, noise=read_json(made.noise_file))
  _check(made)
  return made, config


def _check(track: Track) -> None:
  """Rejects a track that contradicts itself."""
  where = f"track={track.path}"
  if list(track.rates) != sorted(set(track.rates)) or not set(track.first_rates) <= set(track.rates):
    raise InputError(f"{where}: rates must rise, and first_rates be some of them")
  if track.score not in SCORES or (track.score == SLOPE and len(track.shapes) < 2):
    raise InputError(f"{where}: score must be one of {', '.join(SCORES)}, and a slope needs two shapes or more")
  if track.baseline not in track.placements:
    raise InputError(f"{where}: baseline={track.baseline!r} must be one of its placements")
  if track.seeds > track.close_seeds:
    raise InputError(f"{where}: close_seeds={track.close_seeds} must be at least seeds={track.seeds}")
  check_claims(track.claims, where)
  if any(set(shape) != set(track.shape_fields) for shape in track.shapes):
    raise InputError(f"{where}: all shapes must have the same fields")
