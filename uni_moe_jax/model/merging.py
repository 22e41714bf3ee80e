"""The model that is left for some conditions, made inside a program: a loop that runs it merges no kernels in its passes.

A router that looks at conditions alone decides the same in every pass (Uni-Perceiver-MoE, section 3.4). export/merge.py makes such a
model for good.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from uni_moe_jax.model import router_outputs
from uni_moe_jax.model.spec import PROJECTIONS, ROUTER_PARAMS, ModelSpec
from uni_moe_jax.moe import layers, routers
from uni_moe_jax.tasks.attributes import Condition


def for_conditions(spec: ModelSpec, params: Any, conditions: tuple[Condition, ...]) -> tuple[ModelSpec, Any]:
  """(spec, parameters) of the model for arrays of these conditions; those given, where nothing is left to merge.

  Args:
    spec, params: of a model; parameters may be traced.
    conditions: of every array that it will be given, and of its prompts.
  """
  if spec.router == routers.DENSE or spec.kernels or routers.routes_tokens(spec.router):
    return spec, params
  rows = routers.distinct_inputs(spec.router, conditions)
  decide = lambda values: router_outputs.router_of(spec).apply({'params': values}, rows, None).coef
  merge = lambda kernels, coef: layers.merge(kernels, coef).astype(spec.dtype)

  def block(tree, parts, over):
    coef = {p: over(decide)(tree[ROUTER_PARAMS[p]]) for p in parts}
    return merged_block(tree, parts, lambda part, kernels: over(merge)(kernels, coef[part]))

  stack, encoder = spec.stack, dict(params['encoder'])
  for subtree, pattern, over in (('blocks', stack.period, jax.vmap), ('tail', stack.tail, lambda f: f)):
    if subtree in encoder:
      encoder[subtree] = {f'block{j}': block(encoder[subtree][f'block{j}'], parts, over) for j, parts in enumerate(pattern)}
  new = dataclasses.replace(spec, num_experts=len(rows), router_names=(), kernels=tuple((row, i) for i, row in enumerate(rows)))
  return new, {**params, 'encoder': encoder}


def merged_block(tree: Any, parts: tuple[str, ...], merge: Callable[[str, Any], Any]) -> Any:
  """Parameters of a block without its routers; merge: (part, kernels or biases of experts) → those of the model that is left."""
  out = {}
  for name, sub in tree.items():
    part = PROJECTIONS.get(name)
    if part in parts:
      out[name] = jax.tree.map(lambda kernels, part=part: merge(part, kernels), sub)
    elif not name.endswith('_router'):
      out[name] = sub
  return out
