"""Dispatch, for token routers: every token to its own K experts, and back.

y_t = Σ_k g_{t,k} (x_t W_{e(t,k)} + b_{e(t,k)}), over the choices that are kept. Choices are numbered t · K + k; a
*slot* is the row of a choice in the input of the grouped matmul. All projections of a sublayer share the slots.
"""

import functools
import math

import flax
import jax
import jax.numpy as jnp

from uni_moe_jax.kernels import gmm
from uni_moe_jax.kernels.gmm import tiled as gmm_tiled
from uni_moe_jax.kernels.projection import add_bias
from uni_moe_jax.moe.precision import EXACT
from uni_moe_jax.moe.routers import RouterOutput


@flax.struct.dataclass
class DispatchPlan:
  """The slots of the choices of T = B · S tokens.

  On a mesh every device has its own plan, and plans are concatenated on the first axis; `sizes` are [devices, E] then,
  and `requested` [devices].
  """
  slot: jax.Array  # int32 [T, K], of a choice; arbitrary where it is not kept
  kept: jax.Array  # bool [T, K]: neither padding nor over capacity
  source: jax.Array  # int32 [G], the choice in a slot; -1 in an empty slot
  sizes: jax.Array  # int32 [E], kept choices of every expert
  requested: jax.Array  # int32 scalar, choices of unpadded tokens
  gates: jax.Array  # f32 [T, K]
  coef: jax.Array  # f32 [T, E], the kept gates as coefficients
  backend: str = flax.struct.field(pytree_node=False)  # of the grouped matmul, see `gmm.py`
  transport: str = flax.struct.field(pytree_node=False, default='local')  # see `expert_parallel.py`
  # Number of devices over which experts are sharded, if each counts only its own; otherwise 1.
  expert_shards: int = flax.struct.field(pytree_node=False, default=1)

  @property
  def slots(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(source, slot, kept): where each choice is, for `permute` and `combine`."""
    return self.source, self.slot, self.kept

  @property
  def slots_given(self) -> jax.Array:
    """f32 [E], slots that every expert gave, over all devices."""
    E = self.sizes.shape[-1]
    return self.sizes.reshape(-1, self.expert_shards, E).sum(0).reshape(-1).astype(jnp.float32)


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
  """Slots per expert: C = ⌈f · K · tokens / E⌉, at most `tokens`; factor 0: `tokens`.

  C follows from static, padded shapes alone: real lengths would leak the future of a caption.
  """
  # Rounded first: 1.1 · 2 · 200 / 8 is 55.00000000000001.
  return min(tokens, math.ceil(round(factor * top_k * tokens / num_experts, 9))) if factor else tokens


def make_plan(
    output: RouterOutput, valid: jax.Array | None, groups: int, capacity_factor: float, backend: str) -> DispatchPlan:
  """Assigns slots to the choices of a segment.

  Args:
    output: of [B, S] tokens. Its logits determine E; choices of other experts are not kept.
    valid: bool [B, S], None where nothing is padded. Padding is neither routed nor counted.
    groups: into how many equal runs of positions S is split, each with its own capacity (2 for [words | queries]).
    capacity_factor: f, or 0 for exact routing. Slots are given position by position over the batch, so that a later
      position never takes a slot from an earlier one of any example; at one position first choices come first.
    backend: one of `GMM_BACKENDS`, 'auto', 'xla', `gmm.PORTABLE` or `gmm.EVERY_EXPERT`.
  """
  B, S, K = output.expert.shape
  E = output.logits.shape[-1]
  backend = gmm.choose(backend, bool(capacity_factor), None)
  n = S // groups
  capacity = capacity_of(capacity_factor, B * n, K, E)
  by_position = lambda x: x.reshape(B, groups, n, K).transpose(1, 2, 3, 0).reshape(groups, n * K * B)
  by_token = lambda x: x.reshape(groups, n, K, B).transpose(3, 0, 1, 2).reshape(B * S, K)

  expert = by_position(output.expert)
  one_hot = jax.nn.one_hot(expert, E, dtype=jnp.int32)
  if valid is not None:
    one_hot = one_hot * by_position(jnp.broadcast_to(valid[..., None], (B, S, K)))[..., None]
  rank = (one_hot * (jnp.cumsum(one_hot, axis=1) - one_hot)).sum(-1)  # among the choices of this expert in this group
  kept = (one_hot.sum(-1) > 0) & (rank < capacity)
  count = jnp.minimum(one_hot.sum(1), capacity)  # [groups, E]
  sizes = count.sum(0)
  if backend == 'batched':
    rows = gmm.group_rows(groups * capacity)
    start, num_slots = jnp.arange(E, dtype=jnp.int32) * rows, E * rows
  else:
    start, num_slots = jnp.cumsum(sizes) - sizes, gmm.num_rows(backend, min(B * S * K, E * groups * capacity))
  start = start[None] + jnp.cumsum(count, axis=0) - count  # [groups, E]
  slot = by_token(jnp.take_along_axis(start, expert, axis=1) + rank)
  kept = by_token(kept)
  choice = jnp.arange(B * S * K, dtype=jnp.int32).reshape(B * S, K)
  source = jnp.full((num_slots,), -1, jnp.int32).at[jnp.where(kept, slot, num_slots)].set(choice, mode='drop')
  gates = output.gates.reshape(B * S, K)
  expert_of_token = jax.nn.one_hot(output.expert.reshape(B * S, K), E, dtype=jnp.float32)
  coef = (jnp.where(kept, gates, 0)[..., None] * expert_of_token).sum(1)
  return DispatchPlan(jnp.where(kept, slot, 0), kept, source, sizes, one_hot.sum(), gates, coef, backend)


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array, plan: DispatchPlan) -> jax.Array:
  """x [B, S, *in] through experts, kernel [E, *in, *out], bias [E, *out] → [B · S, *out].

  A token without a kept choice gets 0.
  """
  B, S = x.shape[:2]
  out = kernel.shape[x.ndim - 1:]
  E, width = kernel.shape[0], math.prod(out)
  x, kernel, bias = x.reshape(B * S, -1), kernel.reshape(E, -1, width), bias.reshape(E, width)

  def tiled(x, kernel, bias, plan):
    gates, tokens = _gates_of_slots(plan.gates, plan.source)[:, 0], _token_numbers(plan.source, plan.slot)
    return gmm_tiled.routed_matmul(x, kernel, gates, _bias_of_tokens(plan.coef, bias), tokens, plan.sizes)

  def through_experts(x, kernel, bias, plan):
    return _through_experts(plan.backend, x, kernel, bias, plan.gates, plan.coef, plan.slots, plan.sizes)

  if plan.backend == gmm.EVERY_EXPERT:
    y = jnp.einsum('te,etf->tf', plan.coef, jnp.einsum('td,edf->etf', x, kernel)).astype(x.dtype)
    y = add_bias(y, _bias_of_tokens(plan.coef, bias))
  else:
    y = gmm.by_backend(plan.backend, tiled, through_experts, x, kernel, bias, plan)
  return y.reshape(B * S, *out)


# Both directions are gathers, in the forward and the backward pass: a scatter of all rows at once is slow.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through_experts(backend, x, kernel, bias, gates, coef, slots, sizes):
  """Σ_k gate · (x W_e + b_e) over a token's kept choices: [T, D], [E, D, F], f32 [E, F] → [T, F].

  The gradient of a gate, x W_e · dy, is computed as x · (dy W_eᵀ), whose right side makes dx anyway. So the backward
  pass does not need the outputs of experts, and a rematerialized block does not compute them again.
  """
  source, slot, kept = slots
  y = gmm.grouped_matmul(_tokens_of_slots(x, source, slot), kernel, sizes, backend)
  if backend != 'batched':
    return _sum_of_choices(y, slot, kept, gates, _bias_of_tokens(coef, bias))
  # Here a bias is cheaper in slots than as an array f32 [T, F]: it is a part of the product.
  y = add_bias(y.reshape(len(bias), -1, y.shape[1]), bias[:, None]).reshape(y.shape)
  return _sum_of_choices(y, slot, kept, gates)


def _through_experts_backward(backend, saved, dy):
  x, kernel, bias, gates, coef, (source, slot, kept), sizes = saved
  # Of x's type: XLA for TPUs would write the float32 product to memory.
  rows = _gates_of_slots(gates, source).astype(x.dtype) * _tokens_of_slots(x, source, slot)
  dys = jnp.where(source[:, None] >= 0, _tokens_of_slots(dy, source, slot), 0)
  _, pull_back = jax.vjp(lambda rows, kernel: gmm.grouped_matmul(rows, kernel, sizes, backend), rows, kernel)
  dxs, dkernel = pull_back(dys)
  _, pull_back = jax.vjp(_bias_of_tokens, coef, bias)
  dcoef, dbias = pull_back(dy.astype(jnp.float32))
  return (_sum_of_choices(dxs, slot, kept, gates), dkernel, dbias, _dot_per_choice(dxs, x, slot, kept), dcoef, None,
          None)


_through_experts.defvjp(lambda *operands: (_through_experts(*operands), operands[1:]), _through_experts_backward)


def _bias_of_tokens(coef: jax.Array, bias: jax.Array) -> jax.Array:
  """Σ_k gate · b_e of every token: f32 [T, E], [E, F] → [T, F]."""
  return jnp.matmul(coef, bias, precision=EXACT)


@jax.custom_vjp
def permute(x: jax.Array, slots: tuple[jax.Array, ...]) -> jax.Array:
  """Tokens [T, D] in the slots of their choices (`DispatchPlan.slots`): [G, D]. Empty slots have arbitrary values."""
  source, slot, _ = slots
  return _tokens_of_slots(x, source, slot)


permute.defvjp(lambda x, slots: (permute(x, slots), slots[1:]), lambda saved, dy: (_sum_of_choices(dy, *saved), None))


@jax.custom_vjp
def combine(y: jax.Array, gates: jax.Array, slots: tuple[jax.Array, ...]) -> jax.Array:
  """Σ_k gate · y over the kept choices of every token: [G, F] → [T, F]."""
  _, slot, kept = slots
  return _sum_of_choices(y, slot, kept, gates)


def _combine_backward(saved, dy):
  y, gates, (source, slot, kept) = saved
  dys = (_gates_of_slots(gates, source) * _tokens_of_slots(dy, source, slot)).astype(y.dtype)
  return dys, _dot_per_choice(y, dy, slot, kept), None


combine.defvjp(lambda *operands: (combine(*operands), operands), _combine_backward)


def _tokens_of_slots(x: jax.Array, source: jax.Array, slot: jax.Array) -> jax.Array:
  """The token [D] of x [T, D] in every slot, an arbitrary one in empty slots: [G, D]."""
  return gmm_tiled.take(x, _token_numbers(source, slot))


def _token_numbers(source: jax.Array, slot: jax.Array) -> jax.Array:
  """The number of the token in every slot, an arbitrary one in empty slots: int32 [G]."""
  return jnp.maximum(source, 0) // slot.shape[1]


def _gates_of_slots(gates: jax.Array, source: jax.Array) -> jax.Array:
  """The gate of the choice in every slot, 0 in empty slots: [T, K] → [G, 1]."""
  return jnp.where(source >= 0, gates.reshape(-1)[jnp.maximum(source, 0)], 0)[:, None]


def _dot_per_choice(y: jax.Array, z: jax.Array, slot: jax.Array, kept: jax.Array) -> jax.Array:
  """y[slot_k] · z of every token, of y [G, D] and z [T, D], 0 for choices that are not kept: f32 [T, K]."""
  dots = [(gmm_tiled.take(y, slot[:, k]).astype(jnp.float32) * z).sum(-1) for k in range(slot.shape[1])]
  return jnp.where(kept, jnp.stack(dots, axis=1), 0)


def _sum_of_choices(y, slot, kept, gates=None, bias=0):
  """bias + Σ_k [gate ·] y[slot_k]; choices that are not kept may be NaN in y and count as 0. bias: f32 [T, F]."""
  total = bias
  for k in range(slot.shape[1]):
    rows = gmm_tiled.take(y, slot[:, k])
    if gates is not None:
      rows = gates[:, k:k + 1] * rows
    total = total + jnp.where(kept[:, k:k + 1], rows, 0)
  # Otherwise XLA would leave out the rounding, and write the float32 sum to memory.
  return jax.lax.optimization_barrier(total.astype(y.dtype))
