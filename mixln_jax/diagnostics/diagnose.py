"""All measurements of `diagnose` on a checkpoint, as one JSON object."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixln_jax.config import Config, ModelConfig
from mixln_jax.diagnostics import depth, depth_suite, parts
from mixln_jax.diagnostics.removal import Score, make_removal_step, removal
from mixln_jax.model import Transformer
from mixln_jax.model.loss import batch_loss
from mixln_jax.model.parameters import abstract_params, parameters
from mixln_jax.parallel.rules import replicated
from mixln_jax.placement import SUBLAYERS
from mixln_jax.text import aligned, perplexity

DEFINITIONS = {
  "data": "The first records of the run's validation set, up to the one with which `tokens` counted tokens are "
  "reached, each in a row of its own at the run's sequence length. A token counts if the loss counts the token after "
  "it: padding, the last token of a record and, with document masks, the last token of a document do not count. For an "
  "encoder, the masked tokens count (the same tokens for every model with that tokenizer), and the loss is that of "
  "predicting them.",
  "angular_distance": "[l][n - 1], l from 0: arccos(cosine) / pi between the residual stream at the input of layer l "
  "and n layers later. The last depth is the output of the last layer, before the final norm. Computed for each token "
  "in fp32, with the cosine clipped to [-1, 1], and then averaged: `last` over the last counted token of each record "
  "(Gromov et al., arXiv 2403.17887; Mix-LN, arXiv 2412.13795), `all` over all counted tokens. fp32 does not resolve "
  "distances below 1e-4.",
  "removal": "blocks[n][l]: validation loss in nats per token with layers l to l + n - 1 removed, without any "
  "training. The output of a removed layer is its input (with attention residuals, later softmaxes read zeros from "
  "it). `loss`: the loss with all layers; a drop is the difference between the two. `scores`, if tasks were given: the "
  "same for each task's accuracy (or its first metric if it has no accuracy).",
  "gradient_norm": "L2 norm of the gradient of the mean loss over the same tokens, without clipping, with respect to "
  "all weights of a sublayer together (attention: query, key, value, output; mlp: gate, up, down; with their biases, "
  "without gains of norms). `initial`: at initial weights drawn again from the run's config.seed (or those of "
  "config.train.start_from); an imported model did not start from them. `checkpoint`: at the weights of this step. "
  "Both use the placement of this step, also if it depends on the step (`+prores`).",
  "effective_rank": "exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007), for the "
  "counted tokens' residual streams at each depth minus their mean. Depth 0 is the input of the first layer. With "
  "several residual streams, here and in angular_distance, it is their sum, or the first stream if the head reads only "
  "that one.",
  "logit_lens_perplexity": "Perplexity of the final norm and head applied to the residual stream at each depth (logit "
  "lens); with several streams, applied to what the head reads of them.",
  **{f"depth_suite/{name}": text for name, text in depth_suite.DEFINITIONS.items()},
}
Batches = Sequence[Mapping[str, jax.Array]]
# The default readings of an exchange of layers; they differ only if the layers' rows of the placement differ.
SWAPS = ("row_moves", "row_stays")
GradientNorms = Callable[[Any, Iterable[Mapping[str, jax.Array]]], dict[str, list[float]]]
Watch = Callable[[Iterable[Any], str], Iterable[Any]]


def diagnose(
  config: Config,
  params: Any,
  initial_params: Callable[[], Any],
  batches: Batches,
  mesh: Mesh,
  *,
  sizes: Sequence[int] = (1,),
  scores: Mapping[str, Score] | None = None,
  suite: Mapping[str, Any] | None = None,
  watch: Watch = lambda batches, _: batches,
) -> dict[str, Any]:
  """Measures a model. Call it within `parallel.rules.on_mesh`, which gives the model's logical axes their meaning.

  Args:
    config: the run's config.
    params: the checkpoint's parameters, on the mesh.
    initial_params: returns the run's initial parameters, on the mesh; called once, and its result is freed after use.
    batches: global batches of the validation set.
    mesh: the mesh of all arrays.
    sizes: how many consecutive layers to remove together.
    scores: tasks to score with layers removed, as in `removal`.
    suite: the keyword arguments of `depth_suite.depth_suite`; by default it is not run.
    watch: a wrapper of the batches of each stage, called with them and the stage's name, to show progress.

  Returns:
    `tokens`, `definitions` (DEFINITIONS), and the measurements that it defines; numbers that are not finite are None.
  """
  model, everywhere = config.model, replicated(mesh)
  depth_step = jax.jit(depth.make_depth_step(model), donate_argnums=1, out_shardings=everywhere)
  sums = jax.jit(lambda: depth.DepthSums.zeros(model), out_shardings=everywhere)()
  for batch in watch(batches, "depth"):
    sums = depth_step(params, sums, batch)
  sums = jax.device_get(sums)
  removal_step = jax.jit(make_removal_step(model), out_shardings=everywhere)
  gradient_norms = make_gradient_norms(model, jax.tree.map(lambda p: p.sharding, params), mesh)
  result = {
    "tokens": int(sums.tokens),
    "definitions": DEFINITIONS,
    "angular_distance": {
      "last": depth.by_block(sums.angle_last_PP / sums.rows),
      "all": depth.by_block(sums.angle_all_PP / sums.tokens),
    },
    "removal": removal(removal_step, params, watch(batches, "removal"), model.num_layers, sizes, scores),
    "gradient_norm": {
      "initial": gradient_norms(initial_params(), watch(batches, "gradient, initial")),
      "checkpoint": gradient_norms(params, watch(batches, "gradient")),
    },
    "effective_rank": [depth.effective_rank(triangle_EE) for triangle_EE in sums.triangle_PEE],
    "logit_lens_perplexity": [perplexity(float(loss)) for loss in sums.lens_P / sums.tokens],
  }
  if suite:
    result["depth_suite"] = measure_suite(model, params, batches, mesh, suite, watch)
  return finite(result)


def measure_suite(
  model: ModelConfig, params: Any, batches: Batches, mesh: Mesh, options: Mapping[str, Any], watch: Watch
) -> dict[str, Any]:
  """The results of the depth suite for JSON: `arrays` by name, `fractions`, and the number of tokens of each part.

  `depth_suite.split` makes the calibration and held-out parts. The affine maps themselves are left out.
  """
  calibration, heldout = depth_suite.split(batches)
  arrays = depth_suite.depth_suite(model, params, calibration, heldout, mesh=mesh, watch=watch, **options)
  count = jax.jit(lambda batch: jnp.sum(batch["weights_BT"]), out_shardings=replicated(mesh))
  return {
    "calibration_tokens": sum(int(count(batch)) for batch in calibration),
    "heldout_tokens": sum(int(count(batch)) for batch in heldout),
    "fractions": depth_suite.fractions(arrays),
    "arrays": {name: array.tolist() for name, array in arrays.items() if name != "usefulness/map"},
  }


def make_gradient_norms(model: ModelConfig, shardings: Any, mesh: Mesh) -> GradientNorms:
  """`norms(params, batches)`: the norm of the mean loss's gradient by layer, for `attention` and `mlp`, each [L].

  Gradients of the summed loss are added over the batches in fp32 and divided once.

  Args:
    model: config.model.
    shardings: the shardings of the parameters, which their gradients have too.
    mesh: the mesh of those shardings.
  """
  transformer = Transformer(model)

  def zeros() -> tuple[Any, jax.Array]:
    shapes = abstract_params(model)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes), jnp.zeros(())

  def loss(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    total, count, _ = batch_loss(transformer, params, batch)
    return total, count

  def add(params: Any, grads: Any, count: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, jax.Array]:
    more, more_count = jax.grad(loss, has_aux=True)(params, batch)
    return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, more), count + more_count

  def finish(grads: Any, count: jax.Array) -> dict[str, jax.Array]:
    norms = parts.norms(jax.tree.map(lambda g: g / count, grads), parameters(model))
    return {name: norms[f"{name}/"] for name in SUBLAYERS}

  everywhere = replicated(mesh)
  start = jax.jit(zeros, out_shardings=(shardings, everywhere))
  step = jax.jit(add, donate_argnums=(1, 2), out_shardings=(shardings, everywhere))
  end = jax.jit(finish, out_shardings=everywhere)

  def norms(params: Any, batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, list[float]]:
    grads, count = start()
    for batch in batches:
      grads, count = step(params, grads, count, batch)
    return {name: norm_L.tolist() for name, norm_L in jax.device_get(end(grads, count)).items()}

  return norms


def finite(value: Any) -> Any:
  """The value with None in place of every number that is not finite, which JSON can't express."""
  if isinstance(value, Mapping):
    return {key: finite(item) for key, item in value.items()}
  if isinstance(value, list):
    return [finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def table(result: Mapping[str, Any], layer_list: str) -> str:
  """The results by layer as text for a terminal. `layer_list`: the placement, one word per layer."""
  distance, removed, norms = result["angular_distance"], result["removal"], result["gradient_norm"]
  num_layers, scores = len(layer_list.split()), removed.get("scores")
  columns = [
    (("", "layer"), [*map(str, range(1, num_layers + 1)), "end"]),
    (("", "placement"), layer_list.split()),
    (("angular dist.", "last token"), _cells((row[0] for row in distance["last"]), ".4f")),
    (("to the next,", "all tokens"), _cells((row[0] for row in distance["all"]), ".4f")),
    (("loss", "without it"), _cells(removed["blocks"].get("1", []), ".4f")),
  ]
  if scores:
    columns.append((("score", "without it"), _cells(_mean_score(removed)["blocks"].get("1", []), ".4f")))
  for when in ("initial", "checkpoint"):
    for sublayer in SUBLAYERS:
      columns.append(((f"gradient, {when}", sublayer), _cells(norms[when][sublayer], ".3e")))
  columns.append((("effective", "rank"), _cells(result["effective_rank"], ".1f")))
  columns.append((("logit-lens", "perplexity"), _cells(result["logit_lens_perplexity"], ".5g")))
  # Columns without a value for the end of the stack are one cell shorter.
  padded = [[*head, *cells, *[""] * (num_layers + 1 - len(cells))] for head, cells in columns]
  lines = aligned(list(zip(*padded, strict=True)), right=range(len(columns)))
  (loss,) = _cells([removed["loss"]], ".4f")
  lines.append(f"loss with all layers {loss}, over {result['tokens']:,} tokens")
  if scores:
    lines.append(f"score with all layers {_mean_score(removed)['score']:.4f}, the mean of {', '.join(scores)}")
  if "depth_suite" in result:
    lines += ["", *suite_lines(result["depth_suite"], layer_list)]
  return "\n".join(lines)


def suite_lines(suite: Mapping[str, Any], layer_list: str) -> list[str]:
  """The depth suite by layer and the published fractions, as text for a terminal."""
  arrays = {name: np.array(values, float) for name, values in suite["arrays"].items()}
  num_layers = len(layer_list.split())
  columns = [(("", "layer"), [*map(str, range(1, num_layers + 1)), "end"]), (("", "placement"), layer_list.split())]

  def add(head: tuple[str, str], name: str, form: str, read: Callable[[np.ndarray], Iterable[float]] = list) -> None:
    if name in arrays:
      columns.append((head, _cells((_number(value) for value in read(arrays[name])), form)))

  add(("causal score", "on later ones"), "causal/mean_of_ratios", ".3f", _mean_of_rows)
  for reading, word in (("row_moves", "row moves"), ("row_stays", "row stays")):
    add(("exchanged with", f"next, {word}"), f"permutation/{reading}", ".4f", lambda score: np.diagonal(score, 1))
  add(("loss as a map,", "same tokens"), "usefulness/ratio_same", ".4f")
  add(("over the loss,", "others"), "usefulness/ratio_heldout", ".4f")
  for name, word in (("summed", "summed"), ("same_position", "same position")):
    add(("Jacobian", word), f"jacobian/{name}_deviation", ".3f")
    add(("", "± "), f"jacobian/{name}_standard_error", ".3f")
  add(("logit lens", "KL"), "lens/kl_final_to_depth", ".4f")
  add(("", "top 5"), "lens/top5_overlap", ".3f")
  padded = [[*head, *cells, *[""] * (num_layers + 1 - len(cells))] for head, cells in columns]
  lines = aligned(list(zip(*padded, strict=True)), right=range(len(columns)))
  causal, useful = depth_suite.CAUSAL_THRESHOLD, depth_suite.USEFUL_RATIO
  for name, fraction in suite["fractions"].items():
    if name.startswith("usefulness"):
      what = f"layers above {useful}"
    elif name.startswith("causal"):
      what = f"late pairs above {causal}"
    else:
      what = f"late pairs above {depth_suite.PERMUTATION_THRESHOLD}"
    lines.append(f"{name}: {_cells([fraction], '.1%')[0]} of {what}")
  return lines


def _mean_of_rows(score_LL: np.ndarray) -> list[float]:
  """The mean of each row of a matrix above its diagonal; the last row has nothing there and is left out."""
  return [float(np.mean(row[index + 1 :])) for index, row in enumerate(score_LL[:-1])]


def _number(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None


def _mean_score(removed: Mapping[str, Any]) -> dict[str, Any]:
  """The mean over tasks of the `scores` of `removal`."""
  scores = list(removed["scores"].values())
  blocks = {}
  for size in scores[0]["blocks"]:
    by_layer = zip(*(score["blocks"][size] for score in scores), strict=True)
    blocks[size] = [math.fsum(values) / len(scores) for values in by_layer]
  return {"score": math.fsum(score["score"] for score in scores) / len(scores), "blocks": blocks}


def _cells(values: Iterable[float | None], form: str) -> list[str]:
  return ["n/a" if value is None else format(value, form) for value in values]
