"""Dispatch: every token to its own K experts, and back. For decisions that look at tokens, where nothing can be merged.

y_t = Σ_k g_{t,k} (x_t W_{e(t,k)} + b_{e(t,k)}), over the choices that are kept. Choices are numbered t · K + k; a *slot* is the
place of a choice among the rows that the experts multiply. Two projections that share a decision share its slots.
"""

import functools
import math

import flax
import jax
import jax.numpy as jnp

from uni_moe_jax.moe import gmm
from uni_moe_jax.moe.routers import Choice


@flax.struct.dataclass
class Routes:
  """Where the choices of T = B · S tokens lie.

  Attributes:
    slot: int32 [T, K], of a choice; any where it is not kept.
    kept: bool [T, K]: neither padding nor over capacity.
    source: int32 [G], the choice in a slot; -1 where there is none.
    sizes: int32 [E], kept choices of every expert. asked: int32 scalar, choices of unpadded tokens.
    gates: f32 [T, K].
    coef: f32 [T, E], the kept gates as coefficients.
    backend: of the grouped product, see `grouped.py`.
    way: how tokens come to their experts, see `travel.py`. On a mesh every device has routes of its own, which lie behind each
      other on the first axis: sizes are [devices, E] then, and asked [devices].
    owners: over how many devices in a row different experts lie; elsewhere they all have counts of all experts.
  """
  slot: jax.Array
  kept: jax.Array
  source: jax.Array
  sizes: jax.Array
  asked: jax.Array
  gates: jax.Array
  coef: jax.Array
  backend: str = flax.struct.field(pytree_node=False)
  way: str = flax.struct.field(pytree_node=False, default='stay')
  owners: int = flax.struct.field(pytree_node=False, default=1)

  @property
  def given(self) -> jax.Array:
    """f32 [E], slots that every expert gave, over all devices."""
    E = self.sizes.shape[-1]
    return self.sizes.reshape(-1, self.owners, E).sum(0).reshape(-1).astype(jnp.float32)


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
  """C = ⌈f · K · tokens / E⌉, at most `tokens`: an expert is chosen once by a token. From static, padded shapes alone: real
  lengths would leak. factor 0: no bound, that is room for all."""
  return min(tokens, math.ceil(factor * top_k * tokens / num_experts)) if factor else tokens


def routes(choice: Choice, valid: jax.Array | None, capacity: float, parts: int, backend: str) -> Routes:
  """Gives slots to the choices of an array.

  Args:
    choice: of [B, S] tokens. Its last axis of logits says how many experts there are; a choice of another one is not kept.
    valid: bool [B, S], None where nothing is padded. Padding is neither routed nor counted.
    capacity: factor f, or 0 for exact routing. Slots are given position by position over the batch, so that a later position
      never takes a slot from an earlier one of any sample; at one position first choices come first.
    parts: into how many equal runs of positions S falls, each with a capacity of its own (2 for [words | queries]).
    backend: one of `grouped.BACKENDS`, 'auto' or 'xla'.
  """
  B, S, K = choice.expert.shape
  E = choice.logits.shape[-1]
  backend = gmm.choose(backend, bool(capacity))
  n = S // parts
  room = capacity_of(capacity, B * n, K, E)
  in_order = lambda x: x.reshape(B, parts, n, K).transpose(1, 2, 3, 0).reshape(parts, n * K * B)
  back = lambda x: x.reshape(parts, n, K, B).transpose(3, 0, 1, 2).reshape(B * S, K)

  expert = in_order(choice.expert)
  asked = jax.nn.one_hot(expert, E, dtype=jnp.int32)
  if valid is not None:
    asked = asked * in_order(jnp.broadcast_to(valid[..., None], (B, S, K)))[..., None]
  before = jnp.cumsum(asked, axis=1) - asked
  rank = (asked * before).sum(-1)  # among the choices of this expert in this part
  kept = (asked.sum(-1) > 0) & (rank < room)
  count = jnp.minimum(asked.sum(1), room)  # [parts, E]
  sizes = count.sum(0)
  if backend == 'batched':
    start, slots = jnp.arange(E, dtype=jnp.int32) * (parts * room), E * parts * room
  else:
    start, slots = jnp.cumsum(sizes) - sizes, gmm.rows_for(backend, min(B * S * K, E * parts * room))
  start = start[None] + jnp.cumsum(count, axis=0) - count  # [parts, E]
  slot = back(jnp.take_along_axis(start, expert, axis=1) + rank)
  kept = back(kept)
  number = jnp.arange(B * S * K, dtype=jnp.int32).reshape(B * S, K)
  source = jnp.full((slots,), -1, jnp.int32).at[jnp.where(kept, slot, slots)].set(number, mode='drop')
  gates = choice.gates.reshape(B * S, K)
  one_hot = jax.nn.one_hot(choice.expert.reshape(B * S, K), E, dtype=jnp.float32)
  coef = (jnp.where(kept, gates, 0)[..., None] * one_hot).sum(1)
  return Routes(jnp.where(kept, slot, 0), kept, source, sizes, asked.sum(), gates, coef, backend)


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array, to: Routes) -> jax.Array:
  """x [B, S, *in] through the experts kernel [E, *in, *out] and bias [E, *out] of its tokens → [B, S, *out].

  A token none of whose choices is kept gets 0.
  """
  B, S = x.shape[:2]
  contracted = x.ndim - 2
  out = kernel.shape[1 + contracted:]
  E, width = kernel.shape[0], math.prod(out)
  operands = x.reshape(B * S, -1), kernel.reshape(E, -1, width), to.gates
  y = _through(to.backend, *operands, to.source, to.slot, to.kept, to.sizes)
  y = y + to.coef.astype(x.dtype) @ bias.reshape(E, width)
  return y.reshape(B, S, *out)


