"""Routers: which experts, with which gates.

gates = top-K of softmax(W_g h + noise), renormalized to sum to 1, in float32 (Uni-Perceiver-MoE, section 3.2, eq. 4-6).
Routers differ in h alone, and return a `RouterOutput`. Three read the *condition* of a segment, not its tokens: they
route each distinct router input once, and the sublayer merges experts. Two read tokens (`token_routers.py`), and the
sublayer dispatches each of them. A new condition router is an entry of `tasks.router_names.CONDITION_ROUTERS`.
"""

import zlib
from collections.abc import Hashable
from typing import Protocol

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from uni_moe_jax.moe.layers import LayerNorm, param
from uni_moe_jax.moe.precision import EXACT
from uni_moe_jax.tasks.attributes import NUM_ATTRIBUTES, Condition, check_bits
from uni_moe_jax.tasks.router_names import CONDITION_ROUTERS, DENSE, DISPATCHED
from uni_moe_jax.utils.errors import UsageError

RouterInput = Hashable  # the part of a condition that a router reads: attribute bits or a name


@flax.struct.dataclass
class RouterOutput:
  """The experts that a router selected, per condition [A] or per token [B, S]."""
  logits: jax.Array  # [..., E] f32, noise included
  expert: jax.Array  # [..., K] int32, best first
  gates: jax.Array  # [..., K] f32, summing to 1

  @property
  def coef(self) -> jax.Array:
    """f32 [..., E]: the gates as coefficients of all experts, K of them not zero."""
    one_hot = jax.nn.one_hot(self.expert, self.logits.shape[-1], dtype=jnp.float32)
    return jnp.einsum('...k,...ke->...e', self.gates, one_hot, precision=EXACT)

  @property
  def used(self) -> jax.Array:
    """int32 [..., E]: how many conditions selected an expert."""
    return (self.coef > 0).astype(jnp.int32).sum(-2)

  @property
  def entropy(self) -> jax.Array:
    """f32 [..., A]: entropy (nats) of a condition's gates."""
    return entropy(self.coef)

  @property
  def shares(self) -> jax.Array:
    """f32 [..., A, E]: a condition's share of every expert, summing to 1."""
    return self.coef


def entropy(shares: jax.Array) -> jax.Array:
  """-Σ p ln p in nats of shares [..., E] that sum to 1 → [...]."""
  return -(shares * jnp.log(jnp.maximum(shares, 1e-20))).sum(-1)


def overlap(shares: jax.Array) -> jax.Array:
  """Σ_e min(p_e, q_e) of shares [..., A, E] → [..., A, A]: 1 for equal shares, 0 for disjoint experts."""
  return jnp.minimum(shares[..., :, None, :], shares[..., None, :, :]).sum(-1)


def effective_experts(shares: jax.Array) -> jax.Array:
  """Effective number of experts, 1 to E: the exponential of the entropy of shares [..., E] → [...]."""
  return jnp.exp(entropy(shares))


