"""The MoE layer: linear projections whose experts are merged, or kept for dispatch.

Experts are linear, so Σ_e c_e (x W_e + b_e) = x (Σ_e c_e W_e) + Σ_e c_e b_e: for a router that does not read tokens it
is exact, and nearly free, to add the kernels first (Uni-Perceiver-MoE, section 3.4). `MoeDense` does so once per layer,
for each distinct condition. With a token router nothing merges (see `dispatch.py`).
"""

import math
from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from uni_moe_jax.kernels import projection
from uni_moe_jax.kernels.layer_norm import layer_norm
from uni_moe_jax.moe.precision import EXACT
from uni_moe_jax.parallel import sharding


@jax.custom_vjp
def merge(kernel: jax.Array, coef: jax.Array) -> jax.Array:
  """Contracts experts: kernel [E, …], coef [A, E] → [A, …].

  A contraction over E and not a gather `kernel[expert]`: with sharded experts, the contraction is local plus one
  reduction of the merged kernel, while a gather moves every kernel.
  """
  return jnp.tensordot(coef, kernel, axes=1, precision=EXACT)


def _merge_backward(saved, d):
  """Contracts with E first; JAX's own rule would transpose all kernels and all of their gradients.

  The gradient of the kernels is a sum of A arrays. As a product it would take several times as long on TPUs, whose
  units multiply 128 numbers at once, of which A would be used.
  """
  kernel, coef = saved
  rest = tuple(range(1, kernel.ndim))
  # The barrier keeps the transpose apart: XLA would turn the product around and, on CPU, compute it by a plain loop.
  dcoef = jax.lax.optimization_barrier(jnp.tensordot(kernel, d, axes=(rest, rest), precision=EXACT)).T
  dkernel = sum(c.reshape(-1, *(1,) * len(rest)) * x[None] for c, x in zip(coef, d, strict=True))
  return dkernel.astype(kernel.dtype), dcoef.astype(coef.dtype)


merge.defvjp(lambda kernel, coef: (merge(kernel, coef), (kernel, coef)), _merge_backward)


def param(module: nn.Module, name: str, init: Callable, axes: dict[str, int]) -> jax.Array:
  """Declares a parameter of a module with axes {logical name: size}.

  Raises:
    flax.errors.ScopeParamShapeError: the parameter has other sizes.
  """
  shape = tuple(axes.values())
  if module.is_initializing() or not module.has_variable('params', name):
    return module.param(name, nn.with_logical_partitioning(init, tuple(axes)), shape)
  value = nn.unbox(module.get_variable('params', name))
  # Flax would trace `init` for this: a third of the time that tracing the model takes.
  if value.shape != shape:
    raise flax.errors.ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
  return value


def xavier_uniform(fan_in: int, fan_out: int) -> Callable:
  """U(±√(6 / (fan_in + fan_out))), for shapes whose axes do not determine the fans."""
  bound = math.sqrt(6 / (fan_in + fan_out))
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, in float32 with eps 1e-5 as everywhere in the published system: [..., D] → f32."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    axes = {'embed': x.shape[-1]}
    return layer_norm(x, param(self, 'scale', nn.initializers.ones, axes),
                      param(self, 'bias', nn.initializers.zeros, axes))


PerCondition = tuple[jax.Array, ...]  # A arrays


@flax.struct.dataclass
class Projection:
  """A linear projection that is ready to multiply: one for each of A conditions, or, for dispatch, of all E experts."""
  kernel: PerCondition | jax.Array  # [*in, *out], or [E, *in, *out], of the type of the product
  bias: PerCondition | jax.Array  # f32 [*out], or [E, *out]
  in_axes: tuple[str, ...] = flax.struct.field(pytree_node=False)  # logical names of the contracted axes
  out_axes: tuple[str, ...] = flax.struct.field(pytree_node=False)  # and of the resulting ones
  unrounded: PerCondition | jax.Array | None = None  # f32 values, see `projection.dot`; None where the kernel is f32
  method: str = flax.struct.field(pytree_node=False, default=projection.PLAIN)  # see `projection.choose`

  def slice(self, part: slice) -> 'Projection':
    """The projection to a slice of its first output axis."""
    after_first = (Ellipsis, part) + (slice(None),) * (len(self.out_axes) - 1)
    kernel, bias, unrounded = jax.tree.map(lambda x: x[after_first], (self.kernel, self.bias, self.unrounded))
    return self.replace(kernel=kernel, bias=bias, unrounded=unrounded)


class MoeDense(nn.Module):
  """Kernel and bias of a linear projection, with E experts or dense."""
  in_axes: tuple[tuple[str, int], ...]  # (logical name, size) of the contracted axes
  out_axes: tuple[tuple[str, int], ...]  # and of the resulting ones
  kernel_init: Callable
  num_experts: int  # E, or 0 for a dense projection
  dtype: jnp.dtype  # of the kernels that are returned, that is of the product; see `precision`
  method: str = projection.PLAIN  # see `projection.choose`
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, coef: jax.Array | None, scale: jax.Array | None = None) -> Projection:
    """The projection of a layer: one kernel for each of A conditions, the E kernels of experts, or the dense one.

    Args:
      coef: f32 [A, E], merges the experts; None: nothing is merged.
      scale: f32, multiplies the outputs along their last axis. Weights are multiplied and not outputs: then the
        gradient of the scale does not need the outputs, which a rematerialized block would have to compute again.
    """
    in_axes, out_axes = dict(self.in_axes), dict(self.out_axes)
    experts = {'experts': self.num_experts} if self.num_experts else {}
    kernel = param(self, 'kernel', self.kernel_init, experts | in_axes | out_axes)
    bias = param(self, 'bias', nn.initializers.zeros, experts | out_axes)
    merges = self.num_experts and coef is not None
    if merges:
      kernel, bias = (checkpoint_name(merge(x, coef), projection.PRODUCT) for x in (kernel, bias))
    elif not self.num_experts:
      kernel, bias = kernel[None], bias[None]
    if scale is not None:  # in float32: the gradient of the scale is a sum over the input axes
      kernel, bias = (x * jax.lax.broadcast_to_rank(scale, x.ndim) for x in (kernel, bias))
    # Kernels of conditions are on every device, experts where they are sharded.
    first = 'experts' if self.num_experts and not merges else None
    as_used = lambda x, names: sharding.as_used(x, (first, *names), self.mesh)
    kernel_as_used = lambda x: as_used(x, (*in_axes, *out_axes))
    unrounded = None if self.dtype == kernel.dtype else kernel_as_used(kernel)
    weights = kernel_as_used(kernel.astype(self.dtype)), as_used(bias, tuple(out_axes)), unrounded
    if not first:
      weights = (None if x is None else _unstack(x) for x in weights)
    kernel, bias, unrounded = weights
    return Projection(kernel, bias, tuple(in_axes), tuple(out_axes), unrounded, self.method)


def _unstack(x: jax.Array) -> PerCondition:
  """[A, …] → A times […].

  The gradients of all uses of a part are summed first. With x[i], each would be padded to [A, …] before the sum.
  """
  return tuple(part.squeeze(0) for part in jax.lax.split(x, (1,) * len(x)))
