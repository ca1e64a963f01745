"""Weights and configs in Hugging Face's layout: LLaMA, Qwen 2 and 3, OLMo 2, and the official Mix-LN code's.

Names are LLaMA's. The name of a gain depends on where the layer has norms, as in the official Mix-LN code, Gemma 2 and
OLMo 2: `input_layernorm` before attention, `post_attention_layernorm` after it, `post_feedforward_layernorm` after the
MLP, and before the MLP `pre_feedforward_layernorm`, or LLaMA's `post_attention_layernorm` if the layer has no norm
after attention. In this file "their" means Hugging Face's, and "our" this project's.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import ModelConfig
from mixln_jax.errors import InputError
from mixln_jax.model.parameters import Param, abstract_params, gain_name, param_paths, parameters
from mixln_jax.placement import SUBLAYERS, Layer, Row

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IGNORED = ("rotary_emb.inv_freq",)  # a buffer in checkpoints of old versions


class Tensor(NamedTuple):
  """One of their tensors, and its place in our tree."""

  name: str  # theirs
  path: str
  layer: int | None  # index along our leading axis
  shape: tuple[int, ...]  # ours, without the layer's axis and without columns that only pad the MLP
  input_axes: int  # leading input dimensions of a matrix, which they store transposed; 0 = stored in our order
  shape_elsewhere: tuple[int, ...] | None = None  # their shape, if stored in our order and not flattened

  @property
  def their_shape(self) -> tuple[int, ...]:
    if self.input_axes:
      return math.prod(self.shape[self.input_axes :]), math.prod(self.shape[: self.input_axes])
    if self.shape_elsewhere is not None or not self.shape:
      return self.shape_elsewhere or self.shape
    return (math.prod(self.shape),)

  @property
  def place(self) -> tuple[Any, ...]:
    """The index of this tensor in the leaf of our tree: its layer, without columns that only pad the MLP."""
    layer = () if self.layer is None else (self.layer,)
    return (*layer, *(slice(0, size) for size in self.shape))

  def leaf_of(self, tree: Any) -> Any:
    """The leaf of a parameter tree that holds it."""
    return tree[self.path] if self.layer is None else tree["layers"][self.path.removeprefix("layers/")]

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    return (array.T if self.input_axes else array).reshape(self.shape)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    if not self.input_axes:
      return array.reshape(self.their_shape)
    return np.asarray(array.reshape(self.their_shape[::-1]).T, order="C")


def norm_names(layer: Layer) -> dict[str, str]:
  """Their name for each gain that a layer uses: `attention_norm`, … -> `input_layernorm`, …"""
  after_attention = layer.attention.norm_mid or layer.attention.norm_out
  before_mlp = "pre_feedforward_layernorm" if after_attention else "post_attention_layernorm"
  attention = _gain_names("attention", layer.attention, "input_layernorm", "post_attention_layernorm")
  return attention | _gain_names("mlp", layer.mlp, before_mlp, "post_feedforward_layernorm")


def _gain_names(sublayer: str, row: Row, before: str, after: str) -> dict[str, str]:
  """Their name for each gain of a sublayer, which has at most one norm before it and one after it."""
  names = {}
  for norm, theirs in (("norm_in", before), ("norm_mid", after), ("norm_out", after)):
    index = row.gain_index(norm)
    if index is not None:
      names[gain_name(sublayer, index)] = theirs
  return names


def tensors_of(model: ModelConfig) -> Iterator[Tensor]:
  """Every tensor of config.model in their layout.

  Raises:
    InputError: a parameter has no name there.
  """
  layers = config_lib.table(model).layers
  for path, param in parameters(model).items():
    if not param.in_layers:
      yield Tensor(_their_name(param), path, None, param.logical_shape, param.input_axes, param.shape_elsewhere)
      continue
    for index, layer in enumerate(layers):
      if param.used_L is not None and not param.used_L[index]:
        continue
      name = _their_name(param)
      if param.norm:
        name = f"{norm_names(layer)[param.norm]}.{name}"
      shape = param.logical_shape[1:]
      yield Tensor(f"model.layers.{index}.{name}", path, index, shape, param.input_axes, param.shape_elsewhere)


def _their_name(param: Param) -> str:
  if param.elsewhere is None:
    raise _no_name(param.path)
  return param.elsewhere


def _no_name(path: str) -> InputError:
  return InputError(
    f"parameter {path}: Hugging Face's layouts have no name for it, and their models do not use it; weights can't be "
    "exported or imported with it until model/parameters.py names it and interop (modeling_mixln.py, forward.py) "
    "computes with it"
  )


def import_weights(tensors: Mapping[str, Any], model: ModelConfig) -> Any:
  """Their tensors as our parameter tree.

  Args:
    tensors: arrays by their names (`model.layers.0.self_attn.q_proj.weight`), which are read one at a time.
    model: config.model; its placement says which gains each layer has.

  Returns:
    A tree of NumPy arrays in config.model.param_dtype, for `jax.device_put` onto any sharding.

  Raises:
    InputError: a tensor is missing, has another shape, or has no counterpart in this model.
  """
  unused = {name for name in tensors if not name.endswith(IGNORED)}
  tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(model))
  for param in parameters(model).values():
    if param.used_L is not None:  # in layers that do not use it, it keeps a value that has no effect
      tree["layers"][param.name][...] = 0.0 if param.name == "gpas" else 1.0
  for tensor in tensors_of(model):
    array = np.asarray(_find(tensors, tensor, model))
    if array.shape != tensor.their_shape:
      raise InputError(f"{tensor.name}: has shape {array.shape}, but config.model makes it {tensor.their_shape}")
    unused.discard(tensor.name)
    tensor.leaf_of(tree)[tensor.place] = tensor.to_ours(array)
  if model.tied_embeddings and HEAD in unused:
    unused.discard(HEAD)
    if not np.array_equal(np.asarray(tensors[HEAD]), np.asarray(tensors[EMBEDDING])):
      raise InputError("lm_head.weight differs from the embedding; set config.model.tied_embeddings=False")
  if unused:
    raise InputError(
      f"{len(unused)} tensors have no counterpart in config.model (placement {model.placement!r}), for instance "
      f"{', '.join(sorted(unused)[:3])}; the placement, the depth or an option differs"
    )
  return tree


def _find(tensors: Mapping[str, Any], tensor: Tensor, model: ModelConfig) -> Any:
  if tensor.name in tensors:
    return tensors[tensor.name]
  hint = ""
  if "norm" in tensor.name and tensor.layer is not None:
    siblings = [name for name in tensors if f".{tensor.layer}." in name and "norm" in name]
    if siblings:
      hint = f"; the norms of that layer are {', '.join(sorted(siblings))}"
  raise InputError(
    f"{tensor.name} is missing, but config.model (placement {model.placement!r}) needs it{hint}; the placement, the "
    "depth or an option differs"
  )


def export_weights(params: Any, model: ModelConfig) -> Mapping[str, np.ndarray]:
  """Our parameters, or a tree of the same shapes such as their gradient, as tensors in their layout.

  Parameters that a layer does not use, and columns that only pad the MLP, are left out.

  Args:
    params: NumPy arrays, or arrays on any mesh.
    model: config.model.

  Returns:
    The tensors by name. Each access copies the tensor to the host and converts it to their order; nothing is cached.

  Raises:
    InputError: the model has a parameter that the layout has no name for.
  """
  extra = sorted(set(jax.tree.leaves(param_paths(params))) - set(parameters(model)))
  if extra:
    raise _no_name(extra[0])
  return _Exported(params, model)


class _Exported(Mapping[str, np.ndarray]):
  """The mapping that `export_weights` returns."""

  def __init__(self, params: Any, model: ModelConfig):
    self._params = params
    self._tensors = {tensor.name: tensor for tensor in tensors_of(model)}

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    return tensor.to_theirs(np.asarray(tensor.leaf_of(self._params)[tensor.place]))

  def __contains__(self, name: object) -> bool:
    return name in self._tensors

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)


# config.json


@dataclasses.dataclass(frozen=True)
class Family:
  """A stock decoder of transformers that config.model can describe."""

  architecture: str
  model_type: str
  row: Row  # of every attention sublayer; the MLP's row is the same without norms of heads
  qkv_bias: bool = False


FAMILIES = (
  Family("LlamaForCausalLM", "llama", Row(norm_in=True)),
  Family("Qwen2ForCausalLM", "qwen2", Row(norm_in=True), qkv_bias=True),
  Family("Qwen3ForCausalLM", "qwen3", Row(norm_in=True, qk_norm=True)),
  Family("Olmo2ForCausalLM", "olmo2", Row(norm_mid=True, qk_norm_full=True)),
)
PLACEMENTS = {"llama": "pre", "qwen2": "pre", "qwen3": "pre+qk_norm", "olmo2": "reordered+qk_norm_full"}
# Options of their configs that this model lacks, and the values with which they have no effect.
UNSUPPORTED = {
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "clip_qkv": (None,),
  "partial_rotary_factor": (1.0, None),
  "quantization_config": (None,),
  "hidden_act": ("silu", None),
}
ROPE_TYPES = ("default", "llama3")
ROPE_KEYS = (
  "rope_theta",
  "rope_type",
  "factor",
  "low_freq_factor",
  "high_freq_factor",
  "original_max_position_embeddings",
  "partial_rotary_factor",
)
OFFICIAL_TYPE = "mixln_llama"  # not "llama": transformers would then load it as a Pre-LN LLaMA
MODELING = Path(__file__).with_name("modeling_mixln.py")  # the code with which transformers loads it; needs torch


def model_fields(hf: Mapping[str, Any], placement_string: str | None = None) -> dict[str, Any]:
  """The fields of config.model that correspond to a config.json.

  Args:
    hf: the JSON object.
    placement_string: the placement; by default that of the file (checkpoints of the official code do not state it).

  Raises:
    InputError: the model is of an unsupported kind, or has an unsupported option.
  """
  kind = hf.get("model_type")
  if kind not in (*PLACEMENTS, OFFICIAL_TYPE):
    raise InputError(f"config.json: model_type={kind!r} is not supported; supported: {', '.join(PLACEMENTS)}")
  options = {**hf, **_rope(hf)}
  for name, harmless in UNSUPPORTED.items():
    if options.get(name) not in harmless:
      raise InputError(f"config.json: {name}={options[name]!r} is not supported; this model has {harmless[0]!r}")
  if any(layer != "full_attention" for layer in hf.get("layer_types") or ()):
    raise InputError("config.json: layer_types has layers without full attention, which are not supported")
  width, heads = _number(hf, "hidden_size"), _number(hf, "num_attention_heads")
  kv_heads = _number(hf, "num_key_value_heads", heads)
  head_dim = _number(hf, "head_dim", 0)
  num_layers = _number(hf, "num_hidden_layers")
  fields = {
    "vocab_size": _number(hf, "vocab_size"),
    "embed_dim": width,
    "mlp_dim": _number(hf, "intermediate_size"),
    "num_layers": num_layers,
    "num_heads": heads,
    "num_kv_heads": 0 if kv_heads == heads else kv_heads,  # 0 as in recipes
    "head_dim": 0 if head_dim * heads == width else head_dim,
    "norm_epsilon": float(_number(hf, "rms_norm_eps", 1e-6)),
    "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
    "qkv_bias": bool(hf.get("qkv_bias", kind == "qwen2")),
    "placement": placement_string or str(hf.get("norm_placement") or PLACEMENTS.get(kind, "")),
  }
  _check_placement(hf, fields["placement"], num_layers)
  return fields | _rope_fields(hf)


def _check_placement(hf: Mapping[str, Any], placement_string: str, num_layers: int) -> None:
  """Rejects a placement that contradicts the file, if the file states one (as our exports do)."""
  stated = hf.get("norm_placement")
  if stated is None:
    return
  stated_table = placement.parse(str(stated), num_layers)
  if placement.parse(placement_string, num_layers) != stated_table:
    raise InputError(f"placement={placement_string!r}: config.json says norm_placement={stated!r}; leave placement out")
  by_layer = hf.get("norm_placement_of_layers")
  if by_layer is not None and by_layer != stated_table.layer_list.split():
    raise InputError(
      f"config.json: norm_placement={stated!r} is {stated_table.layer_list!r}, but norm_placement_of_layers says "
      f"{by_layer!r}; the file was changed, restore it"
    )


def _number(fields: Mapping[str, Any], name: str, default: float | None = None) -> Any:
  """A number of a config.json, a whole number unless `default` is a float; the default if it is absent or null."""
  value = fields.get(name)
  if value is None and default is not None:
    return default
  kinds, wanted = ((int, float), "number") if isinstance(default, float) else (int, "whole number")
  if not isinstance(value, kinds) or isinstance(value, bool):
    raise InputError(f"config.json: {name}={value!r} is not a {wanted}")
  return value


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The RoPE settings of a config.json, from the keys of transformers 4 and 5.

  Raises:
    InputError: a key is unknown, or two places contradict each other, of which transformers would follow one or none.
  """
  rope: dict[str, Any] = {}
  source: dict[str, str] = {}  # key -> the part of the file that sets it
  if hf.get("rope_theta") is not None:
    rope["rope_theta"], source["rope_theta"] = hf["rope_theta"], "rope_theta"
  for part in ("rope_scaling", "rope_parameters"):
    values = hf.get(part) or {}
    if not isinstance(values, Mapping):
      raise InputError("config.json: rope_scaling and rope_parameters must be objects or null")
    for key, value in values.items():
      name = "rope_type" if key == "type" else key
      if value is None:
        continue
      if name in rope and rope[name] != value:
        raise InputError(
          f"config.json: {part} says {key}={value!r}, but {source[name]} says {rope[name]!r}; remove the wrong one"
        )
      rope[name], source[name] = value, part
  rope.setdefault("rope_type", "default")
  if rope["rope_type"] not in ROPE_TYPES:
    raise InputError(
      f"config.json: RoPE scaling {rope['rope_type']!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
    )
  unknown = sorted(set(rope) - set(ROPE_KEYS))
  if unknown:
    raise InputError(
      f"config.json: {source[unknown[0]]} has {unknown[0]!r}, which is unknown; known: {', '.join(ROPE_KEYS)}"
    )
  return rope


