"""The field's depth suite on one model: causal and permutation scores, linear replacement, Jacobians, logit lens.

The five measurements are those of DepthBench (Wang et al., arXiv 2609.32534); `DEFINITIONS` defines each of them. Which
layer is removed, replaced or exchanged is data, so a measurement is one compiled program for any number of layers.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixln_jax.config import ModelConfig
from mixln_jax.diagnostics import jacobian, lens, linear_fit, swaps
from mixln_jax.diagnostics.layer_io import Batch, LayerIO, num_variants
from mixln_jax.diagnostics.substitution import Affine, Sums, make_substitution_step
from mixln_jax.errors import InputError
from mixln_jax.model import Transformer
from mixln_jax.parallel.rules import replicated

MEASUREMENTS = ("causal", "permutation", "usefulness", "jacobian", "lens")
# The thresholds of the published fractions (DepthBench, figure of depth use).
CAUSAL_THRESHOLD, PERMUTATION_THRESHOLD, USEFUL_RATIO = 0.45, 0.15, 1.1
LATE = 4  # the layers after the first 1 / LATE are late

DEFINITIONS = {
  "data": "Everything is measured on the calibration records, except `*_heldout`, which is measured on other records. "
  "A position holds a token if the loss counts it or the position before it. `causal`, `jacobian`, `angular` and the "
  "fit of `usefulness` are means over those positions; losses and `lens` are means over the counted positions. z_0 is "
  "the embedding and z_{l+1} the stream after layer l (for a Post-LN layer, after its last norm), before the final "
  "norm. Layers are counted from 0.",
  "causal": "[s][l], l > s: C = |u_l without layer s - u_l| / |u_l|, where u_l = z_{l+1} - z_l. `mean_of_ratios` is "
  "the mean over tokens of the ratio (DepthBench's current code), `ratio_of_means` the ratio of the means (its older "
  "code). With several residual streams, z is their sum, or the first stream if the head reads only that one; with "
  "attention residuals, z is the sum of the sources.",
  "removal": "Loss in nats per token with layer s removed: its output is its input (with attention residuals, it adds "
  "nothing to the sources). The norms of a Post-LN layer are removed with it.",
  "permutation": "[i][j], i < j: |loss with layers i and j exchanged - loss| / loss. `row_moves`: the whole layer "
  "moves, with its row of the placement (and factors that depend on depth, as in LNS). `row_stays`: all parameters "
  "move, a norm's gain to the norm of the same sublayer, and the placement stays. `row_stays_matrices_only`: gains "
  "stay as well. `row_stays_by_official_name`: the parameters move whose name in LLaMA's layout both layers have. In "
  "all of them, attention residuals read and write the sources of their new place.",
  "usefulness": "Loss with layer l replaced by the affine map (least squares over the calibration tokens) from what it "
  "reads to what it writes, divided by the loss of the model. `same`: on the tokens of the fit; `heldout`: on other "
  "tokens. With several streams, a layer reads and writes their concatenation; with attention residuals, it reads the "
  "sum of the sources and writes its two outputs.",
  "jacobian": "|J - I|_F / sqrt(width), where J[a, b] = d output_b / d input_a of a layer. With several streams (or "
  "sources), J is that of their concatenation, and the width that of all of them. `summed`: the mean over input "
  "positions of the sum over output positions (as in DepthBench's code). `same_position`: the derivative of a "
  "position's output by its own input. Estimated from products with random vectors (Hutchinson); `*_standard_error` is "
  "computed as for independent vectors.",
  "lens": "The final norm and head applied to z_l, l = 0 … L: cross entropy with the next token, KL(model || depth) in "
  "nats, and the fraction of the model's five likeliest tokens that are among the depth's five likeliest.",
  "angular": "[l][m], l < m: the mean of arccos(cos(z_l, z_m)) / pi, over all tokens and over the last token of each "
  "record.",
  "fractions": "For `causal/mean_of_ratios` and `permutation/*`: the fraction of pairs, among the layers after the "
  "first quarter, whose score is above 0.45 and 0.15, as DepthBench reports it. For `usefulness/*`: the fraction of "
  "layers with a ratio above 1.1.",
}

Arrays = dict[str, np.ndarray]
Watch = Callable[[Iterable[Any], str], Iterable[Any]]


def _unwatched(items: Iterable[Any], _: str) -> Iterable[Any]:
  return items


class _Suite(NamedTuple):
  """The inputs of all measurements."""

  model: ModelConfig
  params: Any
  calibration: Sequence[Batch]
  heldout: Sequence[Batch]
  jit: Callable[..., Any]
  watch: Watch


def depth_suite(
  model: ModelConfig,
  params: Any,
  calibration: Any,
  heldout: Any = None,
  *,
  mesh: Mesh | None = None,
  measurements: Sequence[str] = MEASUREMENTS,
  readings: Sequence[str] = swaps.READINGS,
  permutation_sequences: int | None = None,
  jacobian_vectors: int = 32,
  jacobian_sequences: int | None = None,
  jacobian_exact: bool = False,
  seed: int = 0,
  watch: Watch = _unwatched,
) -> Arrays:
  """Measures a model. Returns arrays by name.

      arrays = depth_suite(config.model, params, calibration_ids, heldout_ids)
      arrays["causal/mean_of_ratios"]  # [L, L], [removed, affected]

  Args:
    model: config.model; its placement may not depend on the step (`placement.at_step`).
    params: its parameters; if there is a mesh, sharded over it.
    calibration: token ids [sequences, T], which all count, or global batches as the loss takes them.
    heldout: other tokens in the same form, on which affine maps are scored too; None: score them only on their own.
    mesh: the mesh of params and batches; then call this function within `parallel.rules.on_mesh`.
    measurements: some of MEASUREMENTS.
    readings: some of `swaps.READINGS`: what moves when layers are exchanged. `row_stays_by_official_name` is left out
      if LLaMA's layout lacks a name for some parameter.
    permutation_sequences: exchange layers on this many of the first calibration sequences; by default on all.
    jacobian_vectors: random vectors per layer.
    jacobian_sequences: measure the Jacobian on this many of the first calibration sequences; by default on those of one
      batch.
    jacobian_exact: compute the whole matrices, with one product per entry of the width (and position); for small
      models.
    seed: the seed of the random vectors.
    watch: a wrapper of the iterables of each measurement, called with them and the measurement's name, to show
      progress.

  Returns:
    These arrays, with NaN where there is nothing to measure:
      `loss/calibration` (and `loss/heldout`): scalars.
      `causal/mean_of_ratios`, `causal/ratio_of_means` [L, L], [removed, affected].
      `removal/loss_calibration` (and `_heldout`) [L].
      `permutation/READING` [L, L].
      `usefulness/map` [L, E + 1, F]; `usefulness/loss_same`, `usefulness/ratio_same` (and `_heldout`) [L].
      `jacobian/summed_deviation`, `jacobian/same_position_deviation` [L], with their `_standard_error` [L] or, if
        exact, `jacobian/summed_mean`, `jacobian/same_position_mean` [L, E, E].
      `lens/cross_entropy`, `lens/kl_final_to_depth`, `lens/top5_overlap` [L + 1].
      `angular/all_tokens`, `angular/last_token` [L + 1, L + 1].

  Raises:
    InputError: a measurement or reading is unknown, or there is no calibration batch.
  """
  check_names("measurements", measurements, MEASUREMENTS)
  check_names("readings", readings, swaps.READINGS)
  jit = jax.jit if mesh is None else functools.partial(jax.jit, out_shardings=replicated(mesh))
  heldout_batches = [] if heldout is None else as_batches(heldout)
  suite = _Suite(model, params, as_batches(calibration), heldout_batches, jit, watch)
  if not suite.calibration:
    raise InputError("calibration=[]: must be one batch or more")
  arrays = _causal(suite, wanted="causal" in measurements)
  if "permutation" in measurements:
    arrays |= _permutation(suite, readings, permutation_sequences)
  if "usefulness" in measurements:
    arrays |= _usefulness(suite, arrays)
  if "jacobian" in measurements:
    arrays |= _jacobian(suite, jacobian_vectors, jacobian_sequences, seed, exact=jacobian_exact)
  if "lens" in measurements:
    arrays |= _lens(suite)
  return arrays


def check_names(field: str, names: Sequence[str], known: Sequence[str]) -> None:
  """Raises InputError if a name is unknown or if there is no name."""
  unknown = [name for name in names if name not in known]
  if unknown or not names:
    raise InputError(f"{field}={','.join(names)}: must be one or more of {', '.join(known)}")


def as_batches(tokens: Any, rows: int = 8) -> list[Batch]:
  """Batches of token ids [sequences, T], which all count. An iterable of batches is returned as a list."""
  if not hasattr(tokens, "shape"):
    return list(tokens)
  batches = []
  for start in range(0, len(tokens), rows):
    ids_BT = np.asarray(tokens[start : start + rows], np.int32)
    weights_BT = np.ones(ids_BT.shape, np.float32)
    weights_BT[:, -1] = 0  # the last token has no next token
    missing = min(rows, len(tokens)) - len(ids_BT)
    fill = ((0, missing), (0, 0))  # rows that do not count, so that all batches have one shape and share one program
    arrays = {"tokens_BT": ids_BT, "labels_BT": np.roll(ids_BT, -1, 1), "weights_BT": weights_BT}
    batches.append({name: jnp.asarray(np.pad(array, fill)) for name, array in arrays.items()})
  return batches


# The causal score, removal, and losses with affine maps.


def _substituted(
  suite: _Suite, step: Callable[..., Sums], batches: Sequence[Batch], affine: Affine | None, layers: Any, name: str
) -> dict[str, np.ndarray]:
  """The fields of `Sums` summed over batches, with one variant for each of `layers`."""
  at_once = min(num_variants(suite.model), len(layers))
  # All groups have the same size, so that they share one program: the last one wraps around.
  groups = [np.arange(start, start + at_once) % max(1, len(layers)) for start in range(0, len(layers), at_once)]
  work = [(group, batch) for group in groups for batch in batches]
  by_group: dict[int, Any] = {}
  for group, batch in suite.watch(work, name):
    sums = jax.device_get(step(suite.params, batch, np.asarray(layers)[group], affine))
    sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
    first = int(group[0])
    by_group[first] = sums if first not in by_group else jax.tree.map(np.add, by_group[first], sums)
  group_sums = list(by_group.values())

  def joined(read: Callable[[Sums], Any]) -> np.ndarray:
    return np.concatenate([read(sums) for sums in group_sums])[: len(layers)]

  first_sums = group_sums[0]  # all groups have the same sums of the model itself
  return {
    "tokens": first_sums.tokens,
    "count": first_sums.count,
    "loss": first_sums.loss,
    "size": first_sums.size_L,
    "ratio": joined(lambda sums: sums.ratio_CL),
    "change": joined(lambda sums: sums.change_CL),
    "losses": joined(lambda sums: sums.loss_C),
  }


def _causal(suite: _Suite, *, wanted: bool) -> Arrays:
  """The losses of the model and, if wanted, the causal score and the losses of removal."""
  num_layers = suite.model.num_layers
  step = suite.jit(make_substitution_step(suite.model))
  # At least one variant is computed, because its sums contain the loss of the model.
  layers = range(num_layers) if wanted else range(num_layers - 1, num_layers)
  sums = _substituted(suite, step, suite.calibration, None, layers, "causal")
  arrays = {"loss/calibration": mean(sums["loss"], sums["count"])}
  if wanted:
    later = np.arange(num_layers)[None] > np.arange(num_layers)[:, None]
    arrays["causal/mean_of_ratios"] = np.where(later, mean(sums["ratio"], sums["tokens"]), np.nan)
    arrays["causal/ratio_of_means"] = np.where(later, mean(sums["change"], sums["size"]), np.nan)
    arrays["removal/loss_calibration"] = mean(sums["losses"], sums["count"])
  if suite.heldout:
    sums = _substituted(suite, step, suite.heldout, None, layers, "removal, held out")
    arrays["loss/heldout"] = mean(sums["loss"], sums["count"])
    if wanted:
      arrays["removal/loss_heldout"] = mean(sums["losses"], sums["count"])
  return arrays


def _usefulness(suite: _Suite, losses: Mapping[str, np.ndarray]) -> Arrays:
  model = suite.model
  fit = suite.jit(linear_fit.make_fit_step(model), donate_argnums=1)
  at_once = linear_fit.layers_at_once(model)
  starts = range(0, model.num_layers, at_once)
  maps = []
  work = iter(suite.watch([batch for _ in starts for batch in suite.calibration], "usefulness, fit"))
  for start in starts:
    factors = suite.jit(lambda: linear_fit.Factors.zeros(model))()
    for _ in suite.calibration:
      factors = fit(suite.params, factors, next(work), start)
    maps.append(linear_fit.solve(jax.device_get(factors)))
  next(work, None)  # exhausts the iterator, so that `watch` sees the end
  map_LEF = np.concatenate(maps)[: model.num_layers]
  arrays = {"usefulness/map": np.roll(map_LEF, -1, axis=1)}
  step = suite.jit(make_substitution_step(model))
  affine = suite.jit(lambda maps: maps)(linear_fit.affine(map_LEF))
  for part, batches, name in (("same", suite.calibration, "calibration"), ("heldout", suite.heldout, "heldout")):
    if batches:
      sums = _substituted(suite, step, batches, affine, range(model.num_layers), f"usefulness, {part}")
      arrays[f"usefulness/loss_{part}"] = mean(sums["losses"], sums["count"])
      arrays[f"usefulness/ratio_{part}"] = arrays[f"usefulness/loss_{part}"] / losses[f"loss/{name}"]
  return arrays


# Exchanged layers.


def _permutation(suite: _Suite, readings: Sequence[str], sequences: int | None) -> Arrays:
  model = suite.model
  orders = swaps.all_swaps(model, readings)
  stays = swaps.identity(model)
  # Orders that give the same model are measured once. The model itself is the order in which nothing moves.
  distinct = {swaps.key(model, stays): stays}
  for by_pair in orders.values():
    for order in by_pair:
      distinct[swaps.key(model, order)] = order
  step = suite.jit(swaps.make_swap_step(model))
  chosen = _first_rows(suite.calibration, sequences or math.inf)
  sums = dict.fromkeys(distinct, 0.0)
  counts = dict.fromkeys(distinct, 0.0)
  work = [(key, batch, rows) for key in distinct for batch, rows in chosen]
  for key, batch, rows in suite.watch(work, "permutation"):
    loss, count = jax.device_get(step(suite.params, batch, rows, distinct[key]))
    sums[key] += float(loss)
    counts[key] += float(count)
  losses = {key: mean(sums[key], counts[key]) for key in distinct}
  own = losses[swaps.key(model, stays)]
  arrays = {}
  for reading, by_pair in orders.items():
    score = np.full((model.num_layers,) * 2, np.nan)
    for (first, second), order in zip(swaps.pairs(model.num_layers), by_pair, strict=True):
      score[first, second] = abs(losses[swaps.key(model, order)] - own) / own
    arrays[f"permutation/{reading}"] = score
  return arrays


# Jacobians.


def _jacobian(suite: _Suite, num_vectors: int, sequences: int | None, seed: int, *, exact: bool) -> Arrays:
  model, transformer = suite.model, Transformer(suite.model)
  streams = LayerIO(transformer).columns.streams.num_carried
  width = streams * model.embed_dim
  vectors = np.eye(width, dtype=np.float32).reshape(width, streams, -1)
  if not exact:
    vectors = jacobian.random_vectors(seed, num_vectors, streams, model.embed_dim)
  step = suite.jit(jacobian.make_jacobian_step(transformer, exact=exact))
  chosen = _first_rows(suite.calibration, sequences or len(suite.calibration[0]["weights_BT"]))
  total: Any = None
  for number, (batch, rows) in enumerate(suite.watch(chosen, "jacobian")):
    sums = jax.device_get(step(suite.params, batch, rows, vectors, (seed, number)))
    sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  summed, same = mean(total.summed_LKND, total.tokens), mean(total.same_LKSND, total.tokens)
  arrays = {}
  for name, one, other in (("summed", summed, summed), ("same_position", same[:, :, 0], same[:, :, -1])):
    if exact:
      # Vector k is the unit vector of output k, so its product is the column of that output.
      matrix = one.reshape(len(one), width, width).swapaxes(1, 2)
      arrays[f"jacobian/{name}_mean"] = matrix
      arrays[f"jacobian/{name}_deviation"] = jacobian.exact_deviation(matrix)
    else:
      estimate = jacobian.deviation(one, other, vectors)
      arrays[f"jacobian/{name}_deviation"] = estimate.value
      arrays[f"jacobian/{name}_standard_error"] = estimate.standard_error
  return arrays


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
  """Splits a sample into disjoint parts: two thirds for calibration, and one third held out.

  The held-out part is the last third of the batches or, with fewer than three batches, every third row of each. There
  is none where these have fewer than three rows: a pass for each layer over records that don't count is for nothing.
  """
  num_held = len(batches) // 3
  if num_held:
    return list(batches[:-num_held]), list(batches[-num_held:])
  if all(len(batch["weights_BT"]) < 3 for batch in batches):
    return list(batches), []
  choose = jax.jit(lambda weights_BT, chosen_B: weights_BT * chosen_B[:, None])
  parts: tuple[list[Batch], list[Batch]] = ([], [])
  for batch in batches:
    is_held_B = np.arange(len(batch["weights_BT"])) % 3 == 2
    for part, chosen_B in zip(parts, (~is_held_B, is_held_B), strict=True):
      part.append({**batch, "weights_BT": choose(batch["weights_BT"], chosen_B.astype(np.float32))})
  return parts


def mean(total: Any, count: Any) -> np.ndarray:
  """total / count; NaN where count is 0."""
  total, count = np.broadcast_arrays(np.asarray(total, np.float64), np.asarray(count, np.float64))
  return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _first_rows(batches: Sequence[Batch], sequences: float) -> list[tuple[Batch, np.ndarray]]:
  """The batches with the first sequences, each with a mask [B] that is 1 for the rows among them."""
  chosen, left = [], sequences
  for batch in batches:
    rows = len(batch["weights_BT"])
    if left > 0:
      chosen.append((batch, (np.arange(rows) < left).astype(np.float32)))
    left -= rows
  return chosen


# The logit lens and angles.


def _lens(suite: _Suite) -> Arrays:
  step = suite.jit(lens.make_lens_step(suite.model))
  total: Any = None
  for batch in suite.watch(suite.calibration, "lens"):
    sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(step(suite.params, batch)))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  later = np.triu(np.ones((suite.model.num_layers + 1,) * 2, bool), 1)
  return {
    "lens/cross_entropy": mean(total.cross_entropy_P, total.count),
    "lens/kl_final_to_depth": mean(total.kl_P, total.count),
    "lens/top5_overlap": mean(total.overlap_P, total.count),
    "angular/all_tokens": np.where(later, mean(total.angle_all_PP, total.tokens), np.nan),
    "angular/last_token": np.where(later, mean(total.angle_last_PP, total.rows), np.nan),
  }


def fractions(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
  """The published fractions (DEFINITIONS["fractions"]) of the arrays that there are; NaN if there is no pair of late
  layers."""
  result = {}
  for name, threshold in (("causal/mean_of_ratios", CAUSAL_THRESHOLD), *_thresholds(arrays)):
    if name in arrays:
      result[name] = _late_above(arrays[name], threshold)
  for name in ("usefulness/ratio_same", "usefulness/ratio_heldout"):
    if name in arrays:
      result[name] = float(np.mean(arrays[name] > USEFUL_RATIO))
  return result


def _thresholds(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, float]]:
  return [(name, PERMUTATION_THRESHOLD) for name in arrays if name.startswith("permutation/")]


def _late_above(score_LL: np.ndarray, threshold: float) -> float:
  """The fraction of pairs of late layers whose score is above a threshold; NaN if there is no such pair."""
  first = len(score_LL) // LATE
  late = score_LL[first:, first:]
  values = late[np.triu_indices(len(late), 1)]
  return float(np.mean(values > threshold)) if values.size else float("nan")
