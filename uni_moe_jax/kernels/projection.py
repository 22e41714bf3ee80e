"""The product of a projection, as each platform computes it fastest, with gradients summed in float32.

On accelerators XLA finds the best program for the plain product. On one CPU its choice of operands matters, and some
CPUs multiply bfloat16 several times as fast as float32, if the product is written as XLA's library expects it.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.parallel import sharding

PLAIN, CPU, ROUNDED = 'plain', 'cpu', 'rounded'  # methods
CPUINFO = pathlib.Path('/proc/cpuinfo')  # of Linux
_BFLOAT16 = {'amx_bf16', 'avx512_bf16'}  # flags of Intel's Xeons since 2023 and of AMD's Zen 4


@functools.cache
def processor_flags() -> frozenset[str]:
  """Names of the instructions that this machine's processor has, as Linux writes them; empty on other systems."""
  return frozenset(CPUINFO.read_text().split()) if CPUINFO.exists() else frozenset()


def multiplies_bfloat16() -> bool:
  """Whether this machine's processor has instructions that multiply bfloat16."""
  return not _BFLOAT16.isdisjoint(processor_flags())


def choose_method(mesh: Mesh | None, cpu_bfloat16: bool) -> str:
  """How to multiply on a mesh. cpu_bfloat16: float32 operands may be rounded where that is fast, see config.train."""
  if not sharding.on_one_cpu(mesh):
    return PLAIN
  return ROUNDED if cpu_bfloat16 and multiplies_bfloat16() else CPU


def dot(x: jax.Array, kernel: jax.Array, unrounded: jax.Array | None = None, method: str = PLAIN) -> jax.Array:
  """x [B, S, *in] · kernel [*in, *out] → [B, S, *out], all of one type.

  Args:
    unrounded: the kernel's float32 values, where it was rounded. The gradient is theirs, and not rounded before it is
      summed over arrays and devices. Nothing reads their values.
    method: see `choose_method`. If ROUNDED, there is one axis in and one out.
  """
  if unrounded is not None and unrounded.dtype != kernel.dtype:
    return _dot_of_rounded(x, kernel, unrounded)
  return {PLAIN: _dot, CPU: _dot_on_cpu, ROUNDED: _dot_rounded}[method](x, kernel)


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jnp.tensordot(x, kernel, axes=(tuple(range(2, x.ndim)), tuple(range(x.ndim - 2))))


def _dx(x, kernel, dy):
  return jnp.tensordot(dy, kernel, axes=(tuple(range(2, dy.ndim)), tuple(range(x.ndim - 2, kernel.ndim))))


@jax.custom_vjp
def _dot_of_rounded(x, kernel, unrounded):
  return _dot(x, kernel)


def _dot_of_rounded_backward(saved, dy):
  x, kernel = saved
  dkernel = jnp.tensordot(x, dy, axes=((0, 1), (0, 1)), preferred_element_type=jnp.float32)
  return _dx(x, kernel, dy), jnp.zeros_like(kernel), dkernel


_dot_of_rounded.defvjp(lambda x, kernel, unrounded: (_dot(x, kernel), (x, kernel)), _dot_of_rounded_backward)


_dot_on_cpu = jax.custom_vjp(_dot)


def _dot_on_cpu_backward(saved, dy):
  """Contracts one axis for the gradient of the kernel: to contract two, examples and tokens, XLA transposes dy."""
  x, kernel = saved
  return _dx(x, kernel, dy), _of_kernel(lambda x, y: x.T @ y, x, dy).reshape(kernel.shape)


_dot_on_cpu.defvjp(lambda x, kernel: (_dot(x, kernel), (x, kernel)), _dot_on_cpu_backward)


def _of_kernel(transposed_matmul: Callable[..., jax.Array], x: jax.Array, dy: jax.Array) -> jax.Array:
  """Gradient of a kernel [in, out] by xᵀ y: the narrower side is transposed, which is up to twice as fast."""
  B, S = x.shape[:2]
  x, dy = x.reshape(B * S, -1), dy.reshape(B * S, -1)
  if x.shape[1] <= dy.shape[1]:
    return transposed_matmul(x, dy)
  # XLA would turn the transposed product into the other one.
  return jax.lax.optimization_barrier(transposed_matmul(dy, x)).T


def matmul_rounded(x: jax.Array, y: jax.Array) -> jax.Array:
  """x [..., m, k] · y [..., k, n] of operands rounded to bfloat16 → f32 [..., m, n], summed in float32."""
  return jnp.matmul(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def transposed_matmul_rounded(x: jax.Array, y: jax.Array) -> jax.Array:
  """xᵀ y of x [..., k, m] and y [..., k, n], as `matmul_rounded`. Fastest if m < n."""
  # XLA would make the transpose a part of the product, which its library then refuses. A row of ones keeps it apart.
  ones = jnp.ones((*x.shape[:-2], 1, x.shape[-2]), jnp.bfloat16)
  return matmul_rounded(jnp.concatenate([x.astype(jnp.bfloat16).mT, ones], axis=-2), y)[..., :-1, :]


@jax.custom_vjp
def _dot_rounded(x, kernel):
  return matmul_rounded(x, kernel)


def _dot_rounded_forward(x, kernel):
  """Saves the rounded operands, half of the bytes."""
  x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
  return matmul_rounded(x, kernel), (x, kernel)


def _dot_rounded_backward(saved, dy):
  x, kernel = saved
  return matmul_rounded(dy, kernel.T), _of_kernel(transposed_matmul_rounded, x, dy.astype(jnp.bfloat16))


_dot_rounded.defvjp(_dot_rounded_forward, _dot_rounded_backward)
