"""Coefficients of a trained model's condition routers, for reports and for merging experts."""

from typing import Any

import jax
import numpy as np

from uni_moe_jax.model.spec import ROUTER_PARAMS, ModelSpec
from uni_moe_jax.moe import routers


def layer_params(spec: ModelSpec, params: Any, layer: int, names: tuple[str, ...] = ()) -> Any:
  """The parameters of one layer, by projection, router and norm; with names, of these alone."""
  subtree, period, block = spec.stack.locate(layer)
  tree = params['encoder'][subtree][block]
  tree = {name: tree[name] for name in names or tree}
  return tree if period is None else jax.tree.map(lambda x: x[period], tree)


def router_of(spec: ModelSpec) -> routers.ConditionRouter:
  """The module of a condition router."""
  return routers.ConditionRouter(
      spec.router, spec.width, spec.num_experts, spec.top_k, spec.noise_std, spec.router_names)


def coefficients(
    spec: ModelSpec, params: Any, inputs: tuple[routers.RouterInput, ...]) -> dict[int, dict[str, np.ndarray]]:
  """{layer: {sublayer: f32 [A, E]}} of every condition router, without noise; {} if there is none.

  inputs: A router inputs.
  """
  if routers.routes_tokens(spec.router):
    return {}
  coef_of = jax.jit(lambda values: router_of(spec).apply({'params': values}, inputs, None).coef)
  coefs = {}
  for layer, sublayers in enumerate(spec.pattern):
    if sublayers:
      tree = layer_params(spec, params, layer, tuple(ROUTER_PARAMS[s] for s in sublayers))
      coefs[layer] = {s: np.asarray(coef_of(tree[ROUTER_PARAMS[s]])) for s in sublayers}
  return coefs