def _rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
  rope = _rope(hf)
  fields: dict[str, Any] = {"rope_base": float(_number(rope, "rope_theta", 10_000.0)), "rope_scaling": "none"}
  if rope["rope_type"] == "default":
    return fields
  needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
  factor, low, high, length = (_number({name: rope.get(name, "missing")}, name, 0.0) for name in needed)
  return fields | {
    "rope_scaling": "llama3",
    "rope_factor": float(factor),
    "rope_low_frequency_factor": float(low),
    "rope_high_frequency_factor": float(high),
    "rope_original_length": int(length),
  }


def family_of(model: ModelConfig) -> Family | None:
  """The stock decoder that computes what config.model computes, or None."""
  layers = config_lib.table(model).layers
  for family in FAMILIES:
    if model.qkv_bias == family.qkv_bias and all(_is_layer_of(layer, family) for layer in layers):
      return family
  return None


def _is_layer_of(layer: Layer, family: Family) -> bool:
  mlp = dataclasses.replace(family.row, qk_norm=False, qk_norm_full=False)
  return layer.attention.without_initial() == family.row and layer.mlp.without_initial() == mlp


def hf_config(model: ModelConfig, max_length: int, *, official: bool = False) -> dict[str, Any]:
  """The config.json of config.model.

  Args:
    model: config.model.
    max_length: positions that the model was trained on.
    official: use the layout of the official Mix-LN code, with the placement. The file MODELING, which must be written
      beside config.json, reads it; without that file transformers rejects the directory.

  Raises:
    InputError: no stock decoder computes this placement and `official` is False, or the layouts can't express
      config.model.rope_scaling.
  """
  identity = _official_identity(model) if official else _stock_identity(model)
  return identity | {
    "vocab_size": model.vocab_size,
    "hidden_size": model.embed_dim,
    "intermediate_size": model.mlp_dim,
    "num_hidden_layers": model.num_layers,
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": config_lib.num_kv_heads(model),
    "head_dim": config_lib.head_dim(model),
    "hidden_act": "silu",
    "rms_norm_eps": model.norm_epsilon,
    "rope_theta": model.rope_base,
    "rope_scaling": _rope_scaling(model),
    "max_position_embeddings": max_length,
    "tie_word_embeddings": model.tied_embeddings,
    "attention_bias": False,
    "torch_dtype": model.param_dtype,
  }


