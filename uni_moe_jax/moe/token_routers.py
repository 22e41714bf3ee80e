"""Routers that look at tokens: one decision for each, computed by dispatch (`dispatch.py`), and what they are measured by.

token: logits = W x. context: logits = W x + W_c pool, where the pool is a softmax average, by a learnt query, of the tokens that
every token of the sequence may see. x is the state that the projection itself takes, behind the block's norm.
"""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.moe import expert_parallel
from uni_moe_jax.moe.dispatch import Routes
from uni_moe_jax.moe.routers import Choice, entropy

_QUERY_STD = 0.02


def token_noise(key: jax.Array, ids: jax.Array, positions: jax.Array, num_experts: int, noise_std: float) -> jax.Array:
  """[B, S, E] f32, N(0, (noise_std / E)²): one draw per example and position, whatever else is in the batch.

  Args:
    key: of the step, the layer and the router.
    ids: uint32 [B] example ids. positions: int32 [B, S], of the token in its sequence.
  """
  def draw(example, position):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, example), position), (num_experts,))
  draws = jax.vmap(jax.vmap(draw, (None, 0)))(ids, positions)
  return draws * (noise_std / num_experts)


class TokenRouter(nn.Module):
  """Private to one (block, attention | FFN).

  Attributes:
    context: also look at the pool. width: D. num_experts: E. top_k: K. noise_std: as in `Router`.
    mesh: on which tokens lie; None: on one device.
  """
  context: bool
  width: int
  num_experts: int
  top_k: int
  noise_std: float
  mesh: Mesh | None = None

  def setup(self):
    gate = lambda name: self.param(
        name, nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ('embed', 'gate_experts')),
        (self.width, self.num_experts))
    self.gate = gate('gate')
    if self.context:
      self.context_gate = gate('context_gate')
      self.query = self.param(
          'query', nn.with_logical_partitioning(nn.initializers.normal(_QUERY_STD), ('embed',)), (self.width,))

  def pool(self, tokens: tuple[jax.Array, ...], valid: tuple[jax.Array | None, ...]) -> jax.Array:
    """f32 [B, D]: Σ softmax(query · x) x over the unpadded tokens of all arrays together.

    Args:
      tokens: [B, S, D] per array. valid: bool [B, S] per array, None where nothing is padded.
    """
    tokens = [x.astype(jnp.float32) for x in tokens]
    # Not -inf: rows that only fill a batch up have no token at all, and would be NaN.
    least = jnp.finfo(jnp.float32).min
    scores = [x @ self.query if v is None else jnp.where(v, x @ self.query, least) for x, v in zip(tokens, valid)]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=1), axis=1)
    total, start = 0.0, 0
    for x in tokens:
      total = total + jnp.einsum('bs,bsd->bd', weights[:, start:start + x.shape[1]], x)
      start += x.shape[1]
    return total

  def __call__(
      self, x: jax.Array, pool: jax.Array | None, noise_key: jax.Array | None, ids: jax.Array,
      positions: jax.Array) -> Choice:
    """Decides for every token; `noise_key` None means evaluation: no noise.

    Args:
      x: [B, S, D]. pool: [B, D], for a context router. ids, positions: see `token_noise`.
    """
    logits = x.astype(jnp.float32) @ self.gate
    if self.context:
      logits = logits + (pool @ self.context_gate)[:, None]
    if noise_key is not None and self.noise_std > 0:
      logits = logits + token_noise(noise_key, ids, positions, self.num_experts, self.noise_std)
    return expert_parallel.choose(logits, self.top_k, self.mesh)


@flax.struct.dataclass
class Usage:
  """Sums over the unpadded tokens of A kinds of arrays, of one router and call. Layers may be stacked before them.

  Attributes:
    tokens: f32 [A], how many.
    chosen: f32 [A, E], choices of every expert.
    asked: f32 [A], slots that the dispatch was asked for. kept: f32 [A, E], those it gave. The last block's readout asks anew.
    probability: f32 [A, E], of the softmax over all experts. importance: f32 [A, E], of the gates.
    z: f32 [A], of logsumexp(logits)². entropies: f32 [A], of the gates, in nats.
  """
  tokens: jax.Array
  chosen: jax.Array
  asked: jax.Array
  kept: jax.Array
  probability: jax.Array
  importance: jax.Array
  z: jax.Array
  entropies: jax.Array

  @classmethod
  def none(cls, num_experts: int) -> 'Usage':
    """Of no array, without the axis A."""
    one, each = jnp.zeros(()), jnp.zeros((num_experts,))
    return cls(one, each, one, each, each, each, one, one)

  @classmethod
  def of(cls, choice: Choice, to: Routes, valid: jax.Array | None) -> 'Usage':
    """Of one array, without the axis A."""
    B, S, E = choice.logits.shape
    weight = jnp.ones((B, S), jnp.float32) if valid is None else valid.astype(jnp.float32)
    one_hot = jax.nn.one_hot(choice.expert, E, dtype=jnp.float32)
    total = lambda x: jnp.einsum('bs,bse->e', weight, x)
    chosen = total(one_hot.sum(2))
    return cls(
        tokens=weight.sum(), chosen=chosen, asked=chosen.sum(), kept=to.given,
        probability=total(jax.nn.softmax(choice.logits)), importance=total((choice.gates[..., None] * one_hot).sum(2)),
        z=(weight * jax.nn.logsumexp(choice.logits, axis=-1) ** 2).sum(), entropies=(weight * entropy(choice.gates)).sum())

  def again(self, to: Routes) -> 'Usage':
    """The same decision, of which some rows were dispatched once more."""
    return self.replace(asked=self.asked + to.asked.sum().astype(jnp.float32), kept=self.kept + to.given)

  @property
  def used(self) -> jax.Array:
    """int32 [..., E]: how many slots an expert gave."""
    return self.kept.sum(-2).astype(jnp.int32)

  @property
  def entropy(self) -> jax.Array:
    """f32 [...]: mean entropy (nats) of the gates of a token."""
    return self.entropies.sum(-1) / jnp.maximum(self.tokens.sum(-1), 1)

  @property
  def shares(self) -> jax.Array:
    """f32 [..., A, E]: mean gate of every expert over the tokens of a kind of array, summing to 1."""
    return self.importance / jnp.maximum(self.tokens, 1)[..., None]

  @property
  def drop_rate(self) -> jax.Array:
    """f32 [...]: share of the asked slots that capacity did not give."""
    asked = self.asked.sum(-1)
    return (asked - self.kept.sum((-2, -1))) / jnp.maximum(asked, 1)

  @property
  def losses(self) -> dict[str, jax.Array]:
    """Auxiliary losses, f32 [...] each; tokens of all kinds of arrays count together.

    balance: E · Σ_e f_e P_e, with f the share of choices and P the mean probability; 1 when even (GShard; Switch
    Transformer eq. 4, here with f over all K choices). importance: (standard deviation / mean)² of the experts' summed gates
    (Shazeer et al. 2017; V-MoE). z: mean of logsumexp(logits)² (ST-MoE eq. 5). Gradients pass through P, gates and logits.
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
