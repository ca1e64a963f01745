"""Checks that an export describes what the model computes, and rejects it before anything is written if not.

A layout has a fixed architecture: transformers builds it from config.json and loads the tensors into it. If the model's
code changes (another norm, another activation, another column of the sublayer rule), the same tensors may still load
without a warning, into a model that computes something else. Three checks prevent that: every parameter has a name in
the layout (`hf.tensors_of`), every field and column is known to the export or has its default, and every layer of the
exported tensors computes the same as the model's layer.
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
from mixln_jax.placement import STREAM_SETS

# Every field of config.model that the export knows: the key that it is written to, or why it need not be written. Add a
# new field of config.model here once the layouts can express it.
KNOWN_FIELDS = {
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "mlp_dim": "intermediate_size",
  "mlp_pad_to": "columns that only pad the MLP are left out",
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
  "matrix_std_multiplier": "initial weights alone",
}

SEED = 0
# Powers of two: near positions reveal the order of tokens, far positions the base of RoPE. In fp32 an angle at position
# p is only accurate to p · 6e-8, so positions in the thousands would need a larger tolerance.
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64)
# The allowed difference: TOLERANCE times what a layer adds, plus ROUNDING times what it adds it to. Both sides compute
# in fp32 from the same stored numbers (bf16 parameters are exact in fp32), so they differ only by rounding, 6e-8 per
# operation. The largest difference seen was 2e-6 of what a layer adds, with weights of up to eight times their initial
# size. Another norm, activation or RoPE differed by 2e-2 or more (a LayerNorm by about 1 / sqrt(D)).
TOLERANCE = 1e-3
ROUNDING = 1e-6


def check_export(
  params: Any, model: ModelConfig, tensors: Mapping[str, np.ndarray], description: Mapping[str, Any]
) -> None:
  """Rejects an export that would load elsewhere as another model. Call it before anything is written.

  Args:
    params: the model's parameters, as NumPy arrays or as arrays on any mesh.
    model: config.model.
    tensors: the result of `hf.export_weights`, or the opened folder.
    description: the content of config.json, from `hf.hf_config`.

  Raises:
    InputError: the export does not know a field of config.model or a column of its placement, or the exported tensors
      compute something other than the model.
  """
  check_fields(model)
  check_streams(model)
  check_columns(description)
  check_numbers(params, model, tensors, description)


def check_fields(model: ModelConfig) -> None:
  """Rejects a field of config.model that the export does not know, unless it has its default.

  (The default of a field is what the code did before the field existed.)
  """
  for name, field in config_lib.FIELDS.items():
    section, _, short = name.partition(".")
    if section != "model" or short in KNOWN_FIELDS or model[short] == field.default:
      continue
    raise InputError(
      f"export: config.{name}={model[short]!r} is unknown to the export, and the layouts can't express it; export a "
      f"model with its default {field.default!r}, or add it to mixln_jax/interop (KNOWN_FIELDS in check.py)"
    )


def check_streams(model: ModelConfig) -> None:
  """Rejects a model of several residual streams."""
  streams = config_lib.table(model).streams
  if streams.kind:
    raise InputError(
      f"export: config.model.placement={model.placement!r} has {streams.num} residual streams "
      f"({STREAM_SETS[streams.kind].meaning}), which the layouts and modeling_mixln.py can't express; "
      "`mixln_jax.interop.hf.export_weights` returns its tensors by the names of the method's own code"
    )


def check_columns(description: Mapping[str, Any]) -> None:
  """Rejects a placement table with a column that its readers would ignore."""
  for index, rows in enumerate(description.get("placement_table", ())):
    for sublayer, row in rows.items():
      unknown = sorted(set(row) - set(forward.COLUMNS))
      if unknown:
        raise InputError(
          f"export: column {unknown[0]}={row[unknown[0]]!r} of layer {index}'s {sublayer} is unknown to the export; "
          f"known: {', '.join(forward.COLUMNS)}; add it to mixln_jax/interop/modeling_mixln.py and forward.py"
        )


def check_numbers(
  params: Any, model: ModelConfig, tensors: Mapping[str, np.ndarray], description: Mapping[str, Any]
) -> None:
  """Rejects an export whose tensors and config.json compute something other than the model.

  Arguments as in `check_export`. Each layer is compared on the model's own input of that layer, because a deep model
  with large weights amplifies rounding from end to end. The check misses what has no effect on a few tokens at short
  distances with these weights, such as an attention window wider than those distances.
  """
  tokens_T = np.random.default_rng(SEED).integers(0, model.vocab_size, len(POSITIONS))
  positions_T = np.array(POSITIONS)
  embedded_TD, stream_LTD, logits_TV = _values_of_model(params, model, tokens_T, positions_T)
  _check_finite(embedded_TD, stream_LTD, logits_TV)
  exported = forward.ExportedModel(tensors, description, positions_T)
  _compare("the embedding", embedded_TD, exported.embed(tokens_T), np.zeros_like(embedded_TD))
  x_TD = embedded_TD
  for index, stream_TD in enumerate(stream_LTD):
    _compare(f"layer {index}", stream_TD, exported.layer(index, x_TD), x_TD)
    x_TD = stream_TD
  _compare("the final norm and the head", logits_TV, exported.logits(x_TD), np.zeros_like(logits_TV))
  unread = exported.unread()
  if unread:
    raise InputError(f"export: {unread[0]} and {len(unread) - 1} more tensors have no counterpart in config.json")


def _values_of_model(
  params: Any, model: ModelConfig, tokens_T: np.ndarray, positions_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Runs the model in fp32, whatever types its config has.

  Returns:
    The residual stream before the first layer [T, D], after each layer [L, T, D], and the logits [T, V].
  """
  in_fp32 = ConfigDict(model.to_dict())
  in_fp32.update(dtype="float32", residual_dtype="float32", attention="xla")
  transformer = Transformer(cast(ModelConfig, in_fp32))

  def apply(params: Any, tokens_BT: jax.Array, positions_BT: jax.Array) -> Any:
    arguments = ({"params": params}, tokens_BT)
    _, taps = transformer.apply(*arguments, positions_BT=positions_BT, method="hidden")
    logits_BTV = transformer.apply(*arguments, positions_BT=positions_BT)
    return taps["embedded_BTD"][0], taps["stream_LBTD"][:, 0], logits_BTV[0]

  with jax.default_matmul_precision("float32"):  # by default accelerators multiply fp32 with fewer bits
    values = jax.jit(apply)(params, tokens_T[None].astype(np.int32), positions_T[None].astype(np.int32))
  embedded_TD, stream_LTD, logits_TV = jax.device_get(values)
  return embedded_TD, stream_LTD, logits_TV


