"""Coordinate check: sizes of activations and of their changes by depth and width, over the first updates.

    python -m benchmarks.coordinate_check [--out=benchmarks/results/coordinate_check.json]
      [--figure=docs/coordinate_check.svg] [--fixed_batch]

A parameterization works as intended if the lines are flat: then the learning rate of a small model suits a large one.
Each model is trained on the same few batches of random tokens, and after each update it reads one more batch. The
results are root mean squares over the positions of that batch: of the last layer's stream, of the logits, and of the
change of both since the start. Every point is the mean over the seeds. With --fixed_batch all batches are the first
one.

The base has 4 layers of width 64. Depths are at that width, widths at that depth; heads have 16 dimensions.
"""

import argparse
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

from benchmarks.output import output_file
from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.model import Transformer
from mixln_jax.model.transformer import project_to_logits
from mixln_jax.text import aligned
from mixln_jax.training.derived import with_derived
from mixln_jax.training.step import init_state, make_train_step

BASE_DEPTH, BASE_WIDTH, HEAD_DIM, VOCAB = 4, 64, 16, 256
DEPTHS, WIDTHS = (4, 8, 16, 32), (32, 64, 128, 256)
PARAMETERIZATIONS = ("standard", "depth_mup", "completep")
UPDATES, ROWS, LENGTH, SEEDS, RATE = 4, 8, 32, (0, 1, 2), 3e-3
QUANTITIES = {
  "stream": "last stream",
  "logits": "logits",
  "stream_change": "change of the last stream",
  "logits_change": "change of the logits",
}


def config_of(parameterization: str, depth: int, width: int) -> Config:
  """A Pre-LN model of one size under a parameterization."""
  config = config_lib.base()
  config.model.update(
    placement="pre",
    vocab_size=VOCAB,
    num_layers=depth,
    embed_dim=width,
    mlp_dim=8 * width // 3,
    num_heads=width // HEAD_DIM,
  )
  config.train.update(num_steps=100, batch_size=ROWS)
  config.data.sequence_length = LENGTH
  config.optimizer.update(learning_rate=RATE, schedule="constant", warmup_steps=0, parameterization=parameterization)
  if parameterization != "standard":
    config.optimizer.update(base_depth=BASE_DEPTH, base_width=BASE_WIDTH)
  return with_derived(config)


