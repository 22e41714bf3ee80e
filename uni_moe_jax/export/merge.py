"""Reparameterization: merges the experts of a trained model permanently, which removes routers and experts.

See `model/merging.py` for why this is possible. If every exported condition has the same coefficients in every
router, the result is a dense model, parameter for parameter. Otherwise each projection has one kernel per distinct
vector of coefficients, and `ModelSpec.kernels` maps conditions to kernels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from uni_moe_jax.model import merging
from uni_moe_jax.model.spec import PROJECTIONS, ModelSpec, Stack
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.errors import UsageError


def merged(spec: ModelSpec, params: Any, conditions: tuple[Condition, ...]) -> tuple[ModelSpec, Any]:
  """Returns (spec, f32 parameters on the host) of the model merged for some conditions.

  conditions: of every array that the merged model will be given.

  Raises:
    UsageError: the router is by token, so its kernels cannot be merged, or there is no condition.
  """
  if routers.routes_tokens(spec.router):
    raise UsageError(f'a model with config.moe.router={spec.router!r} cannot be merged: it selects experts per token. '
                     'Export it with its router.')
  if not conditions:
    raise UsageError('merging needs at least one condition; choose at least one task.')
  inputs = routers.distinct_inputs(spec.router, conditions)
  kernel, chosen = _group(merging.coefficients(spec, params, inputs), len(inputs))
  float32 = dataclasses.replace(spec, dtype=jnp.float32)
  params = jax.device_get(merging.merge_params(float32, params, tuple(inputs[i] for i in chosen)))
  if len(chosen) > 1:
    kernels = tuple(zip(inputs, kernel))
    return dataclasses.replace(spec, num_experts=len(chosen), router_names=(), kernels=kernels), params
  new = dataclasses.replace(spec, router=routers.DENSE, router_names=(), kernels=())
  return new, {**params, 'encoder': _dense_encoder(spec, params, new.stack)}


def _group(coefficients: dict[int, dict[str, np.ndarray]], num_conditions: int) -> tuple[list[int], list[int]]:
  """(kernel of every condition, first condition of every kernel): conditions with equal coefficients share a kernel.

  They must be equal in every router: layers are stacked, so all of them have the same number of kernels.
  """
  keys = [b''.join(coef[i].tobytes() for sublayers in coefficients.values() for coef in sublayers.values())
          for i in range(num_conditions)]
  distinct = list(dict.fromkeys(keys))
  return [distinct.index(key) for key in keys], [keys.index(key) for key in distinct]


def _dense_encoder(spec: ModelSpec, params: Any, stack: Stack) -> Any:
  """Layers without the axis of their only kernel, stacked anew.

  A dense model has shorter periods than one with experts in every other layer.
  """
  blocks: dict[tuple[str, str], list[Any]] = {}
  for i, sublayers in enumerate(spec.pattern):
    subtree, _, block = stack.locate(i)
    layer = {name: jax.tree.map(lambda x: x[0], sub) if PROJECTIONS.get(name) in sublayers else sub
             for name, sub in merging.layer_params(spec, params, i).items()}
    blocks.setdefault((subtree, block), []).append(layer)
  return traverse_util.unflatten_dict({
      path: jax.tree.map(lambda *x: np.stack(x), *layers) if path[0] == 'blocks' else layers[0]
      for path, layers in blocks.items()})
