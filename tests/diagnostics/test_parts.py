"""Norms by layer: every parameter in its part, and equal to those of an independent, unrolled model."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import small_model
from model.cases import reference_case
from model.rounding import NETWORK

from mixln_jax import config as config_lib
from mixln_jax.diagnostics.diagnose import make_gradient_norms
from mixln_jax.model.parameters import parameters
from mixln_jax.parallel.mesh import make_mesh

ATTENTION, MLP = ("query", "key", "value", "output"), ("gate", "up", "down")


def test_every_parameter_has_its_part():
  strips = "keel*2,admin*1+gpas,layerscale*1"
  model = small_model(placement=strips, qkv_bias=True)
  by_part = {}
  for param in parameters(model).values():
    by_part.setdefault(param.part, set()).add(param.name)
  assert by_part["attention/"] == {*ATTENTION, *(f"{name}_bias" for name in ATTENTION[:3])}
  assert by_part["mlp/"] == set(MLP)
  assert by_part["attention/gain_"] == {"attention_norm", "attention_norm_2"}
  assert by_part["mlp/gain_"] == {"mlp_norm", "mlp_norm_2"}
  assert {f"{part}/" for part in ("embedding", "head", "final_norm")} <= by_part.keys()
  assert by_part[None] == {
    "gpas",
    *(f"{sublayer}_vector_c_{which}" for sublayer in ("attention", "mlp") for which in ("res", "out")),
  }
  heads = parameters(small_model(placement="hybrid*2,pre*2+qk_norm"))
  gains = {path for path, param in heads.items() if param.part == "attention/gain_"}
  assert gains == {f"layers/{name}_norm" for name in ("query", "key", "value", "attention")}


def test_gradient_norms_equal_those_of_the_unrolled_reference():
  name = "lns*2,post*1,reordered*1"
  params, tokens, _, _, gradient = reference_case(name)
  weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)
  batch = {"tokens_BT": tokens, "labels_BT": jnp.roll(tokens, -1, 1), "weights_BT": weights}
  batches = [jax.tree.map(lambda x, row=row: x[row : row + 1], batch) for row in range(len(tokens))]
  model = small_model(placement=name)
  mesh = make_mesh(config_lib.base().mesh)
  params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  with jax.set_mesh(mesh):
    actual = make_gradient_norms(model, jax.tree.map(lambda p: p.sharding, params), mesh)(params, batches)
  for sublayer, names in (("attention", ATTENTION), ("mlp", MLP)):
    for layer in range(4):
      entries = np.concatenate([np.ravel(gradient["layers"][weight][layer]) for weight in names])
      np.testing.assert_allclose(actual[sublayer][layer], np.linalg.norm(entries.astype(np.float64)), rtol=NETWORK)