def spread(x: jax.Array, to: Routes) -> jax.Array:
  """Tokens [T, D] in the slots of their choices: [G, D]. A slot without a choice holds anything."""
  return _spread(x, to.source, to.slot, to.kept)


def collect(y: jax.Array, to: Routes) -> jax.Array:
  """Σ_k gate · y over the kept choices of every token: [G, F] → [T, F]."""
  return _collect(y, to.gates, to.source, to.slot, to.kept)


# All ways there and back are gathers, forward and backward: a scatter of rows is slow on every backend.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(backend, x, kernel, gates, source, slot, kept, sizes):
  """Σ_k gate · x W_e over a token's kept choices: [T, D], [E, D, F] → [T, F].

  A gate's gradient, x W_e · dy, is x · (dy W_eᵀ) here, whose right side makes dx anyway: what experts gave is not asked for, and a
  rematerialised block need not compute it again.
  """
  y = gmm.grouped_matmul(_tokens(x, source, slot), kernel, sizes, backend)
  return _sum_of_choices(y, slot, kept, gates)


def _through_forward(backend, x, kernel, gates, source, slot, kept, sizes):
  saved = x, kernel, gates, source, slot, kept, sizes
  return _through(backend, *saved), saved


def _through_backward(backend, saved, dy):
  x, kernel, gates, source, slot, kept, sizes = saved
  rows = (_in_slots(gates, source) * _tokens(x, source, slot)).astype(x.dtype)
  dys = jnp.where(source[:, None] >= 0, _tokens(dy, source, slot), 0)
  _, back = jax.vjp(lambda rows, kernel: gmm.grouped_matmul(rows, kernel, sizes, backend), rows, kernel)
  dxs, dkernel = back(dys)
  return _sum_of_choices(dxs, slot, kept, gates), dkernel, _along(dxs, x, slot, kept), None, None, None, None


_through.defvjp(_through_forward, _through_backward)


@jax.custom_vjp
def _spread(x, source, slot, kept):
  """Rows of tokens [T, D] in slots: [G, D]."""
  return _tokens(x, source, slot)


def _spread_forward(x, source, slot, kept):
  return _spread(x, source, slot, kept), (slot, kept)


def _spread_backward(saved, dy):
  slot, kept = saved
  return _sum_of_choices(dy, slot, kept, None), None, None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(y, gates, source, slot, kept):
  """Σ_k gate · y over a token's kept choices: [G, F] → [T, F]."""
  return _sum_of_choices(y, slot, kept, gates)


def _collect_forward(y, gates, source, slot, kept):
  return _collect(y, gates, source, slot, kept), (y, gates, source, slot, kept)


def _collect_backward(saved, dy):
  y, gates, source, slot, kept = saved
  dys = (_in_slots(gates, source) * _tokens(dy, source, slot)).astype(y.dtype)
  return dys, _along(y, dy, slot, kept), None, None, None


_collect.defvjp(_collect_forward, _collect_backward)


def _tokens(x: jax.Array, source: jax.Array, slot: jax.Array) -> jax.Array:
  """The token [D] of x [T, D] in every slot, any where there is none: [G, D]."""
  return _at(x, jnp.maximum(source, 0) // slot.shape[1])


def _in_slots(gates: jax.Array, source: jax.Array) -> jax.Array:
  """The gate of the choice in every slot, 0 where there is none: [T, K] → [G, 1]."""
  return jnp.where(source >= 0, gates.reshape(-1)[jnp.maximum(source, 0)], 0)[:, None]


def _along(y: jax.Array, z: jax.Array, slot: jax.Array, kept: jax.Array) -> jax.Array:
  """y[slot_k] · z of every token, of y [G, D] and z [T, D], 0 for choices that are not kept: f32 [T, K]."""
  along = [(_at(y, slot[:, k]).astype(jnp.float32) * z).sum(-1) for k in range(slot.shape[1])]
  return jnp.where(kept, jnp.stack(along, axis=1), 0)


def _at(x: jax.Array, rows: jax.Array) -> jax.Array:
  return x.at[rows].get(mode='promise_in_bounds')


def _sum_of_choices(y, slot, kept, gates):
  """Σ_k [gate ·] y[slot_k]; what is not kept may be NaN there and counts 0."""
  total = 0
  for k in range(slot.shape[1]):
    one = _at(y, slot[:, k])
    if gates is not None:
      one = gates[:, k:k + 1] * one
    total = total + jnp.where(kept[:, k:k + 1], one, 0)
  return total.astype(y.dtype)