def keep_top_k(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
  """(experts, gates) [..., K] of the K most probable experts, best first, from logits [..., E] f32."""
  gates, expert = jax.lax.top_k(jax.nn.softmax(logits), top_k)
  return expert, gates / gates.sum(-1, keepdims=True)


def route(logits: jax.Array, top_k: int) -> RouterOutput:
  """Keeps the K most probable experts of each row. logits: [A, E]."""
  chex.assert_rank(logits, 2)
  logits = logits.astype(jnp.float32)
  return RouterOutput(logits, *keep_top_k(logits, top_k))


def input_hash(router_input: RouterInput) -> int:
  """A stable 32-bit hash: the noise of an input must not depend on the other inputs of the step."""
  return zlib.crc32(repr(router_input).encode())


def input_noise(key: jax.Array, inputs: tuple[RouterInput, ...], num_experts: int, noise_std: float) -> jax.Array:
  """[A, E] f32, N(0, (noise_std / E)²): one draw per router input (V-MoE, and the published gate)."""
  hashes = jnp.asarray([input_hash(x) for x in inputs], jnp.uint32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
  draws = jax.vmap(lambda k: jax.random.normal(k, (num_experts,)))(keys)
  return draws * (noise_std / num_experts)


class AttributeEmbedding(nn.Module):
  """W_a bits + c: [A, D] from A vectors of eight bits."""
  width: int

  @nn.compact
  def __call__(self, inputs: tuple[RouterInput, ...]) -> jax.Array:
    for row in inputs:
      check_bits(row)
    kernel = param(self, 'kernel', nn.initializers.xavier_uniform(), {'attribute': NUM_ATTRIBUTES, 'embed': self.width})
    bias = param(self, 'bias', nn.initializers.zeros, {'embed': self.width})
    return jnp.matmul(jnp.asarray(inputs, jnp.float32), kernel, precision=EXACT) + bias[None]


class NameEmbedding(nn.Module):
  """A learned embedding per name: [A, D]. `names` fixes the order of the table."""
  width: int
  names: tuple[str, ...]

  @nn.compact
  def __call__(self, inputs: tuple[RouterInput, ...]) -> jax.Array:
    missing = [x for x in inputs if x not in self.names]
    if missing:
      raise UsageError(
          f'the router has no embedding for {missing[0]!r}, only for {", ".join(self.names)}. A task type that was '
          'added after training needs attribute or modality routing, or a dense model.')
    table = param(
        self, 'embedding', nn.initializers.normal(0.02), {'router_table': len(self.names), 'embed': self.width})
    return table[jnp.asarray([self.names.index(x) for x in inputs])]


def routes_tokens(router: str) -> bool:
  """Whether the router routes each token, so that tokens are dispatched and kernels not merged."""
  return router in DISPATCHED


def router_input(router: str, condition: Condition) -> RouterInput:
  """The router input of a condition; None in a dense model, where all segments share the one kernel."""
  if router == DENSE:
    return None
  # Token routers read no condition; this says which segments may be joined, and share capacity and statistics.
  return condition.bits if routes_tokens(router) else CONDITION_ROUTERS[router].read(condition)


def distinct_inputs(router: str, conditions: tuple[Condition, ...]) -> tuple[RouterInput, ...]:
  """Distinct router inputs of the conditions, in order of first appearance; (None,) for a dense model."""
  return (None,) if router == DENSE else tuple(dict.fromkeys(router_input(router, c) for c in conditions))


def table_names(router: str, router_tasks: tuple[str, ...]) -> tuple[str, ...]:
  """Names in the router's embedding table, in order; () without one."""
  names = CONDITION_ROUTERS[router].names if router in CONDITION_ROUTERS else None
  return names(router_tasks) if names else ()


class RouterSpec(Protocol):
  """What routers read of `model.spec.ModelSpec`."""
  router: str  # key of `ROUTERS`
  width: int
  num_experts: int
  top_k: int
  noise_std: float  # standard deviation of the training noise times E
  router_names: tuple[str, ...]  # of the embedding table (task and modality routers)
  experts_per_condition: int  # of token routers; 0: all


class ConditionRouter(nn.Module):
  """LN(embed(input)) → gate → top K. Each sublayer of each block has its own."""
  spec: RouterSpec  # its router is a key of `CONDITION_ROUTERS`

  @nn.compact
  def __call__(self, inputs: tuple[RouterInput, ...], noise_key: jax.Array | None) -> RouterOutput:
    """Routes A router inputs; without a noise key (evaluation) there is no noise."""
    spec = self.spec
    if CONDITION_ROUTERS[spec.router].names:
      embedding = NameEmbedding(spec.width, spec.router_names, name='embed')
    else:
      embedding = AttributeEmbedding(spec.width, name='embed')
    h = LayerNorm(name='norm')(embedding(inputs))
    axes = {'embed': spec.width, 'gate_experts': spec.num_experts}
    logits = jnp.matmul(h, param(self, 'gate', nn.initializers.xavier_uniform(), axes), precision=EXACT)
    if noise_key is not None and spec.noise_std > 0:
      logits = logits + input_noise(noise_key, inputs, spec.num_experts, spec.noise_std)
    return route(logits, spec.top_k)
