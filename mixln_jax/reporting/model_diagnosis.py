"""diagnose.json: what `diagnose` measured on one checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixln_jax.config import FIELDS
from mixln_jax.errors import InputError
from mixln_jax.files import read_json
from mixln_jax.reporting.reading import DAMAGE, number_array, reason
from mixln_jax.runs import folder as folder_lib

DIAGNOSE_FILE = "diagnose.json"
# How many more than L entries an array of the depth suite has in each of so many dimensions.
SUITE_SHAPES = {"causal": (0, 2), "permutation": (0, 2), "removal": (0, 1), "usefulness": (0, 1), "jacobian": (0, 1)}
SUITE_SHAPES |= {"lens": (1, 1), "angular": (1, 2)}


@dataclasses.dataclass(frozen=True)
class ModelDiagnosis:
  """One diagnose.json of a model with L layers. What the file lacks is None or empty.

  Attributes:
    step: the checkpoint's step.
    tokens: counted tokens of the sample.
    placement: as the file names it.
    num_layers: L.
    fingerprint: of the data that the sample is from.
    definitions: name -> how it was measured, in words.
    angular_distance: `last`, `all` -> [L, L], entry [l, n-1] between the inputs of layers l and l + n (from 0); NaN
      where l + n > L.
    removal_loss: loss of the whole model, in nats a token.
    removal: number n of layers removed -> loss after removing layers l … l + n - 1, [L - n + 1].
    gradient_norm: `initial`, `checkpoint` -> sublayer -> [L].
    effective_rank: of the residual stream at each depth, [L + 1].
    logit_lens_perplexity: of the residual stream at each depth, read by the final norm and the head, [L + 1].
    depth_suite: the arrays of the depth suite by name, `causal/mean_of_ratios` and so on.
  """

  step: int
  tokens: int | None
  placement: str
  num_layers: int
  fingerprint: str | None
  definitions: Mapping[str, str]
  angular_distance: Mapping[str, np.ndarray]
  removal_loss: float | None
  removal: Mapping[int, np.ndarray]
  gradient_norm: Mapping[str, Mapping[str, np.ndarray]]
  effective_rank: np.ndarray | None
  logit_lens_perplexity: np.ndarray | None
  depth_suite: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def newest_diagnosis(run_path: Path) -> ModelDiagnosis | None:
  """The diagnosis of a run's latest diagnosed step; None where there is none.

  Raises:
    InputError: its file can't be read, or is damaged.
  """
  files: dict[int, Path] = {}
  for folder in (run_path / folder_lib.DIAGNOSE).glob("*"):
    file = folder / DIAGNOSE_FILE
    if folder.name.isdecimal() and file.is_file():
      files[int(folder.name)] = file
  return read_diagnosis(files[max(files)]) if files else None


def read_diagnosis(path: Path) -> ModelDiagnosis:
  """Reads a diagnose.json.

  Raises:
    InputError: it can't be read, or is damaged.
  """
  value = read_json(path)
  try:
    return _diagnosis_of(value)
  except DAMAGE as error:
    raise InputError(f"{path}: damaged ({reason(error)}); run `python -m mixln_jax diagnose` again") from error


def _diagnosis_of(value: Mapping[str, Any]) -> ModelDiagnosis:
  num_layers = int(value["num_layers"])
  if not FIELDS["model.num_layers"].admits(num_layers):
    raise ValueError(f"num_layers is {num_layers:.3g}")
  removal = value.get("removal") or {}
  tokens, removal_loss = value.get("tokens"), removal.get("loss")

  angular_distance = {}
  for which, rows in (value.get("angular_distance") or {}).items():
    angular_distance[str(which)] = number_array(rows, num_layers, num_layers)

  losses_by_size = {}
  for size, losses in (removal.get("blocks") or {}).items():
    losses_by_size[int(size)] = number_array(losses, num_layers - int(size) + 1)

  gradient_norm = {}
  for when, by_sublayer in (value.get("gradient_norm") or {}).items():
    gradient_norm[str(when)] = {str(name): number_array(norms, num_layers) for name, norms in by_sublayer.items()}

  by_depth = {}
  for name in ("effective_rank", "logit_lens_perplexity"):
    by_depth[name] = number_array(value[name], num_layers + 1) if value.get(name) else None

  return ModelDiagnosis(
    step=int(value["step"]),
    tokens=None if tokens is None else int(tokens),
    placement=str(value.get("placement", "")),
    num_layers=num_layers,
    fingerprint=value.get("data_fingerprint"),
    definitions={str(name): str(text) for name, text in (value.get("definitions") or {}).items()},
    angular_distance=angular_distance,
    removal_loss=None if removal_loss is None else float(removal_loss),
    removal=losses_by_size,
    gradient_norm=gradient_norm,
    effective_rank=by_depth["effective_rank"],
    logit_lens_perplexity=by_depth["logit_lens_perplexity"],
    depth_suite=_depth_suite(value.get("depth_suite") or {}, num_layers),
  )


def _depth_suite(suite: Mapping[str, Any], num_layers: int) -> dict[str, np.ndarray]:
  """The arrays of the depth suite that are known: over layers, pairs of layers, depths, and pairs of depths."""
  found = {}
  for name, values in (suite.get("arrays") or {}).items():
    measurement = str(name).split("/")[0]
    if measurement in SUITE_SHAPES:
      more, dimensions = SUITE_SHAPES[measurement]
      found[str(name)] = number_array(values, *(num_layers + more,) * dimensions)
  return found
