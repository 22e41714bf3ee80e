"""Reparameterisation: the experts of a trained model merged for good, so that no router and no expert is left.

A router that looks at conditions alone decides the same for every input of a condition, and experts are linear: their kernels
can be added once and for all (Uni-Perceiver-MoE, section 3.4). Where every condition that is asked for has the same
coefficients in every router, what is left is a dense model, parameter for parameter. Otherwise each projection holds one kernel
per distinct row of coefficients, and `ModelSpec.kernels` says which of them a condition takes.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from uni_moe_jax.model import merging, router_outputs
from uni_moe_jax.model.spec import ModelSpec, Stack
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
  params = jax.device_get(params)
  rows = routers.distinct_inputs(spec.router, conditions)
  found = router_outputs.coefficients(spec, params, rows)
  kernel, chosen = _groups(found, len(rows))
  if len(chosen) == 1:
    new = dataclasses.replace(spec, router=routers.DENSE, router_names=(), kernels=())
  else:
    new = dataclasses.replace(spec, num_experts=len(chosen), router_names=(), kernels=tuple(zip(rows, kernel)))
  layers = [_layer(router_outputs.layer_params(spec, params, i), found.get(i, {}), chosen) for i in range(spec.num_layers)]
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


def _layer(tree: Any, coefficients: dict[str, np.ndarray], chosen: list[int]) -> Any:
  """A layer's parameters without its routers, and with merged kernels and biases."""
  def mix(part, kernels):
    found = np.tensordot(coefficients[part][chosen], kernels, axes=1)
    return found if len(chosen) > 1 else found[0]
  return merging.merged_block(tree, tuple(coefficients), mix)


def _stacked(layers: list[Any], stack: Stack) -> Any:
  """Layers as a model's encoder holds them. A dense model's periods are shorter than those of experts in every other layer."""
  found: dict[str, dict[str, list[Any]]] = {}
  for i, layer in enumerate(layers):
    subtree, _, block = stack.locate(i)
    found.setdefault(subtree, {}).setdefault(block, []).append(layer)
  stack_up = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
  return {subtree: {block: stack_up(trees) if subtree == 'blocks' else trees[0] for block, trees in blocks.items()}
          for subtree, blocks in found.items()}
