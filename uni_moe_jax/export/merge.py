"""Reparameterisation: the experts of a trained model merged for good, so that no router and no expert is left.

A router that looks at conditions alone decides the same for every input of a condition, and experts are linear: their kernels
can be added once and for all (Uni-Perceiver-MoE, section 3.4). Where every condition that is asked for has the same
coefficients in every router, what is left is a dense model, parameter for parameter. Otherwise each projection holds one kernel
per distinct row of coefficients, and `ModelSpec.kernels` says which of them a condition takes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.model import merging, router_outputs
from uni_moe_jax.model.spec import PROJECTIONS, ModelSpec, Stack
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.errors import UsageError


def merged(spec: ModelSpec, params: Any, conditions: tuple[Condition, ...]) -> tuple[ModelSpec, Any]:
  """(spec, parameters f32 on the host) of the model that is left for some conditions.

  Args:
    spec, params: of a trained model.
    conditions: of every array that the merged model will be given.

  Raises:
    UsageError: its router looks at tokens, so that its kernels cannot be merged, or there is no condition.
  """
  if routers.routes_tokens(spec.router):
    raise UsageError(f'a model with config.moe.router={spec.router!r} cannot be merged: every token has experts of its own. '
                     'It is exported with its router.')
  if not conditions:
    raise UsageError('a model is merged for conditions; name at least one task.')
  inputs = routers.distinct_inputs(spec.router, conditions)
  kernel, chosen = _groups(router_outputs.coefficients(spec, params, inputs), len(inputs))
  float32 = dataclasses.replace(spec, dtype=jnp.float32)
  with jax.default_matmul_precision('highest'):
    params = jax.device_get(merging.merge_params(float32, params, tuple(inputs[i] for i in chosen)))
  if len(chosen) > 1:
    return dataclasses.replace(spec, num_experts=len(chosen), router_names=(), kernels=tuple(zip(inputs, kernel))), params
  new = dataclasses.replace(spec, router=routers.DENSE, router_names=(), kernels=())
  layers = [_dense(router_outputs.layer_params(spec, params, i), sublayers) for i, sublayers in enumerate(spec.pattern)]
  return new, {**params, 'encoder': _stacked(layers, new.stack)}


def _groups(found: dict[int, dict[str, np.ndarray]], rows: int) -> tuple[list[int], list[int]]:
  """(kernel of every row, the row that stands for each kernel): rows whose coefficients coincide share one.

  They must coincide in every router: layers are stacked, so that all of them hold equally many kernels.
  """
  numbers: dict[bytes, int] = {}
  kernel, chosen = [], []
  for row in range(rows):
    key = b''.join(coef[row].tobytes() for parts in found.values() for coef in parts.values())
    if key not in numbers:
      numbers[key] = len(numbers)
      chosen.append(row)
    kernel.append(numbers[key])
  return kernel, chosen


def _dense(tree: Any, sublayers: tuple[str, ...]) -> Any:
  """A layer's parameters without the axis of the only kernel."""
  return {name: jax.tree.map(lambda x: x[0], sub) if PROJECTIONS.get(name) in sublayers else sub for name, sub in tree.items()}


def _stacked(layers: list[Any], stack: Stack) -> Any:
  """Layers as a model's encoder holds them. A dense model's periods are shorter than those of experts in every other layer."""
  found: dict[str, dict[str, list[Any]]] = {}
  for i, layer in enumerate(layers):
    subtree, _, block = stack.locate(i)
    found.setdefault(subtree, {}).setdefault(block, []).append(layer)
  stack_up = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
  return {subtree: {block: stack_up(trees) if subtree == 'blocks' else trees[0] for block, trees in blocks.items()}
          for subtree, blocks in found.items()}
