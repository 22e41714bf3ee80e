"""Experts: linear maps that are merged before they multiply. A router decided; here is what its decision does.
(Where the decision looks at tokens, nothing merges: see `dispatch.py`.)

Experts are linear, so Σ_e c_e (x W_e + b_e) = x (Σ_e c_e W_e) + Σ_e c_e b_e: for a decision that does not look at
tokens it is exact, and nearly free, to add the kernels first (Uni-Perceiver-MoE, section 3.4).
"""

import math
from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.moe.routers import Decision
from uni_moe_jax.parallel import sharding


@jax.custom_vjp
def merge(kernel: jax.Array, coef: jax.Array) -> jax.Array:
  """Contracts experts: kernel [E, …], coef [A, E] → [A, …].

  A contraction over E and not a gather `kernel[expert]`: with experts sharded, the contraction is local plus one
  reduction of the merged kernel, a gather moves every kernel.
  """
  return jnp.tensordot(coef, kernel, axes=1)


def _merge_forward(kernel, coef):
  return merge(kernel, coef), (kernel, coef)


def _merge_backward(saved, d):
  """The derivative's own rules would contract with E last, and turn all kernels, and all of their gradients, around for that."""
  kernel, coef = saved
  rest = tuple(range(1, kernel.ndim))
  dcoef = jnp.tensordot(kernel, d, axes=(rest, rest)).T
  return jnp.tensordot(coef.T, d, axes=1).astype(kernel.dtype), dcoef.astype(coef.dtype)


merge.defvjp(_merge_forward, _merge_backward)


def xavier_uniform(fan_in: int, fan_out: int) -> Callable:
  """U(±√(6 / (fan_in + fan_out))), for shapes whose axes do not say what the fans are."""
  bound = math.sqrt(6 / (fan_in + fan_out))
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def mimetic_query_key(init: Callable) -> Callable:
  """An initialisation of a fused projection [..., 3, N, H] whose keys start as a copy of its queries.

  Then attention starts where inputs are alike, so that similar positions, that is neighbours, see each other first
  (Trockman & Kolter, Mimetic Initialization of Self-Attention Layers, 2023).
  """
  def copied(key, shape, dtype=jnp.float32):
    kernel = init(key, shape, dtype)
    return kernel.at[..., 1, :, :].set(kernel[..., 0, :, :])
  return copied


@flax.struct.dataclass
class Projection:
  """A linear projection, ready to multiply.

  Attributes:
    kernel, bias: [A, *in, *out], [A, *out], of A condition rows; or of all E experts, for dispatch.
    in_axes, out_axes: logical names of what the product contracts and makes.
  """
  kernel: jax.Array
  bias: jax.Array
  in_axes: tuple[str, ...] = flax.struct.field(pytree_node=False)
  out_axes: tuple[str, ...] = flax.struct.field(pytree_node=False)

  def part(self, which: slice) -> 'Projection':
    """Of the first axis that it makes, a slice alone."""
    before = (slice(None),) * (1 + len(self.in_axes))
    return self.replace(kernel=self.kernel[(*before, which)], bias=self.bias[:, which])

  def scaled(self, by: jax.Array) -> 'Projection':
    """With everything that it makes multiplied by `by` [last axis it makes].

    Weights are multiplied and not what they make: for `by`, no gradient asks for the outputs then, which a rematerialised block would
    have to compute again.
    """
    times = lambda x: x * by.astype(x.dtype).reshape((1,) * (x.ndim - 1) + by.shape)
    return self.replace(kernel=times(self.kernel), bias=times(self.bias))


class MoeDense(nn.Module):
  """Kernels and biases of a linear projection: one per condition row, merged from E experts; or as they are, the only one or
  all E, for dispatch.

  Attributes:
    in_shape, out_shape: axes that the product contracts and makes.
    in_axes, out_axes: their logical names.
    kernel_init: initialisation of the kernel.
    num_experts: E, or 0 for a dense projection.
    dtype: of the merged kernels, that is of the product.
    mesh: on which they lie; None: on one device.
  """
  in_shape: tuple[int, ...]
  out_shape: tuple[int, ...]
  in_axes: tuple[str, ...]
  out_axes: tuple[str, ...]
  kernel_init: Callable
  num_experts: int
  dtype: jnp.dtype
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, decision: Decision | None) -> tuple[jax.Array, jax.Array]:
    """Returns (kernel [A, *in, *out], bias [A, *out]); A = 1 when dense, E without a decision."""
    lead, lead_axes = ((self.num_experts,), ('experts',)) if self.num_experts else ((), ())
    kernel = self.param(
        'kernel', nn.with_logical_partitioning(self.kernel_init, lead_axes + self.in_axes + self.out_axes),
        lead + self.in_shape + self.out_shape)
    bias = self.param(
        'bias', nn.with_logical_partitioning(nn.initializers.zeros, lead_axes + self.out_axes), lead + self.out_shape)
    if decision is not None:
      kernel, bias = merge(kernel, decision.coef), merge(bias, decision.coef)
    elif not self.num_experts:
      kernel, bias = kernel[None], bias[None]
    # The first axis: rows, on every device, or experts, where they are.
    first = ('experts',) if self.num_experts and decision is None else (None,)
    lies = lambda x, names: sharding.as_used(x.astype(self.dtype), first + names, self.mesh)
    return lies(kernel, self.in_axes + self.out_axes), lies(bias, self.out_axes)


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """x [B, S, *in] · kernel [*in, *out] + bias [*out] → [B, S, *out]."""
  contracted = x.ndim - 2
  axes = (tuple(range(2, x.ndim)), tuple(range(contracted)))
  y = jnp.tensordot(x, kernel, axes=axes)
  return y + bias.reshape((1, 1) + bias.shape)
