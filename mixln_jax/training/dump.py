"""What a run leaves of a step that is not finite: enough to do it again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.config import Config
from mixln_jax.model import Transformer
from mixln_jax.model.parameters import param_paths
from mixln_jax.opening import Setup, make_loader
from mixln_jax.parallel.processes import is_first, wait_for_all
from mixln_jax.parallel.rules import on_mesh
from mixln_jax.runs.folder import RunFolder
from mixln_jax.training.step import TrainState, columns_at, gradient_sum, loss_of


def write_dump(folder: RunFolder, setup: Setup, state: TrainState, step: int) -> Path:
  """Writes `non_finite_STEP/`: the step's batch and the norms of its gradient, tensor by tensor and layer by layer.

  The parameters of the step are those of the run's checkpoint, since nothing was updated since.

  Args:
    folder: the run.
    setup: what it trains.
    state: the state, whose parameters are those before the step.
    step: number of the update that was skipped, from 1.
  """
  config = setup.config
  target = folder.unused(f"non_finite_{step}")
  wait_for_all("the dump's folder is chosen")
  if is_first():
    target.mkdir()
  batches = make_loader(setup, config.train.batch_size, all_rows=True).train(step - 1)
  try:
    batch = next(batches)
  finally:
    batches.close()
  arrays: Any = batch
  if is_first():
    np.savez(target / "batch.npz", **arrays)
  with on_mesh(setup.mesh):
    norms_of = jax.jit(lambda params: gradient_norms(config, params, batch, step - 1))
    loss, norms = jax.device_get(norms_of(state.params))
  report = {
    "step": step,
    "batch": f"batch {step - 1} of data {setup.corpus.manifest.fingerprint}, config.data.seed={config.data.seed}",
    "loss": str(float(loss)),
    "gradient_norms": {name: [str(x) for x in np.atleast_1d(norm).tolist()] for name, norm in norms.items()},
  }
  folder.write_json(f"{target.name}/report.json", report)
  return target


def gradient_norms(
  config: Config, params: Any, batch: Mapping[str, Any], step: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The mean loss after `step` updates, and the norm of its gradient by each tensor; for tensors of `layers/`, of each
  layer [L]."""
  columns = columns_at(config, None, jnp.int32(step))
  model, micro_batches = Transformer(config.model), config.train.micro_batches
  total, count, grads = gradient_sum(model, params, batch, micro_batches, columns, loss_of(config))

  def norm(path: str, grad: jax.Array) -> jax.Array:
    axes = tuple(range(1, grad.ndim)) if path.startswith("layers/") else None
    return jnp.sqrt(jnp.sum(jnp.square(grad / count), axis=axes))

  paths = param_paths(grads)
  norms = jax.tree.map(norm, paths, grads)
  return total / count, dict(zip(jax.tree.leaves(paths), jax.tree.leaves(norms), strict=True))
