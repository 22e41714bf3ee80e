"""Grouped matrix products behind one door: rows that are sorted by expert, each times its expert's kernel.

What is fast differs: with a capacity equal groups, as one batched product; without, on CPU a loop over tiles, each of one
expert, on GPU a kernel of our own (`grouped_triton.py`: XLA's `ragged_dot` is a dense product there, E times as much work). On TPU the
megablox kernel that JAX ships serves both. All of them compute the same.
"""

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

from uni_moe_jax.moe import gmm_triton, pallas_kernels
from uni_moe_jax.utils.errors import UsageError

BACKENDS = ('tiled', 'batched', 'ragged', 'megablox', 'triton')
AUTO, XLA = 'auto', 'xla'
_TILES = 128, 64, 32  # rows of a product on CPU
_MEGABLOX_ROWS = 128


def choose_backend(backend: str, capacity: bool, platform: str | None = None) -> str:
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
  return 'batched' if capacity else {'cpu': 'tiled'}.get(platform, 'ragged')


def num_rows(backend: str, most: int) -> int:
  """How many rows a backend wants, of which at most `most` are in groups: a loop's last tile reaches beyond its group's rows, and
  megablox takes whole tiles. ('batched' has rows of its own.)"""
  if backend == 'tiled':
    return most + _TILES[0] - 1
  return most + -most % _MEGABLOX_ROWS if backend == 'megablox' else most


def grouped_matmul(x: jax.Array, kernel: jax.Array, sizes: jax.Array, backend: str) -> jax.Array:
  """Multiplies each row by the kernel of its group.

  Args:
    x: [G, D]. Groups follow each other, the first `sizes[0]` rows being of group 0, and so on. For 'batched' groups are equal:
      group e is rows e · G/E to (e + 1) · G/E, of which the first `sizes[e]` count.
    kernel: [E, D, F].
    sizes: int32 [E], rows of every group; G is `num_rows(backend, most)`, and Σ at most `most`.
    backend: one of `BACKENDS`.

  Returns:
    [G, F]. Rows that are in no group hold anything, NaN included; what they are given as a gradient must be 0.
  """
  chex.assert_rank((x, kernel, sizes), (2, 3, 1))
  if backend == 'tiled':
    return _loop(x, kernel, sizes)
  if backend == 'batched':
    rows = x.reshape(kernel.shape[0], -1, x.shape[1])
    return jnp.einsum('ecd,edf->ecf', rows, kernel).reshape(x.shape[0], -1)
  if backend == 'ragged':
    return jax.lax.ragged_dot(x, kernel, sizes)
  if backend == 'megablox':
    tiling = (_MEGABLOX_ROWS, 128, 128)
    run = lambda *operands, interpret: gmm(*operands, x.dtype, tiling, None, None, False, interpret)
    return pallas_kernels.compiled_on(('tpu',), run, x, kernel, sizes)
  if backend == 'triton':
    return gmm_triton.grouped_matmul(x, kernel, sizes)
  raise UsageError(f'backend {backend!r} is not one of {", ".join(BACKENDS)}.')


def _tile(rows: int, groups: int) -> int:
  """Rows of a product on CPU: at most as many as a group has on average, as half of a group's last product is computed for nothing;
  small ones read the kernel more often."""
  try:
    return next((tile for tile in _TILES if tile * groups <= rows), _TILES[-1])
  except jax.errors.InconclusiveDimensionOperation:  # a program that is exported for any batch
    return _TILES[0]


def _products(x: jax.Array, kernel: jax.Array, sizes: jax.Array, contract: int) -> jax.Array:
  """x [G, ·] times kernel [E, …], contracted over axis `contract` (0 or 1) of a group's kernel, tile by tile."""
  end, rows = jnp.cumsum(sizes), _tile(x.shape[0], kernel.shape[0])

  def group(e, out):
    w = jax.lax.dynamic_index_in_dim(kernel, e, keepdims=False)

    def tile(state):
      row, out = state
      y = jax.lax.dot_general(jax.lax.dynamic_slice_in_dim(x, row, rows), w, (((1,), (contract,)), ((), ())))
      # A tile may reach into the next group's rows: that group's own tiles overwrite them.
      return row + rows, jax.lax.dynamic_update_slice_in_dim(out, y, row, axis=0)
    return jax.lax.while_loop(lambda state: state[0] < end[e], tile, (end[e] - sizes[e], out))[1]

  return jax.lax.fori_loop(0, kernel.shape[0], group, jnp.zeros((x.shape[0], kernel.shape[2 - contract]), x.dtype))


@jax.custom_vjp
def _loop(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  return _products(x, kernel, sizes, 0)


def _loop_forward(x, kernel, sizes):
  return _loop(x, kernel, sizes), (x, kernel, sizes)


def _loop_backward(saved, dy):
  """dx by the transposed kernels; the gradient of a group's kernel is the sum over its tiles of x^T dy."""
  x, kernel, sizes = saved
  end, rows = jnp.cumsum(sizes), _tile(x.shape[0], kernel.shape[0])

  def group(e, kernels):
    def tile(state):
      row, dw = state
      mine = (row + jnp.arange(rows) < end[e])[:, None]  # not the rows of the next group
      to = jnp.where(mine, jax.lax.dynamic_slice_in_dim(dy, row, rows), 0)
      return row + rows, dw + jax.lax.dot_general(
          jax.lax.dynamic_slice_in_dim(x, row, rows), to, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    zero = jnp.zeros(kernel.shape[1:], jnp.float32)
    dw = jax.lax.while_loop(lambda state: state[0] < end[e], tile, (end[e] - sizes[e], zero))[1]
    return jax.lax.dynamic_update_index_in_dim(kernels, dw.astype(kernel.dtype), e, 0)

  dkernel = jax.lax.fori_loop(0, kernel.shape[0], group, jnp.zeros_like(kernel))
  return _products(dy, kernel, sizes, 1), dkernel, None


_loop.defvjp(_loop_forward, _loop_backward)
