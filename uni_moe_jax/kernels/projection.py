"""The product of a projection, as each platform computes it fastest, with gradients summed in float32.

On accelerators XLA finds the best program for the plain product. On one CPU its choice of operands matters, and some
CPUs multiply bfloat16 several times as fast as float32, if the product is written as XLA's library expects it.
"""

import functools
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from uni_moe_jax.parallel import sharding

PLAIN, CPU, ROUNDED = 'plain', 'cpu', 'rounded'  # methods
PRODUCT = 'product'  # `checkpoint_name` of what is worth keeping where memory is cheaper than computing it again
CPUINFO = pathlib.Path('/proc/cpuinfo')  # of Linux
_BFLOAT16 = {'amx_bf16', 'avx512_bf16'}  # flags of Intel's Xeons since 2023 and of AMD's Zen 4


@functools.cache
def processor_flags() -> frozenset[str]:
  """Names of the instructions that this machine's processor has, as Linux writes them; empty on other systems."""
  return frozenset(CPUINFO.read_text().split()) if CPUINFO.exists() else frozenset()


def multiplies_bfloat16() -> bool:
  """Whether this machine's processor has instructions that multiply bfloat16."""
  return not _BFLOAT16.isdisjoint(processor_flags())


def choose(mesh: Mesh | None, cpu_bfloat16: bool) -> str:
  """How to multiply on a mesh. cpu_bfloat16: float32 operands may be rounded where that is fast, see config.train."""
  if not sharding.on_one_cpu(mesh):
    return PLAIN
  return ROUNDED if cpu_bfloat16 and multiplies_bfloat16() else CPU


def remat_policy(mesh: Mesh | None) -> Callable[..., bool] | None:
  """What a rematerialized block keeps: on a CPU its projections, which cost more than memory; elsewhere nothing."""
  return jax.checkpoint_policies.save_only_these_names(PRODUCT) if sharding.on_one_cpu(mesh) else None


def project(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, unrounded: jax.Array | None = None, method: str = PLAIN
) -> jax.Array:
  """x [B, S, *in] · kernel [*in, *out] + bias [*out] → [B, S, *out], of the kernel's type. The bias is float32.

  The product has heads and head dimension as one axis, because a TPU would pad and copy two. On one CPU they stay two
  axes, unless operands are rounded: such a product has a single output axis.

  unrounded, method: see `dot`.
  """
  ins, out = x.shape[2:], kernel.shape[x.ndim - 2:]
  rows = ins if method == CPU else (math.prod(ins),)
  joined = {CPU: 0, PLAIN: 2, ROUNDED: len(out)}[method]  # axes out that become one
  columns = (*out[:len(out) - joined], math.prod(out[-joined:])) if joined else out
  kernel, unrounded = (None if w is None else w.reshape(*rows, *columns) for w in (kernel, unrounded))
  x = x.astype(kernel.dtype).reshape(*x.shape[:2], *rows)
  y = checkpoint_name(dot(x, kernel, unrounded, method), PRODUCT)
  return add_bias(y, bias.reshape(1, 1, *columns)).reshape(*y.shape[:2], *out)


def dot(x: jax.Array, kernel: jax.Array, unrounded: jax.Array | None = None, method: str = PLAIN) -> jax.Array:
  """x [B, S, *in] · kernel [*in, *out] → [B, S, *out], all of one type.

  Args:
    unrounded: the kernel's float32 values, where it was rounded. The gradient is theirs, and not rounded before it is
      summed over arrays and devices. Nothing reads their values.
    method: see `choose`. If ROUNDED, there is one axis in and one out.
  """
  if unrounded is not None and unrounded.dtype != kernel.dtype:
    return _dot_of_rounded(x, kernel, unrounded)
  return {PLAIN: reference, CPU: _dot_on_cpu, ROUNDED: _dot_rounded}[method](x, kernel)


def reference(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [B, S, *in] · kernel [*in, *out] → [B, S, *out], as XLA computes it."""
  return jnp.tensordot(x, kernel, axes=(tuple(range(2, x.ndim)), tuple(range(x.ndim - 2))))


def _dx(x, kernel, dy):
  return jnp.tensordot(dy, kernel, axes=(tuple(range(2, dy.ndim)), tuple(range(x.ndim - 2, kernel.ndim))))


@jax.custom_vjp
def _dot_of_rounded(x, kernel, unrounded):
  return reference(x, kernel)


def _dot_of_rounded_backward(saved, dy):
  x, kernel = saved
  dkernel = jnp.tensordot(x, dy, axes=((0, 1), (0, 1)), preferred_element_type=jnp.float32)
  return _dx(x, kernel, dy), jnp.zeros_like(kernel), dkernel


_dot_of_rounded.defvjp(lambda x, kernel, unrounded: (reference(x, kernel), (x, kernel)), _dot_of_rounded_backward)


_dot_on_cpu = jax.custom_vjp(reference)


def _dot_on_cpu_backward(saved, dy):
  """Contracts one axis for the gradient of the kernel: to contract two, examples and tokens, XLA transposes dy."""
  x, kernel = saved
  return _dx(x, kernel, dy), _of_kernel(lambda x, y: x.T @ y, x, dy).reshape(kernel.shape)


_dot_on_cpu.defvjp(lambda x, kernel: (reference(x, kernel), (x, kernel)), _dot_on_cpu_backward)


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


def with_gradient_of(kernel: jax.Array, unrounded: jax.Array | None) -> jax.Array:
  """A kernel with the gradient of its float32 values, see `dot`, rounded once but summed in float32."""
  return kernel if unrounded is None else _with_gradient_of(kernel, unrounded)


_with_gradient_of = jax.custom_vjp(lambda kernel, unrounded: kernel)
_with_gradient_of.defvjp(
    lambda kernel, unrounded: (kernel, None), lambda _, d: (jnp.zeros_like(d), d.astype(jnp.float32)))


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
  """y + bias of y's type, added in float32: the gradient of a bias is a sum over all tokens."""
  return (y.astype(jnp.float32) + bias).astype(y.dtype)
