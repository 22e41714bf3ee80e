"""Attention of random arrays, with its gradients."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import small_model

NUM_HEADS, HEAD_DIM = 2, 8


def arrays(queries: int, keys: int, dtype: Any = jnp.float32, batch: int = 2) -> tuple[jax.Array, ...]:
  """q, k, v and the cotangent of the output."""
  rng = np.random.default_rng(0)
  shapes = ((batch, n, NUM_HEADS, HEAD_DIM) for n in (queries, keys, keys, queries))
  return tuple(jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes)


@functools.cache
def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
  """(*operands, cotangent, mask) → f32 output and gradients of `function(*operands, mask)`."""
  @small_model.jit
  def run(*args):
    *operands, dy, mask = args
    out, backward = jax.vjp(lambda *xs: function(*xs, mask), *operands)
    assert out.dtype == operands[0].dtype
    return jax.tree.map(lambda x: x.astype(jnp.float32), (out, *backward(dy)))
  return run
