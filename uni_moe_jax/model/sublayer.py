"""The common base of attention and MLP: a router, projections, and the routing of each segment.

A `RouterOutput` becomes merged kernels, one for all tokens of a segment, or a dispatch of each token to its experts;
`routing.apply(x, projection, activation) -> (y, usage)` is the rest of the MoE layer.
"""

from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
from jax.sharding import Mesh

from uni_moe_jax.kernels.projection import project
from uni_moe_jax.model.sequences import EmbeddedSequence
from uni_moe_jax.model.spec import ROUTER_PARAMS, ModelSpec
from uni_moe_jax.moe import expert_parallel, routers
from uni_moe_jax.moe.dispatch import DispatchPlan
from uni_moe_jax.moe.expert_parallel import Activation
from uni_moe_jax.moe.layers import MoeDense, Projection
from uni_moe_jax.moe.routers import ConditionRouter, RouterOutput
from uni_moe_jax.moe.token_routers import TokenRouter
from uni_moe_jax.moe.usage import Usage
from uni_moe_jax.tasks.attributes import Condition

Hidden = tuple[tuple[jax.Array | None, ...], ...]  # per sequence, per segment [B, S, D]; None if no longer needed
Pools = tuple[dict[str, jax.Array], ...]  # per sequence, {sublayer: f32 [B, D]} of context routers
NOISE_SALTS = {'attention': 0, 'mlp': 1}  # they separate the uses of one (step, layer) key


@flax.struct.dataclass
class Context:
  """What every block needs beside hidden states."""
  sequences: tuple[EmbeddedSequence, ...]  # without their segments
  key: jax.Array | None  # random key of this step, inside a block of this step and layer; None at evaluation
  router_inputs: tuple[Any, ...] = flax.struct.field(pytree_node=False)  # A distinct ones
  # Compute only the rows of the readout in the last block; inside a block, in this one.
  readout_only: bool = flax.struct.field(pytree_node=False)
  taps: bool = flax.struct.field(pytree_node=False)  # collect hidden states and token routing
  keys: bool = flax.struct.field(pytree_node=False)  # collect keys, values and context pools
  mesh: Mesh | None = flax.struct.field(pytree_node=False)


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
    return activation(project(x, kernel, bias, unrounded, projection.method)), None

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


def output_projection(
    dense: MoeDense, coef: jax.Array | None, scale: jax.Array, context: Context
) -> tuple[Projection, jax.Array | int]:
  """LayerScale: (projection, factor of its outputs). coef: as in `MoeDense`. scale: f32 [D].

  Training scales the weights, see `MoeDense`. Evaluation scales the outputs: decoding passes few tokens at a time, and
  would scale the weights again for each of them.
  """
  if context.key is not None:
    return dense(coef, scale), 1
  return dense(coef), scale[None, None]


class Sublayer(nn.Module):
  """Base of `Attention` and `Mlp`. Their parameters belong to the block, whose scope they share."""
  spec: ModelSpec
  has_experts: bool  # otherwise the projections are dense
  mesh: Mesh | None

  SUBLAYER = ''  # key of `spec.sublayers`

  def make_router(self) -> ConditionRouter | TokenRouter | None:
    """The router; None where projections are dense, or were merged by `merging`."""
    spec, name = self.spec, ROUTER_PARAMS[self.SUBLAYER]
    if not self.has_experts or spec.kernels:
      return None
    if routers.routes_tokens(spec.router):
      return TokenRouter(spec, self.mesh, name=name)
    return ConditionRouter(spec, name=name)

  def make_projection(self, in_axes: dict[str, int], out_axes: dict[str, int], init: Callable) -> MoeDense:
    """A projection between axes {logical name: size}."""
    num_experts = self.spec.num_experts if self.has_experts else 0
    return MoeDense(tuple(in_axes.items()), tuple(out_axes.items()), init, num_experts, self.spec.dtype,
                    self.spec.product_method(self.mesh), self.mesh)

  def merge_routing(self, context: Context) -> MergedRouting | None:
    """The routing by which the layer's projections merge, once for all sequences; None for tokens."""
    if isinstance(self.router, TokenRouter):
      return None
    if self.router is None:
      return MergedRouting()
    output = self.router(context.router_inputs, self._noise_key(context))
    return MergedRouting(output, output.coef)

  def pool(self, segments: tuple[jax.Array, ...], sequence: EmbeddedSequence) -> dict[str, jax.Array]:
    """{sublayer: what its context router reads of a sequence}; {} with another router.

    It averages the segments with a full mask: every token of the sequence may see them, but not a caption's earlier
    words. Both routers of a block pool the inputs of its attention, not those of the MLP, so that the readout rows of
    the last block need no other row, and a cache is complete.
    """
    if not isinstance(self.router, TokenRouter) or not self.router.reads_context:
      return {}
    full = [i for i, mask in enumerate(sequence.layout.masks) if mask == 'full']
    return {self.SUBLAYER: self.router.pool(tuple(segments[i] for i in full), tuple(sequence.valid[i] for i in full))}

  def route(
      self, x: jax.Array, merged: MergedRouting | None, condition: Condition, tokens: dict[str, Any],
      pool: dict[str, jax.Array], context: Context) -> Routing:
    """The routing of one segment [B, S, D]; merged, pool: see the methods above; tokens: `EmbeddedSequence.tokens`.

    Evaluation is exact: capacity is a means of training.
    """
    if merged is None:
      output = self.router(x, condition.bits, pool.get(self.SUBLAYER), self._noise_key(context), tokens['ids'],
                           tokens['positions'])
      capacity_factor = 0.0 if context.key is None else self.spec.capacity_factor
      return DispatchRouting.of(
          output, tokens['valid'], tokens['groups'], capacity_factor, self.spec.gmm, self.mesh)
    if not self.has_experts:
      return merged
    kernel = self.spec.kernel_of(condition) if self.spec.kernels else self._condition_index(condition, context)
    return merged.replace(kernel=kernel)

  def collect(
      self, merged: MergedRouting | None, usages: list[tuple[Condition, Usage | None]],
      token_routing: list[tuple[RouterOutput | None, ...]], context: Context) -> dict[str, Any]:
    """{'router_stats', 'token_routing'} of this sublayer, see `Encoder`."""
    if self.router is None:
      return {'router_stats': {}, 'token_routing': {}}
    if merged is not None:
      return {'router_stats': {self.SUBLAYER: merged.output}, 'token_routing': {}}
    indexed = [(self._condition_index(condition, context), usage) for condition, usage in usages]
    stats = Usage.stack(indexed, len(context.router_inputs), self.spec.num_experts)
    return {'router_stats': {self.SUBLAYER: stats}, 'token_routing': {self.SUBLAYER: tuple(token_routing)}}

  def _condition_index(self, condition: Condition, context: Context) -> int:
    """Index of a condition's router input on axis A."""
    return context.router_inputs.index(routers.router_input(self.spec.router, condition))

  def _noise_key(self, context: Context) -> jax.Array | None:
    return None if context.key is None else jax.random.fold_in(context.key, NOISE_SALTS[self.SUBLAYER])
