"""Expert parallelism: dispatch on a mesh whose devices hold different experts.

Every device assigns slots to its own tokens, and tokens move to the devices of their experts. Batches are sharded over
the batch axes, experts over `expert`: the devices of one row of that axis hold all experts between them, and tokens
never leave their row. With one device on the axis all experts are local. Otherwise there are two transports, both with
static shapes:

all_to_all (with a capacity): an all-to-all takes the buffers of E · C slots, which every device fills with its own
  tokens, to the experts; a second one takes the results back.
all_gather (exact routing, where every token may choose one expert): all devices of the row gather its tokens, and
  compute what their experts add; a reduce-scatter sums it on the devices of the tokens. Buffers for the worst case
  would move as much and multiply E / K times as much.

A capacity bounds the tokens of one device: C = ⌈f · K · B · S / E⌉ with the B examples of that device. So the number of
batch shards decides which tokens are dropped, if any are. Slots are given position by position over these examples, so
that later positions never evict earlier ones, as on one device.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from uni_moe_jax.kernels import gmm
from uni_moe_jax.kernels.projection import add_bias, with_gradient_of
from uni_moe_jax.moe import dispatch, routers
from uni_moe_jax.moe.dispatch import DispatchPlan
from uni_moe_jax.moe.layers import Projection
from uni_moe_jax.moe.routers import RouterOutput
from uni_moe_jax.parallel import sharding

Activation = Callable[[jax.Array], jax.Array]  # of each number by itself
LOCAL, ALL_TO_ALL, ALL_GATHER = 'local', 'all_to_all', 'all_gather'
_BATCH = P(sharding.BATCH_AXES)
# x of all devices of this row of the expert axis, concatenated on the first axis.
_gather_row = functools.partial(jax.lax.all_gather, axis_name='expert', tiled=True)


def route_tokens(logits: jax.Array, top_k: int, mesh: Mesh | None) -> RouterOutput:
  """Keeps the K best experts of every token, from logits [B, S, E] f32.

  On the device of the token: a partitioner would gather the logits to sort them.
  """
  keep = functools.partial(routers.keep_top_k, top_k=top_k)
  if mesh is None:
    return RouterOutput(logits, *keep(logits))
  kept = _on(mesh, keep, (_BATCH,), (_BATCH, _BATCH))(sharding.pad_batch(logits, mesh))
  return RouterOutput(logits, *(x[:logits.shape[0]] for x in kept))


def make_plan(
    output: RouterOutput, valid: jax.Array | None, groups: int, capacity_factor: float, backend: str,
    mesh: Mesh | None) -> DispatchPlan:
  """Assigns slots to the choices of a segment; arguments as in `dispatch.make_plan`.

  On a mesh the leaves are those of all devices, concatenated; `gates` and `coef` carry gradients as on one device.
  """
  if mesh is None:
    return dispatch.make_plan(output, valid, groups, capacity_factor, backend)
  expert_shards = mesh.shape['expert']
  transport = LOCAL if expert_shards == 1 else ALL_TO_ALL if capacity_factor else ALL_GATHER
  if transport == ALL_TO_ALL:
    backend = 'batched'
  else:
    backend = gmm.choose(backend, bool(capacity_factor), mesh)
  shards = expert_shards if transport == ALL_GATHER else 1
  E = output.logits.shape[-1] // shards
  if valid is None:
    valid = jnp.ones(output.expert.shape[:2], bool)

  def local(expert, gates, valid):
    if transport == ALL_GATHER:
      expert, gates, valid = (_gather_row(x) for x in (expert, gates, valid))
      expert = expert - jax.lax.axis_index('expert') * E  # experts of other devices get numbers outside 0 … E - 1
    own = RouterOutput(jnp.zeros((*expert.shape[:2], E)), expert, gates)
    plan = dispatch.make_plan(own, valid, groups, capacity_factor, backend)
    return plan.replace(
        sizes=plan.sizes[None], requested=plan.requested[None], transport=transport, expert_shards=shards)

  padded = (sharding.pad_batch(x, mesh) for x in (output.expert, output.gates, valid))
  return _on(mesh, local, (_BATCH, _BATCH, _BATCH), _BATCH)(*padded)


def project(
    x: jax.Array, projection: Projection, plan: DispatchPlan, mesh: Mesh | None,
    activation: Activation = lambda y: y) -> jax.Array:
  """activation(x [B, S, *in] through the experts of its tokens) → [B, S, *out], see `dispatch.project`.

  The activation is applied to rows of tokens, [B · S, *out], from which the next projection takes its own: a TPU would
  copy them to and from [B, S, *out], unless S is a multiple of 8.
  """
  B, S = x.shape[:2]
  if mesh is None:
    kernel = with_gradient_of(projection.kernel, projection.unrounded)
    y = activation(dispatch.project(x, kernel, projection.bias, plan))
    return y.reshape(B, S, *y.shape[1:])
  in_axes, out_axes = sharding.named_spec(projection.in_axes), sharding.named_spec(projection.out_axes)
  partial_sums = 'model' in in_axes  # each device of the model axis holds a part of the sum

  def local(x, kernel, bias, unrounded, plan):
    kernel = with_gradient_of(kernel, unrounded)
    plan = plan.replace(sizes=plan.sizes[0], requested=plan.requested[0])
    if partial_sums:
      bias = jnp.where(jax.lax.axis_index('model') == 0, bias, 0)
    if plan.transport == ALL_TO_ALL:
      y = _all_to_all(x, kernel, bias, plan)
    elif plan.transport == ALL_GATHER:
      y = dispatch.project(_gather_row(x), kernel, bias, plan)
      y = jax.lax.psum_scatter(y, 'expert', scatter_dimension=0, tiled=True)
    else:
      y = dispatch.project(x, kernel, bias, plan)
    return (y if partial_sums else activation(y))[None]

  batch = sharding.BATCH_AXES
  kernel_spec = P('expert', *in_axes, *out_axes)
  specs = P(batch, None, *in_axes), kernel_spec, P('expert', *out_axes), kernel_spec, _BATCH
  run = _on(mesh, local, specs, P('model' if partial_sums else None, batch, *out_axes))
  y = run(sharding.pad_batch(x, mesh), projection.kernel, projection.bias, projection.unrounded, plan)
  y = activation(y.sum(0)) if partial_sums else y[0]
  return y.reshape(-1, S, *y.shape[1:])[:B]


def _all_to_all(x: jax.Array, kernel: jax.Array, bias: jax.Array, plan: DispatchPlan) -> jax.Array:
  """`dispatch.project` with experts on all devices of the row, kernel [E / devices, *in, *out]."""
  experts, out = kernel.shape[0], bias.shape[1:]
  rows = dispatch.permute(x.reshape(math.prod(x.shape[:2]), -1), plan.slots)
  D, exchange = rows.shape[1], functools.partial(jax.lax.all_to_all, axis_name='expert', split_axis=0, concat_axis=0)
  # [devices, own experts, slots, D]
  rows = exchange(rows.reshape(-1, experts, rows.shape[0] // plan.sizes.shape[0], D))
  n, _, slots, _ = rows.shape
  rows = rows.transpose(1, 0, 2, 3).reshape(experts * n * slots, D)
  y = gmm.grouped_matmul(rows, kernel.reshape(experts, D, -1), plan.sizes, 'batched')
  y = add_bias(y.reshape(experts, n, slots, -1), bias.reshape(experts, 1, 1, -1))
  y = exchange(y.transpose(1, 0, 2, 3))
  return dispatch.combine(y.reshape(-1, y.shape[-1]), plan.gates, plan.slots).reshape(-1, *out)


def _on(mesh: Mesh, function, in_specs, out_specs):
  # Loops and kernels of grouped matmuls do not declare what varies over which axis. Nothing relies on it: every output
  # differs by its device, a sum over `model` included.
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
