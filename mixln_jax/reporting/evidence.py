"""All figures of a report, as data. A figure that no run has the inputs for is named and left out, never faked."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from mixln_jax.reporting import curves, depth, layers, studies, suite
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
DIAGNOSTICS = _Needs("python -m mixln_jax train", "With diagnostics.every_steps above 0 it writes diagnostics.jsonl.")
DIAGNOSE = _Needs("python -m mixln_jax diagnose", "It writes diagnose/STEP/diagnose.json into the run's folder.")
ALPHAS = _Needs("python -m mixln_jax sweep", "Or train them one by one: pre, post and at least one mix:α between.")
DEPTHS = _Needs("python -m mixln_jax sweep", "Of shapes with different numbers of layers: axes that move together.")
RATES = _Needs("python -m mixln_jax sweep", "Or train them one by one: optimizer.learning_rate at two values or more.")

MAKERS: tuple[tuple[Callable[[Source], Figure], _Needs], ...] = (
  (curves.loss_curves, TRAIN),
  (curves.perplexity_curves, TRAIN),
  (curves.gradient_norm_curve, TRAIN),
  (studies.alpha_ablation, ALPHAS),
  (studies.learning_rate_study, RATES),
  (depth.loss_by_depth, DEPTHS),
  (layers.training_gradient_norms, DIAGNOSTICS),
  (layers.residual_growth, DIAGNOSTICS),
  (layers.sublayer_statistics, DIAGNOSTICS),
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
)


def all_figures(source: Source) -> tuple[list[Figure], list[Absent]]:
  """Every figure that the runs have the inputs for, and those that they have not."""
  figures, absent = [], []
  for make, needs in MAKERS:
    figure = make(source)
    if figure.panels:
      figures.append(figure)
    else:
      absent.append(Absent(figure.title, *needs))
  return figures, absent
