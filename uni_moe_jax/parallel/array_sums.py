"""A number per array by which a changed bit is detected, whatever devices hold the array.

The digests of objects in a bucket say nothing of bits that change on the way there or back. These sums are of the
arrays before they are written and after they are read.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from uni_moe_jax.utils.tree_paths import by_path

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # bytes per number → type of its bits


@jax.jit
def array_sums(tree: Any) -> dict[str, jax.Array]:
  """{path: u32 []}: the bits of each array, as integers times odd weights by position, summed modulo 2**32.

  One changed bit changes the sum: an odd number times a power of two below 2**32 is not 0 modulo 2**32. The order of
  the sum does not matter, so that every mesh and every number of processes gives the same.
  """
  return {path: _sum(x) for path, x in by_path(tree).items()}


def _sum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
  weights = jnp.ones(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):  # without a reshape, which would gather an array that is split over devices
    stride = 2 * math.prod(bits.shape[axis + 1:]) % 2**32
    weights += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
  return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)
