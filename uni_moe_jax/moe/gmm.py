"""Grouped matmul: rows sorted by expert, each times its expert's kernel.

With a capacity, groups are equal and one batched product is fastest. Without one, it is a loop over tiles of one expert
each on CPU, and a kernel of our own on GPU (`gmm_triton.py`: XLA's `ragged_dot` is a dense product there, E times as
much work). On TPU the megablox kernel of JAX serves both. All backends compute the same.
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
  """Resolves 'auto' to the fastest backend, and 'xla' to the fastest without custom kernels.

  Args:
    capacity: whether groups are bounded. Without a bound, each of the equal groups would need slots for every token.
    platform: 'cpu', 'gpu' or 'tpu'; by default that of the first device.
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
  """Number of rows that a backend other than 'batched' needs, for at most `most` rows in groups.

  The last tile of 'tiled' reaches beyond its group, and megablox takes whole tiles.
  """
  if backend == 'tiled':
    return most + _TILES[0] - 1
  return most + -most % _MEGABLOX_ROWS if backend == 'megablox' else most


def grouped_matmul(x: jax.Array, kernel: jax.Array, sizes: jax.Array, backend: str) -> jax.Array:
  """Multiplies each row by the kernel of its group.

  Args:
    x: [G, D]. Groups follow each other, the first `sizes[0]` rows being of group 0, and so on. For 'batched' groups are
      equal: group e is rows e · G/E to (e + 1) · G/E, of which the first `sizes[e]` count.
    kernel: [E, D, F].
    sizes: int32 [E], rows of every group; G is `num_rows(backend, most)`, and Σ at most `most`.
    backend: one of `BACKENDS`.

  Returns:
    [G, F]. Rows outside all groups have arbitrary values, NaN included; their incoming gradient must be 0.
  """
  chex.assert_rank((x, kernel, sizes), (2, 3, 1))
  if backend == 'tiled':
    return _tiled(x, kernel, sizes)
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
  """Rows of a product on CPU, at most as many as a group has on average: half of its last product is wasted."""
  try:
    return next((tile for tile in _TILES if tile * groups <= rows), _TILES[-1])
  except jax.errors.InconclusiveDimensionOperation:  # an exported program with a symbolic batch
    return _TILES[0]


def _products(x: jax.Array, kernel: jax.Array, sizes: jax.Array, contract: int) -> jax.Array:
  """x [G, ·] times kernel [E, …], contracted over axis 0 or 1 of a group's kernel, tile by tile."""
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
def _tiled(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  return _products(x, kernel, sizes, 0)


def _tiled_backward(saved, dy):
  """dx by the transposed kernels; the gradient of a group's kernel is the sum over its tiles of x^T dy."""
  x, kernel, sizes = saved
  end, rows = jnp.cumsum(sizes), _tile(x.shape[0], kernel.shape[0])

  def group(e, kernels):
    def tile(state):
      row, dw = state
      in_group = (row + jnp.arange(rows) < end[e])[:, None]
      dy_tile = jnp.where(in_group, jax.lax.dynamic_slice_in_dim(dy, row, rows), 0)
      x_tile = jax.lax.dynamic_slice_in_dim(x, row, rows)
      return row + rows, dw + jnp.tensordot(x_tile, dy_tile, (0, 0), preferred_element_type=jnp.float32)
    zero = jnp.zeros(kernel.shape[1:], jnp.float32)
    dw = jax.lax.while_loop(lambda state: state[0] < end[e], tile, (end[e] - sizes[e], zero))[1]
    return jax.lax.dynamic_update_index_in_dim(kernels, dw.astype(kernel.dtype), e, 0)

  dkernel = jax.lax.fori_loop(0, kernel.shape[0], group, jnp.zeros_like(kernel))
  return _products(dy, kernel, sizes, 1), dkernel, None


_tiled.defvjp(lambda *operands: (_tiled(*operands), operands), _tiled_backward)