def _stock_identity(model: ModelConfig) -> dict[str, Any]:
  family = family_of(model)
  if family is not None:
    return {"architectures": [family.architecture], "model_type": family.model_type}
  known = []
  for other in FAMILIES:
    with_bias = " with qkv_bias" if other.qkv_bias else ""
    known.append(f"{PLACEMENTS[other.model_type]!r}{with_bias} ({other.model_type})")
  bias = f" with config.model.qkv_bias={model.qkv_bias}" if model.qkv_bias else ""
  raise InputError(
    f"config.model.placement={model.placement!r}{bias} is not a stock decoder of transformers (those are "
    f"{', '.join(known)}), which would load these weights as another model; use the layout 'official', which has the "
    "placement and a modelling file"
  )


def _official_identity(model: ModelConfig) -> dict[str, Any]:
  table = config_lib.table(model)
  return {
    "architectures": ["MixLNForCausalLM"],
    "model_type": OFFICIAL_TYPE,
    "norm_placement": model.placement,
    "norm_placement_of_layers": table.layer_list.split(),
    "placement_table": [_stated_rows(layer) for layer in table.layers],
    "qkv_bias": model.qkv_bias,
    "auto_map": {
      "AutoConfig": f"{MODELING.stem}.MixLNConfig",
      "AutoModelForCausalLM": f"{MODELING.stem}.MixLNForCausalLM",
    },
  }


def _stated_rows(layer: Layer) -> dict[str, Any]:
  """The rows of a layer as `placement_table` has them."""
  return {name: _stated_columns(getattr(layer, name)) for name in SUBLAYERS}


def _stated_columns(row: Row) -> dict[str, Any]:
  """The columns in which a row differs from the default row, without those that affect only initial weights."""
  empty = dataclasses.asdict(Row())
  columns = dataclasses.asdict(row.without_initial())
  return {name: value for name, value in columns.items() if value != empty[name]}


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
  if model.rope_scaling == "none":
    return None
  if model.rope_scaling != "llama3":
    raise InputError(f"config.model.rope_scaling={model.rope_scaling!r}: the layouts can't express it")
  return {
    "rope_type": "llama3",
    "factor": model.rope_factor,
    "low_freq_factor": model.rope_low_frequency_factor,
    "high_freq_factor": model.rope_high_frequency_factor,
    "original_max_position_embeddings": model.rope_original_length,
  }
