"""All figures of a report, as data. A figure that no run has the inputs for is named and left out, never faked."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from mixln_jax.reporting import curves, depth, layers, search, studies, suite
from mixln_jax.reporting.panels import Figure
from mixln_jax.reporting.source import Source


@dataclasses.dataclass(frozen=True)
class Absent:
  """A figure that no run has the inputs for.

  Attributes:
    title: the figure's.
    command: the command that makes its inputs.
    note: what else is to be known of it.
  """

  title: str
  command: str
  note: str = ""


class _Needs(NamedTuple):
  """What makes the inputs of a figure, as `Absent` says it."""

  command: str
  note: str = ""


TRAIN = _Needs("python -m mixln_jax train")
PAIRS = _Needs("python -m mixln_jax finetune", "With config.preference.loss: on pairs of answers.")
DIAGNOSTICS = _Needs("python -m mixln_jax train", "With diagnostics.every_steps above 0 it writes diagnostics.jsonl.")
DIAGNOSE = _Needs("python -m mixln_jax diagnose", "It writes diagnose/STEP/diagnose.json into the run's folder.")
ALPHAS = _Needs("python -m mixln_jax sweep", "Or train them one by one: pre, post and at least one mix:α between.")
DEPTHS = _Needs("python -m mixln_jax sweep", "Of shapes with different numbers of layers: axes that move together.")
SEARCH = _Needs("python -m mixln_jax sweep --search=configs/searches/layers.py")
RATES = _Needs("python -m mixln_jax sweep", "Or train them one by one: optimizer.learning_rate at two values or more.")

Maker = tuple[Callable[[Source], Figure], _Needs]

TRAINED_MODEL = "Layers of the trained model"
SEARCHED = "What the search saw"

# The sections of a report. A new figure is a function of the runs in a module of its own, and a line here.
SECTIONS: dict[str, tuple[Maker, ...]] = {
  SEARCHED: (
    (search.search_rungs, SEARCH),
    (search.search_layers, SEARCH),
    (search.search_effects, SEARCH),
  ),
  "Training": (
    (curves.loss_curves, TRAIN),
    (curves.preference_curves, PAIRS),
    (curves.gradient_norm_curve, TRAIN),
  ),
  "Studies": (
    (studies.learning_rate_study, RATES),
    (studies.alpha_ablation, ALPHAS),
    (depth.loss_by_depth, DEPTHS),
  ),
  "Layers while training": (
    (layers.training_gradient_norms, DIAGNOSTICS),
    (layers.residual_growth, DIAGNOSTICS),
    (layers.update_ratio, DIAGNOSTICS),
    (layers.branch_ratio, DIAGNOSTICS),
    (layers.norm_gains, DIAGNOSTICS),
    (layers.attention_statistics, DIAGNOSTICS),
    (layers.turning, DIAGNOSTICS),
  ),
  TRAINED_MODEL: (
    (layers.diagnosed_gradient_norms, DIAGNOSE),
    (layers.angular_distance_last, DIAGNOSE),
    (layers.angular_distance_all, DIAGNOSE),
    (layers.neighbour_distance, DIAGNOSE),
    (layers.removal_drop, DIAGNOSE),
    (layers.effective_rank, DIAGNOSE),
    (layers.logit_lens, DIAGNOSE),
    (suite.suite_by_layer, DIAGNOSE),
    (suite.causal_maps, DIAGNOSE),
    (suite.permutation_maps, DIAGNOSE),
    (suite.lens_by_depth, DIAGNOSE),
  ),
}


def all_figures(source: Source) -> tuple[dict[str, list[Figure]], list[Absent]]:
  """By section, every figure that the runs have the inputs for; and those that they have not."""
  figures: dict[str, list[Figure]] = {}
  absent = []
  for section, makers in SECTIONS.items():
    for make, needs in makers:
      figure = make(source)
      if figure.panels:
        figures.setdefault(section, []).append(figure)
      else:
        absent.append(Absent(figure.title, *needs))
  return figures, absent
