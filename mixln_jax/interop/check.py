"""Whether an export says what the model computes. One that does not is rejected before anything is written.

A layout has a fixed architecture: transformers builds it from config.json and loads the tensors into it. Once the
model's code is changed (another norm, another activation, another column of the sublayer rule), the same tensors may
still load there, without a warning, into a model that computes something else. Three guards stand against that: every
parameter has a name in the layout (`hf.tensors_of`), every field and column is known to the export or has its default,
and the logits of the exported tensors equal those of the model.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig
from mixln_jax.errors import InputError
from mixln_jax.interop import forward
from mixln_jax.model import Transformer

# Every field of config.model that the export knows: where it goes, or why it need not go anywhere. A field that is
# added to config.model must be added here, once the layouts carry what it means.
KNOWN_FIELDS = {
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "mlp_dim": "intermediate_size",
  "mlp_pad_to": "the columns that only pad the MLP are left out",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "placement": "the family, or placement_table",
  "dtype": "how the model is computed here; a reader chooses its own",
  "param_dtype": "torch_dtype",
  "residual_dtype": "how the model is computed here",
  "remat": "how the gradient is computed here",
  "attention": "how attention is computed here",
  "unroll": "how the layers are compiled here",
  "norm_epsilon": "rms_norm_eps",
  "rope_base": "rope_theta",
  "rope_scaling": "rope_scaling",
  "rope_factor": "rope_scaling",
  "rope_low_frequency_factor": "rope_scaling",
  "rope_high_frequency_factor": "rope_scaling",
  "rope_original_length": "rope_scaling",
  "tied_embeddings": "tie_word_embeddings",
  "qkv_bias": "the family, or qkv_bias",
  "init_deviation": "initial weights alone",
  "embedding_deviation": "initial weights alone",
}

SEED = 0
# Powers of two: near positions tell the order of tokens, far ones the base of RoPE. In fp32 an angle at position p is
# only known to p · 6e-8, so that positions of thousands would need a larger tolerance.
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64)
# Of the largest logit. Both sides compute in fp32 from the same stored numbers (those of bf16 parameters are exact in
# fp32), so that only rounding separates them, 6e-8 an operation: 1e-6 was measured on small models, and 1e-4 is what
# implementations of deep trained models reach. Another norm or activation is off by 1e-2 and more.
TOLERANCE = 1e-3


def check_export(
  params: Any, model: ModelConfig, tensors: Mapping[str, np.ndarray], description: Mapping[str, Any]
) -> None:
  """Rejects an export that would load elsewhere as another model. Call it before anything is written.

  Args:
    params: the model's parameters, where they fit: NumPy arrays, or arrays on any mesh.
    model: config.model.
    tensors: `hf.export_weights`, or the opened folder.
    description: `hf.hf_config`, what config.json says.

  Raises:
    InputError: the export does not know a field of config.model or a column of its placement, or the exported tensors
      compute other logits than the model.
  """
  check_fields(model)
  check_columns(description)
  check_numbers(params, model, tensors, description)


def check_fields(model: ModelConfig) -> None:
  """Rejects a field of config.model that the export does not know, unless it has its default.

  (The default of a field is what the code did before the field was there.)
  """
  for name, field in config_lib.FIELDS.items():
    section, _, short = name.partition(".")
    if section != "model" or short in KNOWN_FIELDS or model[short] == field.default:
      continue
    raise InputError(
      f"export: config.{name}={model[short]!r} is unknown to the export, and the layouts know nothing of it; export a "
      f"model with its default {field.default!r}, or teach mixln_jax/interop what it means (KNOWN_FIELDS in check.py)"
    )


def check_columns(description: Mapping[str, Any]) -> None:
  """Rejects a placement table with a column that its readers would ignore."""
  for index, rows in enumerate(description.get("placement_table", ())):
    for sublayer, row in rows.items():
      unknown = sorted(set(row) - set(forward.COLUMNS))
      if unknown:
        raise InputError(
          f"export: column {unknown[0]}={row[unknown[0]]!r} of layer {index}'s {sublayer} is unknown to the export; "
          f"known: {', '.join(forward.COLUMNS)}; teach it to mixln_jax/interop/modeling_mixln.py and forward.py"
        )


def check_numbers(
  params: Any, model: ModelConfig, tensors: Mapping[str, np.ndarray], description: Mapping[str, Any]
) -> None:
  """Rejects an export whose tensors and config.json compute other logits than the model; arguments as `check_export`.

  It sees what shows on a few tokens at short distances, with these weights: a window of attention wider than that, or
  a branch that is still scaled by 0, compute the same.
  """
  tokens_T = np.random.default_rng(SEED).integers(0, model.vocab_size, len(POSITIONS))
  positions_T = np.array(POSITIONS)
  exported_TV = forward.logits(tensors, description, tokens_T, positions_T)
  model_TV = _logits_of_model(params, model, tokens_T, positions_T)
  difference, largest = float(np.max(np.abs(model_TV - exported_TV))), float(np.max(np.abs(exported_TV)))
  if difference <= TOLERANCE * largest:
    return
  if not np.isfinite(difference):
    raise InputError("export: the logits of the model are not finite, so that the export can't be checked")
  raise InputError(
    f"export: the exported tensors, read as config.json says (model_type {description['model_type']!r}), compute other "
    f"logits than this model: the largest difference is {difference:.3g}, of logits up to {largest:.3g} (allowed: "
    f"{TOLERANCE * largest:.3g}); the model's code computes something that the layout can't say, and the folder would "
    "load elsewhere as another model; nothing was written"
  )


def _logits_of_model(params: Any, model: ModelConfig, tokens_T: np.ndarray, positions_T: np.ndarray) -> np.ndarray:
  """Logits [T, V] of the model in fp32, whatever types its config computes in."""
  in_fp32 = ConfigDict(model.to_dict())
  in_fp32.update(dtype="float32", residual_dtype="float32", attention="xla")
  transformer = Transformer(cast(ModelConfig, in_fp32))

  def apply(params: Any, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    return transformer.apply({"params": params}, tokens_BT, positions_BT=positions_BT)

  with jax.default_matmul_precision("float32"):  # accelerators multiply fp32 in fewer bits unless they are told
    logits_BTV = jax.jit(apply)(params, tokens_T[None].astype(np.int32), positions_T[None].astype(np.int32))
  return np.asarray(logits_BTV)[0]
