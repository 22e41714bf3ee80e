"""Coefficients of condition routers, and the model that results when its experts are merged by them.

A condition router routes all segments of a condition by the same coefficients, and experts are linear, so their kernels
can be added in advance (Uni-Perceiver-MoE, section 3.4). Decoding merges once per model, so that its loop merges no
kernels; export/merge.py merges for good.
"""

import dataclasses
import functools
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


def coefficients(
    spec: ModelSpec, params: Any, inputs: tuple[routers.RouterInput, ...]) -> dict[int, dict[str, np.ndarray]]:
  """{layer: {sublayer: f32 [A, E]}} of every condition router for A inputs, without noise; {} if there is none."""
  if routers.routes_tokens(spec.router):
    return {}
  coef_of = jax.jit(lambda values: routers.ConditionRouter(spec).apply({'params': values}, inputs, None).coef)
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
  """Parameters without routers, with one kernel per router input, of `spec.dtype`, instead of E experts.

  Other parameters are the same arrays, not copies.
  """
  def block(tree, sublayers, stacked):
    of_experts = {n: x for n, x in tree.items() if PROJECTIONS.get(n) in sublayers or n in ROUTER_PARAMS.values()}
    return {**{n: x for n, x in tree.items() if n not in of_experts},
            **_merge_block(spec, sublayers, inputs, stacked, of_experts)}

  stack, encoder = spec.stack, dict(params['encoder'])
  for subtree, pattern in (('blocks', stack.period), ('tail', stack.tail)):
    if subtree in encoder:
      encoder[subtree] = {f'block{j}': block(encoder[subtree][f'block{j}'], sublayers, subtree == 'blocks')
                          for j, sublayers in enumerate(pattern)}
  return {**params, 'encoder': encoder}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _merge_block(
    spec: ModelSpec, sublayers: tuple[str, ...], inputs: tuple[routers.RouterInput, ...], stacked: bool, tree: Any,
) -> Any:
  """The merged projections of a block with experts; stacked: of all periods."""
  over, types = jax.vmap if stacked else (lambda f: f), {'kernel': spec.dtype, 'bias': jnp.float32}
  coef_of = over(lambda values: routers.ConditionRouter(spec).apply({'params': values}, inputs, None).coef)
  coef = {s: coef_of(tree[ROUTER_PARAMS[s]]) for s in sublayers}
  return {
      name: {leaf: over(layers.merge)(x, coef[PROJECTIONS[name]]).astype(types[leaf]) for leaf, x in sub.items()}
      for name, sub in tree.items() if name in PROJECTIONS}
