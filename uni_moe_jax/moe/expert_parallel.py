"""Dispatch on a mesh: every device gives slots to its own tokens, and tokens travel to the devices that hold their experts.

Batches lie over the batch axes, experts over `expert`: the devices of one row of that axis hold all experts between them, and
tokens never leave their row. With one device on the axis all experts are here and tokens stay. Otherwise they travel in one of
two ways, with static shapes both:

exchange (where there is a capacity): an all-to-all takes the buffers of E · C slots, which every device fills with its own
  tokens, to the experts; a second one takes the results back.
gather (exact routing, where every token may want one expert): tokens of the row come to all of its devices, which compute what
  their experts add; a reduce-scatter sums it up where the tokens came from. Buffers for the worst case would move as much and
  multiply E / K times as much.

A capacity bounds the tokens of one device: C = ⌈f · K · B · S / E⌉ with the B examples that lie there. So the number of batch
shards decides which tokens are dropped, if any are. Slots are given position by position over these examples, so that later
positions never evict earlier ones, as on one device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from uni_moe_jax.moe import dispatch, gmm, routers
from uni_moe_jax.moe.dispatch import Routes
from uni_moe_jax.moe.layers import Projection
from uni_moe_jax.moe.routers import Choice
from uni_moe_jax.parallel import sharding

STAY, EXCHANGE, GATHER = 'stay', 'exchange', 'gather'
_HERE = P(sharding.BATCH_AXES)


def choose(logits: jax.Array, top_k: int, mesh: Mesh | None) -> Choice:
  """Every token's choice from its logits [B, S, E] f32, where the token lies: a partitioner would gather them to sort them."""
  keep = functools.partial(routers.keep_top_k, top_k=top_k)
  if mesh is None:
    return Choice(logits, *keep(logits))
  here = _on(mesh, keep, (_HERE,), (_HERE, _HERE))(_whole(logits, mesh))
  return Choice(logits, *(x[:logits.shape[0]] for x in here))


def routes(
    choice: Choice, valid: jax.Array | None, parts: int, capacity: float, backend: str, mesh: Mesh | None) -> Routes:
  """Gives slots to the choices of an array; arguments as in `dispatch.routes`. mesh: on which the array lies; None: one device.

  On a mesh the leaves are those of every device behind each other, and `gates` and `coef` carry gradients as ever.
  """
  if mesh is None:
    return dispatch.routes(choice, valid, capacity, parts, backend)
  owners = mesh.shape['expert']
  way = STAY if owners == 1 else EXCHANGE if capacity else GATHER
  backend = 'batched' if way == EXCHANGE else gmm.choose(backend, bool(capacity), mesh.devices.flat[0].platform)
  E = choice.logits.shape[-1] // (owners if way == GATHER else 1)
  if valid is None:
    valid = jnp.ones(choice.expert.shape[:2], bool)

  def local(expert, gates, valid):
    if way == GATHER:
      expert, gates, valid = (_from_row(x) for x in (expert, gates, valid))
      expert = expert - jax.lax.axis_index('expert') * E  # those of others have numbers that no expert here has
    here = Choice(jnp.zeros((*expert.shape[:2], E)), expert, gates)
    to = dispatch.routes(here, valid, capacity, parts, backend)
    return to.replace(sizes=to.sizes[None], asked=to.asked[None], way=way, owners=owners if way == GATHER else 1)

  whole = (_whole(x, mesh) for x in (choice.expert, choice.gates, valid))
  return _on(mesh, local, (_HERE, _HERE, _HERE), _HERE)(*whole)


def project(x: jax.Array, linear: Projection, to: Routes, mesh: Mesh | None) -> jax.Array:
  """x [B, S, *in] through the experts of its tokens, kernels [E, *in, *out], → [B, S, *out]; see `dispatch.project`."""
  if mesh is None:
    return dispatch.project(x, linear.kernel, linear.bias, to)
  axes = sharding.named_spec(linear.in_axes), sharding.named_spec(linear.out_axes)
  contracts = 'model' in axes[0]  # then the devices of the model axis hold parts of a sum

  def local(x, kernel, bias, to):
    to = to.replace(sizes=to.sizes[0], asked=to.asked[0])
    if contracts:
      bias = jnp.where(jax.lax.axis_index('model') == 0, bias, 0)
    if to.way == EXCHANGE:
      y = _exchanged(x, kernel, bias, to)
    elif to.way == GATHER:
      y = jax.lax.psum_scatter(dispatch.project(_from_row(x), kernel, bias, to), 'expert', scatter_dimension=0, tiled=True)
    else:
      y = dispatch.project(x, kernel, bias, to)
    return y[None]

  batch = sharding.BATCH_AXES
  specs = P(batch, None, *axes[0]), P('expert', *axes[0], *axes[1]), P('expert', *axes[1]), _HERE
  run = _on(mesh, local, specs, P('model' if contracts else None, batch, None, *axes[1]))
  return run(_whole(x, mesh), linear.kernel, linear.bias, to).sum(0)[:x.shape[0]]


def _exchanged(x: jax.Array, kernel: jax.Array, bias: jax.Array, to: Routes) -> jax.Array:
  """`dispatch.project` of tokens whose experts lie on the devices of this row, kernel [E / devices, *in, *out] here."""
  B, S = x.shape[:2]
  here, out = kernel.shape[0], bias.shape[1:]
  rows = dispatch.spread(x.reshape(B * S, -1), to)
  D, there = rows.shape[1], functools.partial(jax.lax.all_to_all, axis_name='expert', split_axis=0, concat_axis=0)
  rows = there(rows.reshape(-1, here, rows.shape[0] // to.sizes.shape[0], D))  # [devices, experts here, slots, D]
  n, _, slots, _ = rows.shape
  rows = rows.transpose(1, 0, 2, 3).reshape(here * n * slots, D)
  y = gmm.grouped_matmul(rows, kernel.reshape(here, D, -1), to.sizes, 'batched')
  y = y.reshape(here, n, slots, -1) + bias.reshape(here, 1, 1, -1)
  y = there(y.transpose(1, 0, 2, 3))
  return dispatch.collect(y.reshape(-1, y.shape[-1]), to).reshape(B, S, *out)


def _from_row(x: jax.Array) -> jax.Array:
  """What the devices of this row of the expert axis hold, behind each other on the first axis."""
  return jax.lax.all_gather(x, 'expert', tiled=True)


def _whole(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Fills examples [B, …] up with zeros (of a mask: with what is not valid) until B divides over the batch axes."""
  missing = -x.shape[0] % sharding.batch_shards(mesh)
  return jnp.pad(x, ((0, missing), *([(0, 0)] * (x.ndim - 1)))) if missing else x


def _on(mesh: Mesh, function, in_specs, out_specs):
  # Loops and kernels of grouped products do not say what varies over which axis. Nothing relies on it: whatever leaves a
  # device differs by its whole place, a sum over `model` included.
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
