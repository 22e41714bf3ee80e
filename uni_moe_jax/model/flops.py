"""FLOPs of the matrix products that a function computes, counted where it is traced.

Multiply and add count as two; everything else is left out. XLA's own count takes the body of a scan once.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

TRAIN = 3  # forward passes per training step: the backward pass has two products per product


def count(function: Callable[..., Any], *arguments: Any) -> int:
  """FLOPs of a call; arguments may be shapes. A kernel counts as it declares, or else by its blocks."""
  return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
  return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(e: Any) -> int:
  name, p = e.primitive.name, e.params
  if name in ('dot_general', 'ragged_dot_general'):
    numbers = p.get('dimension_numbers') or p['ragged_dot_dimension_numbers'].dot_dimension_numbers
    return 2 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[i] for i in numbers[0][0])
  if name == 'conv_general_dilated':
    kernel, out = e.invars[1].aval, p['dimension_numbers'].rhs_spec[0]
    return 2 * math.prod(e.outvars[0].aval.shape) * kernel.size // kernel.shape[out]
  if name == 'pallas_call' and p.get('cost_estimate'):
    return p['cost_estimate'].flops
  inner = list(map(_of_jaxpr, _inner(p)))
  if name == 'cond':
    return max(inner)
  times = {'scan': lambda: p['length'], 'shard_map': lambda: p['mesh'].size,
           'pallas_call': lambda: math.prod(p['grid_mapping'].grid)}
  return sum(inner) * times.get(name, lambda: 1)()


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  """The traced functions among the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(item := getattr(item, 'jaxpr', item), 'eqns'):
        yield item
