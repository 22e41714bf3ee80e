"""Coefficients of condition routers, and the model without routers and experts that they leave for some conditions.

A condition router routes all segments of a condition by the same coefficients, and experts are linear, so their kernels
can be added in advance (Uni-Perceiver-MoE, section 3.4). Decoding merges inside its program, so that its loop merges no
kernels; export/merge.py merges for good.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.model.spec import PROJECTIONS, ROUTER_PARAMS, ModelSpec
from uni_moe_jax.moe import layers, routers
from uni_moe_jax.tasks.attributes import Condition


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
  """{layer: {sublayer: f32 [A, E]}} of every condition router for A inputs, without noise; {} if there is none."""
  if routers.routes_tokens(spec.router):
    return {}
  coef_of = jax.jit(lambda values: router_of(spec).apply({'params': values}, inputs, None).coef)
  coefs = {}
  for layer, sublayers in enumerate(spec.pattern):
    if sublayers:
      tree = layer_params(spec, params, layer, tuple(ROUTER_PARAMS[s] for s in sublayers))
      coefs[layer] = {s: np.asarray(coef_of(tree[ROUTER_PARAMS[s]])) for s in sublayers}
  return coefs


def merge_experts(spec: ModelSpec, params: Any, conditions: tuple[Condition, ...]) -> tuple[ModelSpec, Any]:
  """(spec, parameters) of the model for some conditions; unchanged if there is nothing to merge.

  conditions: of all segments that it will encode, and of its prompts. Parameters may be traced.
  """
  if spec.router == routers.DENSE or spec.kernels or routers.routes_tokens(spec.router):
    return spec, params
  inputs = routers.distinct_inputs(spec.router, conditions)
  kernels = tuple((router_input, i) for i, router_input in enumerate(inputs))
  new = dataclasses.replace(spec, num_experts=len(inputs), router_names=(), kernels=kernels)
  return new, merge_params(spec, params, inputs)


def merge_params(spec: ModelSpec, params: Any, inputs: tuple[routers.RouterInput, ...]) -> Any:
  """Parameters without routers, with one kernel per router input, of `spec.dtype`, instead of E experts."""
  coef_of = lambda values: router_of(spec).apply({'params': values}, inputs, None).coef
  types = {'kernel': spec.dtype, 'bias': jnp.float32}

  def block(tree, sublayers, over):
    coef = {s: over(coef_of)(tree[ROUTER_PARAMS[s]]) for s in sublayers}
    merged = {}
    for name, sub in tree.items():
      sublayer = PROJECTIONS.get(name)
      if sublayer in sublayers:
        merged[name] = {leaf: over(layers.merge)(x, coef[sublayer]).astype(types[leaf]) for leaf, x in sub.items()}
      elif name not in ROUTER_PARAMS.values():
        merged[name] = sub
    return merged

  stack, encoder = spec.stack, dict(params['encoder'])
  for subtree, pattern, over in (('blocks', stack.period, jax.vmap), ('tail', stack.tail, lambda f: f)):
    if subtree in encoder:
      encoder[subtree] = {
          f'block{j}': block(encoder[subtree][f'block{j}'], sublayers, over) for j, sublayers in enumerate(pattern)}
  return {**params, 'encoder': encoder}
