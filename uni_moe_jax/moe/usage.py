"""How token routers used their experts: sums over tokens, their metrics and auxiliary losses."""

from collections.abc import Iterable

import flax
import jax
import jax.numpy as jnp

from uni_moe_jax.moe.dispatch import DispatchPlan
from uni_moe_jax.moe.precision import EXACT
from uni_moe_jax.moe.routers import RouterOutput, entropy


@flax.struct.dataclass
class Usage:
  """Sums over the unpadded tokens of one router, which add up; `stack` adds an axis A of conditions.

  The last block dispatches the rows of its readout a second time, so that it requests more slots than tokens choose.
  """
  tokens: jax.Array  # f32 [A], number of tokens
  chosen: jax.Array  # f32 [A, E], choices of every expert
  requested: jax.Array  # f32 [A], slots that dispatches requested
  kept: jax.Array  # f32 [A, E], slots that they gave
  probability: jax.Array  # f32 [A, E], of the softmax over all experts
  importance: jax.Array  # f32 [A, E], of the gates
  z: jax.Array  # f32 [A], of logsumexp(logits)²
  entropies: jax.Array  # f32 [A], of the gates, in nats

  @classmethod
  def zero(cls, num_experts: int) -> 'Usage':
    """Usage by no tokens, without the axis A."""
    one, each = jnp.zeros(()), jnp.zeros((num_experts,))
    return cls(one, each, one, each, each, each, one, one)

  @classmethod
  def of_segment(cls, output: RouterOutput, plan: DispatchPlan, valid: jax.Array | None) -> 'Usage':
    """Usage by one segment [B, S], without the axis A."""
    B, S, E = output.logits.shape
    weight = jnp.ones((B, S), jnp.float32) if valid is None else valid.astype(jnp.float32)
    one_hot = jax.nn.one_hot(output.expert, E, dtype=jnp.float32)
    total = lambda x: jnp.einsum('bs,bse->e', weight, x, precision=EXACT)
    chosen = total(one_hot.sum(2))
    return cls(
        tokens=weight.sum(), chosen=chosen, requested=chosen.sum(), kept=plan.slots_given,
        probability=total(jax.nn.softmax(output.logits)), importance=total((output.gates[..., None] * one_hot).sum(2)),
        z=(weight * jax.nn.logsumexp(output.logits, axis=-1) ** 2).sum(),
        entropies=(weight * entropy(output.gates)).sum())

  @classmethod
  def of_repeated_dispatch(cls, plan: DispatchPlan) -> 'Usage':
    """Slots of tokens that are dispatched a second time; the tokens themselves are counted already."""
    return cls.zero(plan.slots_given.shape[0]).replace(
        requested=plan.requested.sum().astype(jnp.float32), kept=plan.slots_given)

  @classmethod
  def stack(cls, usages: Iterable[tuple[int, 'Usage']], num_conditions: int, num_experts: int) -> 'Usage':
    """Sums (condition index, usage) pairs by condition: leaves [A, …]."""
    zero = cls.zero(num_experts)
    sums = [zero] * num_conditions
    for condition, usage in usages:
      sums[condition] = sums[condition] + usage
    return jax.tree.map(lambda *x: jnp.stack(x)[1:], zero, *sums)  # the stack is never empty, A may be 0

  def __add__(self, other: 'Usage') -> 'Usage':
    return jax.tree.map(jnp.add, self, other)

  @property
  def used(self) -> jax.Array:
    """int32 [..., E]: number of slots that an expert gave."""
    return self.kept.sum(-2).astype(jnp.int32)

  @property
  def entropy(self) -> jax.Array:
    """f32 [...]: mean entropy (nats) of the gates of a token."""
    return self.entropies.sum(-1) / jnp.maximum(self.tokens.sum(-1), 1)

  @property
  def shares(self) -> jax.Array:
    """f32 [..., A, E]: mean gate of every expert over the tokens of a condition, summing to 1."""
    return self.importance / jnp.maximum(self.tokens, 1)[..., None]

  @property
  def drop_rate(self) -> jax.Array:
    """f32 [...]: share of the requested slots that capacity denied."""
    requested = self.requested.sum(-1)
    return (requested - self.kept.sum((-2, -1))) / jnp.maximum(requested, 1)

  @property
  def losses(self) -> dict[str, jax.Array]:
    """Auxiliary losses, f32 [...] each, over the tokens of all conditions together.

    balance: E · Σ_e f_e P_e, with f the share of choices and P the mean probability; 1 when even (GShard; Switch
    Transformer eq. 4, here with f over all K choices). importance: (standard deviation / mean)² of the experts' summed
    gates (Shazeer et al. 2017; V-MoE). z: mean of logsumexp(logits)² (ST-MoE eq. 5). Gradients pass through P, gates
    and logits.
    """
    tokens = jnp.maximum(self.tokens.sum(-1), 1)[..., None]
    chosen = self.chosen.sum(-2)
    share = jax.lax.stop_gradient(chosen / jnp.maximum(chosen.sum(-1, keepdims=True), 1))
    importance = self.importance.sum(-2)
    mean = jnp.maximum(importance.mean(-1), 1e-6)
    return {
        'balance': share.shape[-1] * (share * self.probability.sum(-2) / tokens).sum(-1),
        'importance': importance.var(-1) / mean**2,
        'z': self.z.sum(-1) / tokens[..., 0]}