def _check_finite(embedded_TD: np.ndarray, stream_LTD: np.ndarray, logits_TV: np.ndarray) -> None:
  parts = {"the embedding": embedded_TD}
  parts |= {f"layer {index}": stream_TD for index, stream_TD in enumerate(stream_LTD)}
  parts["the final norm and the head"] = logits_TV
  for part, values in parts.items():
    if not np.isfinite(values).all():
      raise InputError(
        f"export: {part} of this model computes numbers that are not finite, so the export can't be checked; export a "
        "checkpoint from before the run diverged"
      )


def _compare(part: str, model_TX: np.ndarray, exported_TX: np.ndarray, input_TX: np.ndarray) -> None:
  """Rejects an export in which a part computes something other than the same part of the model, on equal input."""
  added_T = np.max(np.abs(model_TX - input_TX), axis=-1)
  allowed_T = TOLERANCE * added_T + ROUNDING * np.max(np.abs(model_TX), axis=-1)
  difference_T = np.max(np.abs(model_TX - exported_TX), axis=-1)
  token = int(np.argmax(difference_T - allowed_T))
  if difference_T[token] <= allowed_T[token]:
    return
  raise InputError(
    f"export: {part}, computed from the exported tensors and config.json, differs from this model: the largest "
    f"difference is {difference_T[token]:.3g}, where the model adds up to {added_T[token]:.3g} (allowed: "
    f"{allowed_T[token]:.3g}); the layout can't express what the model's code computes, and the folder would load "
    "elsewhere as another model; nothing was written"
  )
