"""The routing of a segment: all tokens through a merged kernel, or each token to its own experts.

A router makes one of the two values; `routing.apply(x, projection, activation) -> (y, usage)` is the rest of the MoE
layer.
"""

from collections.abc import Callable

import flax
import jax
from jax.sharding import Mesh

from uni_moe_jax.moe import expert_parallel, layers
from uni_moe_jax.moe.dispatch import DispatchPlan
from uni_moe_jax.moe.expert_parallel import Activation
from uni_moe_jax.moe.layers import Projection
from uni_moe_jax.moe.routers import RouterOutput
from uni_moe_jax.moe.usage import Usage


@flax.struct.dataclass
class MergedRouting:
  """All tokens through one kernel of a projection, merged from its experts or dense."""
  output: RouterOutput | None = None  # of the condition router for A conditions; None where nothing is left to merge
  coef: jax.Array | None = None  # f32 [A, E], its coefficients, by which `MoeDense` merges experts
  kernel: int = flax.struct.field(pytree_node=False, default=0)  # which kernel of the projection, 0 … A - 1

  def apply(
      self, x: jax.Array, projection: Projection, activation: Activation = lambda y: y) -> tuple[jax.Array, None]:
    """x [B, S, *in] → (activation([B, S, *out]), None): nothing is dispatched, nothing counted."""
    weights = projection.kernel, projection.bias, projection.unrounded
    kernel, bias, unrounded = (None if x is None else x[self.kernel] for x in weights)
    return activation(layers.project(x, kernel, bias, unrounded, projection.method)), None

  def take(self, rows: Callable[[jax.Array], jax.Array], valid: jax.Array | None) -> 'MergedRouting':
    """The routing of some rows of the segment."""
    return self


@flax.struct.dataclass
class DispatchRouting:
  """Every token to its own K experts. All projections of a sublayer share the choices and their slots."""
  output: RouterOutput  # of the token router, [B, S, …]
  valid: jax.Array | None  # bool [B, S], None where nothing is padded
  plan: DispatchPlan
  usage: Usage  # what `apply` returns; count it once, not once per projection
  capacity_factor: float = flax.struct.field(pytree_node=False)  # as the next two, see `expert_parallel.make_plan`
  backend: str = flax.struct.field(pytree_node=False)
  mesh: Mesh | None = flax.struct.field(pytree_node=False)

  @classmethod
  def of(cls, output: RouterOutput, valid: jax.Array | None, groups: int, capacity_factor: float, backend: str,
         mesh: Mesh | None) -> 'DispatchRouting':
    """Plans the dispatch of a segment; arguments as in `expert_parallel.make_plan`."""
    plan = expert_parallel.make_plan(output, valid, groups, capacity_factor, backend, mesh)
    return cls(output, valid, plan, Usage.of_segment(output, plan, valid), capacity_factor, backend, mesh)

  def apply(
      self, x: jax.Array, projection: Projection, activation: Activation = lambda y: y) -> tuple[jax.Array, Usage]:
    """x [B, S, *in] → (activation([B, S, *out] by each token's experts), usage)."""
    x = x.astype(projection.kernel.dtype)
    return expert_parallel.project(x, projection, self.plan, self.mesh, activation), self.usage

  def take(self, rows: Callable[[jax.Array], jax.Array], valid: jax.Array | None) -> 'DispatchRouting':
    """The routing of some rows, which `rows` takes from any [B, S, …]: the same choices, dispatched a second time.

    valid: of these rows, as `DispatchRouting.valid`.
    """
    output = jax.tree.map(rows, self.output)
    plan = expert_parallel.make_plan(output, valid, 1, self.capacity_factor, self.backend, self.mesh)
    return self.replace(output=output, valid=valid, plan=plan, usage=Usage.of_repeated_dispatch(plan))


Routing = MergedRouting | DispatchRouting
