"""Grouped matrix products behind one door: rows that are sorted by expert, each times its expert's kernel.

What is fast differs: with a capacity equal groups, as one batched product; without, on CPU a loop over tiles, each of one
expert, on GPU a kernel of our own (`grouped_triton.py`: XLA's `ragged_dot` is a dense product there, E times as much work). On TPU the
megablox kernel that JAX ships serves both. All of them compute the same.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

from uni_moe_jax.moe import grouped_triton, kernels

BACKENDS = ('loop', 'buffers', 'ragged', 'megablox', 'triton')
AUTO, XLA = 'auto', 'xla'
# Of a product on CPU: its rows, and how many of them must be a group's. Of the others it computes for nothing; but a small product reads
# its kernel for few rows.
_TILES = (512, 385), (128, 65), (32, 1)
_MEGABLOX_ROWS = 128


def choose(backend: str, capacity: bool, platform: str | None = None) -> str:
  """The backend that 'auto' means, or 'xla': the same without a kernel that is compiled on its device alone. Others mean
  themselves.

  Args:
    backend: one of `BACKENDS`, 'auto' or 'xla'.
    capacity: whether groups are bounded. Without a bound, equal groups would have room for every token.
    platform: that computes, 'cpu', 'gpu' or 'tpu'; by default that of the first device.
  """
  if backend not in (AUTO, XLA):
    return backend
  platform = platform or jax.default_backend()
  if backend == AUTO and platform == 'tpu':
    return 'megablox'
  if backend == AUTO and platform == 'gpu' and not capacity:
    return 'triton'
  return 'buffers' if capacity else {'cpu': 'loop'}.get(platform, 'ragged')


def rows_for(backend: str, most: int) -> int:
  """How many rows a backend wants, of which at most `most` are in groups: a loop's last tile reaches beyond its group's rows, and
  megablox takes whole tiles. ('buffers' has rows of its own.)"""
  if backend == 'loop':
    return most + max(rows - least for rows, least in _TILES)
  return most + -most % _MEGABLOX_ROWS if backend == 'megablox' else most


def grouped_matmul(x: jax.Array, kernel: jax.Array, sizes: jax.Array, backend: str) -> jax.Array:
  """Multiplies each row by the kernel of its group.

  Args:
    x: [G, D]. Groups follow each other, the first `sizes[0]` rows being of group 0, and so on. For 'buffers' groups are equal:
      group e is rows e · G/E to (e + 1) · G/E, of which the first `sizes[e]` count.
    kernel: [E, D, F].
    sizes: int32 [E], rows of every group; G is `rows_for(backend, most)`, and Σ at most `most`.
    backend: one of `BACKENDS`.

  Returns:
    [G, F]. Rows that are in no group hold anything, NaN included; what they are given as a gradient must be 0.
  """
  chex.assert_rank((x, kernel, sizes), (2, 3, 1))
  if backend == 'loop':
    return _loop(x, kernel, sizes)
  if backend == 'buffers':
    rows = x.reshape(kernel.shape[0], -1, x.shape[1])
    return jnp.einsum('ecd,edf->ecf', rows, kernel).reshape(x.shape[0], -1)
  if backend == 'ragged':
    return jax.lax.ragged_dot(x, kernel, sizes)
  if backend == 'megablox':
    tiling = (_MEGABLOX_ROWS, 128, 128)
    run = lambda *operands, interpret: gmm(*operands, x.dtype, tiling, None, None, False, interpret)
    return kernels.compiled_on(('tpu',), run, x, kernel, sizes)
  if backend == 'triton':
    return grouped_triton.grouped_matmul(x, kernel, sizes)
  raise ValueError(f'backend {backend!r} is not one of {", ".join(BACKENDS)}.')


def _tiles(start: jax.Array, end: jax.Array, most: int, step: Callable[[jax.Array, int, Any], Any], state: Any) -> Any:
  """Runs state = step(row, rows, state) over the tiles of a group's rows, the largest first.

  Args:
    start, end: of the group. most: rows of the array.
  """
  row = start
  for rows, least in _TILES:
    if rows == _TILES[-1][0] or _surely(rows, most):
      row, state = jax.lax.while_loop(
          lambda at, least=least: at[0] + least <= end, lambda at, rows=rows: (at[0] + rows, step(at[0], rows, at[1])), (row, state))
  return state


def _surely(rows: int, most: int) -> bool:
  """Whether an array has `rows` rows; of one in a program that is exported for any batch, whether it always has."""
  try:
    return rows <= most
  except jax.errors.InconclusiveDimensionOperation:
    return False


def _products(x: jax.Array, kernel: jax.Array, sizes: jax.Array, contract: int) -> jax.Array:
  """x [G, ·] times kernel [E, …], contracted over axis `contract` (0 or 1) of a group's kernel, tile by tile."""
  end = jnp.cumsum(sizes)

  def group(e, out):
    w = jax.lax.dynamic_index_in_dim(kernel, e, keepdims=False)

    def tile(row, rows, out):
      y = jax.lax.dot_general(jax.lax.dynamic_slice_in_dim(x, row, rows), w, (((1,), (contract,)), ((), ())))
      # A tile may reach into the next group's rows: that group's own tiles overwrite them.
      return jax.lax.dynamic_update_slice_in_dim(out, y, row, axis=0)
    return _tiles(end[e] - sizes[e], end[e], x.shape[0], tile, out)

  return jax.lax.fori_loop(0, kernel.shape[0], group, jnp.zeros((x.shape[0], kernel.shape[2 - contract]), x.dtype))


@jax.custom_vjp
def _loop(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  return _products(x, kernel, sizes, 0)


def _loop_forward(x, kernel, sizes):
  return _loop(x, kernel, sizes), (x, kernel, sizes)


def _loop_backward(saved, dy):
  """dx by the transposed kernels; the gradient of a group's kernel is the sum over its tiles of x^T dy."""
  x, kernel, sizes = saved
  end = jnp.cumsum(sizes)

  def group(e, kernels):
    def tile(row, rows, dw):
      mine = (row + jnp.arange(rows) < end[e])[:, None]  # not the rows of the next group
      to = jnp.where(mine, jax.lax.dynamic_slice_in_dim(dy, row, rows), 0)
      return dw + jax.lax.dot_general(
          jax.lax.dynamic_slice_in_dim(x, row, rows), to, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    dw = _tiles(end[e] - sizes[e], end[e], x.shape[0], tile, jnp.zeros(kernel.shape[1:], jnp.float32))
    return jax.lax.dynamic_update_index_in_dim(kernels, dw.astype(kernel.dtype), e, 0)

  dkernel = jax.lax.fori_loop(0, kernel.shape[0], group, jnp.zeros_like(kernel))
  return _products(dy, kernel, sizes, 1), dkernel, None


_loop.defvjp(_loop_forward, _loop_backward)
