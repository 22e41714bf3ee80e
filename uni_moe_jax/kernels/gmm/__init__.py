"""Grouped matmul: rows sorted by expert, each times its expert's kernel.

With a capacity, groups are equal and one batched product is fastest. Without one, it is a kernel of our own on GPUs
(`triton.py`, from Ampere on: XLA's `ragged_dot` is a dense product there, E times as much work), and the megablox
kernel of JAX on TPU. On CPU a loop over tiles gathers and sums tokens itself, see `tiled.py`. All backends compute
the same. A program that is exported for several platforms has one product for CPUs and one for others, see `PORTABLE`.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.sharding import Mesh

from uni_moe_jax.kernels.gmm import tiled as gmm_tiled
from uni_moe_jax.kernels.gmm import triton as gmm_triton
from uni_moe_jax.parallel import sharding
from uni_moe_jax.utils.errors import UsageError

AUTO, XLA = 'auto', 'xla'
DEVICES = {'megablox': 'tpu', 'triton': 'gpu'}  # kernel → type of device; elsewhere it is interpreted
# Of exported programs: 'tiled' on CPU, `in_rounds` elsewhere. No kernel is part of it: those of Triton and megablox are
# not stable in a serialized program, and `ragged_dot` has no symbolic number of rows.
PORTABLE = 'portable'
# Of programs for ONNX: each expert's product for every token, which is E / K times as much work in plain operations.
EVERY_EXPERT = 'every_expert'
_BACKENDS = 'batched', 'ragged', 'megablox', 'triton', 'tokamax', PORTABLE  # of `grouped_matmul`
_TPU_ROWS = 128  # of a tile
_TPU_SUBLANES = 16  # of a register: rows of bfloat16


def choose(backend: str, capacity: bool, mesh: Mesh | None) -> str:
  """Resolves 'auto' to the fastest backend, and 'xla' to the fastest without custom kernels.

  Args:
    capacity: whether groups are bounded. Without a bound, each of the equal groups would need slots for every token.
    mesh: of the arrays; None: one device of this process.
  """
  if backend not in (AUTO, XLA):
    return backend
  if capacity:
    return 'batched'
  kernels = {device: kernel for kernel, device in DEVICES.items()} if backend == AUTO else {}
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  if (sharding.compute_capability(device) or sharding.AMPERE) < sharding.AMPERE:
    kernels.pop('gpu', None)
  return {'cpu': 'tiled', **kernels}.get(device.platform, 'ragged')


def by_backend(
    backend: str, tiled: Callable[..., jax.Array], grouped: Callable[..., jax.Array], *operands: Any) -> jax.Array:
  """tiled(*operands) where tokens are gathered tile by tile, else grouped(*operands); a `PORTABLE` program has both."""
  if backend == PORTABLE:
    return jax.lax.platform_dependent(*operands, cpu=tiled, default=grouped)
  return (tiled if backend == 'tiled' else grouped)(*operands)


def num_rows(backend: str, most: int) -> int:
  """Number of rows that a backend other than 'batched' needs, for at most `most` rows in groups.

  The last tile of 'tiled' reaches beyond its group, and kernels for TPUs take whole tiles.
  """
  if backend in ('tiled', PORTABLE):
    return most + gmm_tiled.BEHIND
  return most + -most % _TPU_ROWS if backend in ('megablox', 'tokamax') else most


def group_rows(capacity: int) -> int:
  """Number of rows of each group of 'batched': groups begin with a register, or a TPU would copy them apart."""
  return capacity + -capacity % _TPU_SUBLANES


def reference(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  """`grouped_matmul` as XLA does it."""
  return jax.lax.ragged_dot(x, kernel, sizes)


def grouped_matmul(x: jax.Array, kernel: jax.Array, sizes: jax.Array, backend: str) -> jax.Array:
  """Multiplies each row by the kernel of its group.

  Args:
    x: [G, D]. Groups follow each other, the first `sizes[0]` rows being of group 0, and so on. For 'batched' groups are
      equal: group e is rows e · G/E to (e + 1) · G/E, of which the first `sizes[e]` count.
    kernel: [E, D, F].
    sizes: int32 [E], rows of every group; G is `num_rows(backend, most)`, and Σ at most `most`.
    backend: a value of `config.moe.gmm` other than 'tiled'.

  Returns:
    [G, F]. Rows outside all groups have arbitrary values, NaN included; their incoming gradient must be 0.
  """
  chex.assert_rank((x, kernel, sizes), (2, 3, 1))
  if backend == 'batched':
    rows = x.reshape(kernel.shape[0], -1, x.shape[1])
    return jnp.einsum('ecd,edf->ecf', rows, kernel).reshape(x.shape[0], -1)
  if backend == 'ragged':
    return reference(x, kernel, sizes)
  if backend == 'megablox':
    tiling = (_TPU_ROWS, 128, 128)
    run = lambda *operands, interpret: gmm(*operands, x.dtype, tiling, None, None, False, interpret)
    return gmm_triton.compiled_on(('tpu',), run, x, kernel, sizes)
  if backend == 'triton':
    return gmm_triton.grouped_matmul(x, kernel, sizes)
  if backend == 'tokamax':
    return _tokamax(x, kernel, sizes)
  if backend == PORTABLE:
    return in_rounds(x, kernel, sizes)
  raise UsageError(f'backend {backend!r} is not one of {", ".join(_BACKENDS)}.')


def _tokamax(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  """`grouped_matmul` by the kernel that the package tokamax has for the default device; without one, by XLA."""
  try:
    import tokamax  # of an extra, and it takes seconds
  except ModuleNotFoundError as e:
    raise UsageError(f"moe.gmm='tokamax' needs {e.name}; run: pip install 'uni-moe-jax[tokamax]', or set moe.gmm="
                     "'auto'.") from e
  return tokamax.ragged_dot(x, kernel, sizes, preferred_element_type=x.dtype)


def in_rounds(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  """`grouped_matmul` by batched products, each of the next 2 ⌈G / E⌉ rows of every group; G may be symbolic.

  So one round is enough where no group has more than twice the mean, and no row is ever dropped. It has no gradient.
  """
  E, D, F = kernel.shape
  rows = 2 * -(-x.shape[0] // E)
  end = jnp.cumsum(sizes)
  start = end - sizes

  def step(state):
    number, y = state
    row = (start + number * rows)[:, None] + jnp.arange(rows)[None]
    own = row < end[:, None]
    products = jnp.einsum('ecd,edf->ecf', x.at[row].get(mode='clip'), kernel)
    target = jnp.where(own, row, x.shape[0]).reshape(-1)
    return number + 1, y.at[target].set(products.reshape(-1, F), mode='drop')

  more = lambda state: (state[0] * rows < sizes).any()
  return jax.lax.while_loop(more, step, (jnp.int32(0), jnp.zeros((x.shape[0], F), x.dtype)))[1]
