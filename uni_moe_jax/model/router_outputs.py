"""What the routers of a trained model decide for condition rows: read by reports, and by who merges kernels for good."""

from typing import Any

import jax
import numpy as np

from uni_moe_jax.model.spec import ROUTER_PARAMS, ModelSpec
from uni_moe_jax.moe import routers


def layer_params(spec: ModelSpec, params: Any, layer: int, names: tuple[str, ...] = ()) -> Any:
  """The parameters of one layer, by projection, router and norm; or of the named ones alone."""
  subtree, period, block = spec.stack.locate(layer)
  tree = params['encoder'][subtree][block]
  tree = {name: tree[name] for name in names or tree}
  return tree if period is None else jax.tree.map(lambda x: x[period], tree)


def router_of(spec: ModelSpec) -> routers.Router:
  """The module of a router that does not look at tokens."""
  return routers.Router(spec.router, spec.width, spec.num_experts, spec.top_k, spec.noise_std, spec.router_names)


def coefficients(spec: ModelSpec, params: Any, rows: tuple[routers.RouterInput, ...]) -> dict[int, dict[str, np.ndarray]]:
  """{layer: {part: f32 [A, E]}} of every router, without noise; rows: A router inputs.

  Empty where there is no router, or where it looks at tokens.
  """
  if routers.routes_tokens(spec.router):
    return {}
  decide = jax.jit(lambda values: router_of(spec).apply({'params': values}, rows, None).coef)
  found = {}
  for layer, parts in enumerate(spec.pattern):
    if parts:
      tree = layer_params(spec, params, layer, tuple(ROUTER_PARAMS[p] for p in parts))
      found[layer] = {p: np.asarray(decide(tree[ROUTER_PARAMS[p]])) for p in parts}
  return found
