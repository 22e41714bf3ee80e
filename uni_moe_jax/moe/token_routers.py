"""Routers that read tokens: every token has its own experts, and is dispatched to them.

token: logits = W x. context: logits = W x + W_c pool, where the pool is a softmax average, by a learned query, of the
tokens that every token of the sequence may see. x is the input of the projection itself, after the block's norm.

With `experts_per_condition` P, an attribute router first keeps P experts for the condition of a segment. Its tokens are
routed among these, with logits + log g, where g are the condition's gates: the gates of a token are proportional to the
product of both.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.moe import expert_parallel
from uni_moe_jax.moe.layers import param
from uni_moe_jax.moe.precision import EXACT
from uni_moe_jax.moe.routers import ConditionRouter, RouterInput, RouterOutput, RouterSpec

_QUERY_STD = 0.02
_NEVER = -1e9  # added to logits of experts that a condition does not use; -inf would have no gradient


def token_noise(key: jax.Array, ids: jax.Array, positions: jax.Array, num_experts: int, noise_std: float) -> jax.Array:
  """[B, S, E] f32, N(0, (noise_std / E)²): one draw per example id uint32 [B] and position in its sequence [B, S]."""
  def draw(example, position):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, example), position), (num_experts,))
  draws = jax.vmap(jax.vmap(draw, (None, 0)))(ids, positions)
  return draws * (noise_std / num_experts)


class TokenRouter(nn.Module):
  """Routes every token of a segment. Each sublayer of each block has its own."""
  spec: RouterSpec  # its router is 'token' or 'context'
  mesh: Mesh | None = None

  @property
  def reads_context(self) -> bool:
    """Whether it also reads the pool."""
    return self.spec.router == 'context'

  def setup(self):
    spec = self.spec
    axes, init = {'embed': spec.width, 'gate_experts': spec.num_experts}, nn.initializers.xavier_uniform()
    self.gate = param(self, 'gate', init, axes)
    if self.reads_context:
      self.context_gate = param(self, 'context_gate', init, axes)
      self.query = param(self, 'query', nn.initializers.normal(_QUERY_STD), {'embed': spec.width})
    if spec.experts_per_condition:
      self.condition = ConditionRouter(
          dataclasses.replace(spec, router='attribute', top_k=spec.experts_per_condition, noise_std=0.0))

  def pool(self, segments: tuple[jax.Array, ...], valid: tuple[jax.Array | None, ...]) -> jax.Array:
    """f32 [B, D]: Σ softmax(query · x) x over the tokens of all segments f32 [B, S, D] that are valid (None: all)."""
    # Not -inf: examples that only pad the batch have no valid token, and would be NaN.
    lowest = jnp.finfo(jnp.float32).min

    def score(x, valid):
      s = jnp.matmul(x, self.query, precision=EXACT)
      return s if valid is None else jnp.where(valid, s, lowest)

    weights = jax.nn.softmax(jnp.concatenate([score(x, v) for x, v in zip(segments, valid)], axis=1), axis=1)
    total, start = 0.0, 0
    for x in segments:
      total = total + jnp.einsum('bs,bsd->bd', weights[:, start:start + x.shape[1]], x, precision=EXACT)
      start += x.shape[1]
    return total

  def __call__(
      self, x: jax.Array, bits: RouterInput, pool: jax.Array | None, noise_key: jax.Array | None, ids: jax.Array,
      positions: jax.Array) -> RouterOutput:
    """Routes the tokens x, f32 [B, S, D], of a segment; without a noise key (evaluation) there is no noise.

    Args:
      bits: of the condition of all these tokens. pool: [B, D], for a context router. ids, positions: see
        `token_noise`.
    """
    spec = self.spec
    logits = jnp.matmul(x, self.gate, precision=EXACT)
    if self.reads_context:
      logits = logits + jnp.matmul(pool, self.context_gate, precision=EXACT)[:, None]
    if spec.experts_per_condition:
      gates = self.condition((bits,), None).coef[None]  # [1, 1, E]
      logits = logits + jnp.where(gates > 0, jnp.log(jnp.maximum(gates, 1e-20)), _NEVER)
    if noise_key is not None and spec.noise_std > 0:
      logits = logits + token_noise(noise_key, ids, positions, spec.num_experts, spec.noise_std)
    return expert_parallel.route_tokens(logits, spec.top_k, self.mesh)
