"""The depth suite of diagnose.json, drawn by layer and as maps, side by side over placements.

Each line or map is the mean over a group's runs.
"""

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np

from mixln_jax.reporting.layers import DEPTH_AXIS, LAYER_AXIS, by_depth, diagnosed, maps
from mixln_jax.reporting.model_diagnosis import ModelDiagnosis
from mixln_jax.reporting.panels import Figure, Panel
from mixln_jax.reporting.source import SEEDS_NOTE, Source, make_figure

NOTE = "Definitions of DepthBench (arXiv 2609.32534); diagnose.json has ours in full."

Y_LABELS = {"usefulness": "loss / loss of the model", "jacobian": "‖J − I‖ / √width"}
# Causal scores above it have one colour. A Post-LN layer after one that is removed may have 5, beside which all others
# would look like 0.
LARGEST_COLOUR = 1.0
# Scores and deviations of the first layers may be 100 times those of the others.
LOG = ("permutation", "jacobian")
Read = Callable[[np.ndarray], np.ndarray]


def causal_maps(source: Source) -> Figure:
  """How much each layer changes what each later one adds."""
  caption = (
    "Causal score, mean of ratios: by how much the change that layer l makes to the stream differs when layer s is "
    "removed, as a fraction of that change. At 0, layer l does not depend on layer s. All maps have one colour scale, "
    f"which ends at {LARGEST_COLOUR:g}: larger scores have its last colour. {NOTE}"
  )
  read = diagnosed(_reader("causal/mean_of_ratios", None))
  panels = maps(source, read, "layer s removed (1 = first)", "later layer l")
  figure = make_figure("causal_score", "Causal score", caption, panels)
  return dataclasses.replace(figure, colour_label="causal score", largest_colour=LARGEST_COLOUR)


def permutation_maps(source: Source) -> Figure:
  """What it costs to exchange two layers."""
  caption = (
    "Permutation score: |loss with two layers exchanged − loss| / loss; the row of the placement moves with its layer. "
    f"At 0, the order of the two does not matter. All maps have one colour scale. {NOTE}"
  )
  panels = maps(source, diagnosed(_reader("permutation/row_moves", None)), "layer i (1 = first)", "layer j")
  figure = make_figure("permutation_score", "Permutation score", caption, panels)
  return dataclasses.replace(figure, colour_label="permutation score")


def suite_by_layer(source: Source) -> Figure:
  """What each layer is worth, by four measures, a panel each."""
  panels = []
  measures: tuple[tuple[str, str, Read | None], ...] = (
    ("causal score, mean over later layers", "causal/mean_of_ratios", _mean_of_rows),
    ("exchanged with the next layer", "permutation/row_moves", lambda score: np.diagonal(score, 1)),
    ("replaced by an affine map", "usefulness/ratio_heldout", None),
    ("Jacobian off the identity", "jacobian/same_position_deviation", None),
  )
  for title, name, read in measures:
    lines = by_depth(source, diagnosed(_reader(name, read)))
    measurement = name.split("/")[0]
    label = Y_LABELS.get(measurement, "score")
    panels.append(Panel(title, LAYER_AXIS, label, lines, log_y=measurement in LOG))
  caption = (
    "By layer: how much later layers depend on it; what it costs to exchange it with the next one; what it costs to "
    "replace it by the affine map that fits it best (on tokens that it was not fitted on); how far its Jacobian is "
    f"from the identity. {NOTE} {SEEDS_NOTE}"
  )
  return make_figure("depth_suite", "What each layer is worth", caption, panels)


def lens_by_depth(source: Source) -> Figure:
  """How far the prediction of each depth is from that of the model."""
  panels = []
  for title, name, log_y in (("KL", "lens/kl_final_to_depth", False), ("top 5", "lens/top5_overlap", False)):
    lines = by_depth(source, diagnosed(_reader(name, None)), first=0)
    label = "KL(model ‖ depth) (nats)" if name.endswith("depth") else "overlap of the likeliest five"
    panels.append(Panel(title, DEPTH_AXIS, label, lines, log_y=log_y))
  caption = f"The stream at each depth, read by the final norm and the head, against the model. {NOTE} {SEEDS_NOTE}"
  return make_figure("lens_distance", "Logit lens against the model", caption, panels)


def _reader(name: str, read: Read | None) -> Callable[[ModelDiagnosis], np.ndarray | None]:
  def found(diagnosis: ModelDiagnosis) -> np.ndarray | None:
    values = diagnosis.depth_suite.get(name)
    if values is None or not values.size:
      return None
    return values if read is None else read(values)

  return found


def _mean_of_rows(score_LL: np.ndarray) -> np.ndarray:
  """The mean over later layers; the last layer has none."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # a row of NaN
    return np.nanmean(score_LL[:-1], axis=1)