def measure(config: Config, *, fixed_batch: bool = False) -> dict[str, list[float]]:
  """Each quantity before the first update and after each update, averaged over the seeds."""
  model, train_step = Transformer(config.model), make_train_step(config)
  drawn = np.random.default_rng(0).integers(0, VOCAB, (UPDATES + 1, ROWS, LENGTH + 1))
  tokens = jnp.asarray(drawn[:1] + 0 * drawn if fixed_batch else drawn, jnp.int32)
  batches = {"tokens_BT": tokens[:-1, :, :-1], "labels_BT": tokens[:-1, :, 1:]}
  batches["weights_BT"] = jnp.ones(batches["labels_BT"].shape, jnp.float32)
  seen = tokens[-1, :, :-1]

  def read(model: Transformer) -> tuple[jax.Array, jax.Array]:
    hidden_BTD, taps = model.hidden(seen)
    return taps["stream_LBTD"][-1], project_to_logits(hidden_BTD, model.head_weights())

  def look(params: Any) -> tuple[jax.Array, jax.Array]:
    return model.apply({"params": params}, method=read)  # pyright: ignore[reportReturnType]

  def run(seed: jax.Array) -> dict[str, jax.Array]:
    state = init_state(config, seed=seed)
    first_stream, first_logits = look(state.params)

    def sizes(params: Any) -> dict[str, jax.Array]:
      stream, logits = look(params)
      found = {"stream": stream, "logits": logits}
      found |= {"stream_change": stream - first_stream, "logits_change": logits - first_logits}
      return {name: jnp.sqrt(jnp.mean(jnp.square(value))) for name, value in found.items()}

    def update(state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
      state, _ = train_step(state, batch)
      return state, sizes(state.params)

    before = sizes(state.params)
    _, after = jax.lax.scan(update, state, batches)
    return {name: jnp.concatenate([before[name][None], after[name]]) for name in before}

  found = jax.jit(lambda seeds: jax.lax.map(run, seeds))(jnp.array(SEEDS))
  return {name: np.mean(values, axis=0).tolist() for name, values in found.items()}


def measure_all(*, fixed_batch: bool = False) -> list[dict[str, Any]]:
  """A row for each parameterization and size. At the base size all are the same model, which is trained once."""
  rows, base = [], measure(config_of("standard", BASE_DEPTH, BASE_WIDTH), fixed_batch=fixed_batch)
  for parameterization in PARAMETERIZATIONS:
    sizes = [("depth", depth, BASE_WIDTH) for depth in DEPTHS] + [("width", BASE_DEPTH, width) for width in WIDTHS]
    for axis, depth, width in sizes:
      is_base = (depth, width) == (BASE_DEPTH, BASE_WIDTH)
      found = base
      if not is_base:
        found = measure(config_of(parameterization, depth, width), fixed_batch=fixed_batch)
      rows.append({"parameterization": parameterization, "axis": axis, "depth": depth, "width": width} | found)
      print(f"{parameterization} {depth} × {width}: {found['stream_change'][-1]:.4g}", flush=True)
  return rows


def table(rows: list[dict[str, Any]], axis: str) -> list[str]:
  """Each quantity after the last update, one line per parameterization; `×`: the largest size over the smallest."""
  values = DEPTHS if axis == "depth" else WIDTHS
  lines = [("after the last update", "parameterization", *(f"{axis} {value}" for value in values), "×")]
  for name, words in QUANTITIES.items():
    for parameterization in PARAMETERIZATIONS:
      chosen = [row for row in rows if row["axis"] == axis and row["parameterization"] == parameterization]
      last = [row[name][-1] for row in chosen]
      lines.append((words, parameterization, *(f"{value:.3g}" for value in last), f"{last[-1] / last[0]:.2f}"))
  return aligned(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
  """Draws the changes of stream and logits by depth and width, one line per update (lighter = earlier)."""
  mpl.use("svg")
  from matplotlib import pyplot as plt

  mpl.rcParams.update({"svg.hashsalt": "coordinate_check", "svg.fonttype": "none", "font.size": 9})
  panels = [(axis, name) for axis in ("depth", "width") for name in ("stream_change", "logits_change")]
  figure, axes = plt.subplots(
    len(PARAMETERIZATIONS), len(panels), figsize=(11, 6.5), sharey="col", constrained_layout=True
  )
  for row_of_axes, parameterization in zip(axes, PARAMETERIZATIONS, strict=True):
    for plot, (axis, name) in zip(row_of_axes, panels, strict=True):
      chosen = [row for row in rows if row["axis"] == axis and row["parameterization"] == parameterization]
      for update in range(1, UPDATES + 1):
        values = [row[name][update] for row in chosen]
        plot.plot([row[axis] for row in chosen], values, "o-", color="#1f6f8b", alpha=update / UPDATES, markersize=3)
      plot.set_xscale("log", base=2)
      plot.set_yscale("log")
      plot.set_title(f"{parameterization}: {QUANTITIES[name]}", fontsize=8)
      plot.set_xlabel(axis)
  figure.savefig(path, metadata={"Date": None})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=output_file, default="benchmarks/results/coordinate_check.json")
  parser.add_argument("--figure", type=output_file, default="docs/coordinate_check.svg")
  parser.add_argument("--fixed_batch", action="store_true")
  arguments = parser.parse_args()
  rows = measure_all(fixed_batch=arguments.fixed_batch)
  about = {"machine": platform.machine(), "jax": jax.__version__, "learning_rate": RATE, "seeds": SEEDS}
  Path(arguments.out).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
  draw(rows, Path(arguments.figure))
  for axis in ("depth", "width"):
    print("\n".join(table(rows, axis)))


if __name__ == "__main__":
  main()
