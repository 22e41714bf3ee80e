"""Routers: which experts, with which coefficients. A router decides; `experts.py` computes.

coef = top-K of softmax(W_g h + noise), renormalised to sum 1, in float32 (Uni-Perceiver-MoE, section 3.2, eq. 4-6).
The routers differ in h alone. Three look at the *condition* of an array, not at its tokens, so that there is one decision
per distinct router input (a *row*); two look at tokens (`token_routers.py`), and decide for each. A new one is a function
of the condition and an entry of `ROUTERS`.
"""

import dataclasses
import zlib
from collections.abc import Callable, Hashable

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from uni_moe_jax.tasks.attributes import NUM_ATTRIBUTES, Condition
from uni_moe_jax.tasks.router_names import DENSE
from uni_moe_jax.utils.errors import UsageError

RouterInput = Hashable
NORM_EPSILON = 1e-5


@flax.struct.dataclass
class Decision:
  """What a router decided for A condition rows.

  Attributes:
    logits: [A, E] f32, as routed (noise included).
    expert: [A, K] int32, best first.
    coef: [A, E] f32, K non-zeros a row, summing to 1.
  """
  logits: jax.Array
  expert: jax.Array
  coef: jax.Array

  @property
  def used(self) -> jax.Array:
    """int32 [..., E]: how many rows chose an expert."""
    return (self.coef > 0).astype(jnp.int32).sum(-2)

  @property
  def entropy(self) -> jax.Array:
    """f32 [..., A]: entropy (nats) of a row's kept coefficients."""
    return entropy(self.coef)

  @property
  def shares(self) -> jax.Array:
    """f32 [..., A, E]: what a row takes of every expert, summing to 1."""
    return self.coef


@flax.struct.dataclass
class Choice:
  """What a router that looks at tokens decided for an array of them.

  Attributes:
    logits: [B, S, E] f32, as routed (noise included).
    expert: [B, S, K] int32, best first.
    gates: [B, S, K] f32, summing to 1.
  """
  logits: jax.Array
  expert: jax.Array
  gates: jax.Array


def entropy(shares: jax.Array) -> jax.Array:
  """[..., E] that sum to 1 → [...], -Σ p ln p in nats. Its exponential is how many experts are used, in effect."""
  return -(shares * jnp.log(jnp.maximum(shares, 1e-20))).sum(-1)


def overlap(shares: jax.Array) -> jax.Array:
  """[..., A, E] that sum to 1 over experts → [..., A, A]: Σ_e min(p_e, q_e). 1: the same use; 0: no expert in common."""
  return jnp.minimum(shares[..., :, None, :], shares[..., None, :, :]).sum(-1)


def effective_experts(shares: jax.Array) -> jax.Array:
  """[..., E] that sum to 1 → [...]: the exponential of their entropy, how many experts are used in effect: 1 to E."""
  return jnp.exp(entropy(shares))


def keep_top_k(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
  """The K most probable experts, best first, and their probabilities, renormalised: logits [..., E] f32 → [..., K] twice."""
  gates, expert = jax.lax.top_k(jax.nn.softmax(logits), top_k)
  return expert, gates / gates.sum(-1, keepdims=True)


def decide(logits: jax.Array, top_k: int) -> Decision:
  """Keeps the K most probable experts and renormalises their probabilities. logits: [A, E]."""
  chex.assert_rank(logits, 2)
  logits = logits.astype(jnp.float32)
  expert, gates = keep_top_k(logits, top_k)
  coef = jnp.einsum('ak,ake->ae', gates, jax.nn.one_hot(expert, logits.shape[-1], dtype=jnp.float32))
  return Decision(logits=logits, expert=expert, coef=coef)


def input_hash(row: RouterInput) -> int:
  """A stable 32-bit value of a row (its bits or its name): the noise of a row must not depend on which other
  rows share the step."""
  return zlib.crc32(repr(row).encode())


def input_noise(key: jax.Array, rows: tuple[RouterInput, ...], num_experts: int, noise_std: float) -> jax.Array:
  """[A, E] f32, N(0, (noise_std / E)²): one draw per row value (V-MoE, and the published gate)."""
  hashes = jnp.asarray([input_hash(r) for r in rows], jnp.uint32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
  draws = jax.vmap(lambda k: jax.random.normal(k, (num_experts,)))(keys)
  return draws * (noise_std / num_experts)


class AttributeEmbedding(nn.Module):
  """LN(W_a bits + c): [A, D] from rows of eight bits."""
  width: int
  names: tuple[str, ...]

  @nn.compact
  def __call__(self, rows: tuple[RouterInput, ...]) -> jax.Array:
    kernel = self.param(
        'kernel', nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ('attribute', 'embed')),
        (NUM_ATTRIBUTES, self.width))
    bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)), (self.width,))
    return jnp.asarray(rows, jnp.float32) @ kernel + bias[None]


class NameEmbedding(nn.Module):
  """A learnt embedding per name: [A, D]. `names` fixes the order of the table."""
  width: int
  names: tuple[str, ...]

  @nn.compact
  def __call__(self, rows: tuple[RouterInput, ...]) -> jax.Array:
    missing = [r for r in rows if r not in self.names]
    if missing:
      raise UsageError(
          f'the router has no embedding for {missing[0]!r}; it knows {", ".join(self.names)}. A kind that was added '
          'after training needs attribute or modality routing, or a dense model.')
    table = self.param(
        'embedding', nn.with_logical_partitioning(nn.initializers.normal(0.02), ('router_table', 'embed')),
        (len(self.names), self.width))
    return table[jnp.asarray([self.names.index(r) for r in rows])]


@dataclasses.dataclass(frozen=True)
class RouterKind:
  """row: the part of a condition that the router sees. embed: module class giving h before its LayerNorm; None of a router
  that looks at tokens, whose rows only tell arrays apart: those of one row may join, and share capacity and statistics."""
  row: Callable[[Condition], RouterInput]
  embed: type[nn.Module] | None


ROUTERS: dict[str, RouterKind] = {
    'attribute': RouterKind(lambda c: c.bits, AttributeEmbedding),
    'task': RouterKind(lambda c: c.task, NameEmbedding),
    'modality': RouterKind(lambda c: c.modality, NameEmbedding),
    'token': RouterKind(lambda c: c.bits, None),
    'context': RouterKind(lambda c: c.bits, None),
}


def routes_tokens(router: str) -> bool:
  """Whether every token has its own decision, so that tokens are dispatched and kernels not merged."""
  return router != DENSE and ROUTERS[router].embed is None


def distinct_inputs(router: str, conditions: tuple[Condition, ...]) -> tuple[RouterInput, ...]:
  """Distinct router inputs of the conditions, in order of first appearance; one row for a dense model."""
  if router == DENSE:
    return (None,)
  return tuple(dict.fromkeys(ROUTERS[router].row(c) for c in conditions))


def router_input(router: str, condition: Condition) -> RouterInput:
  """The router input of one condition (None for a dense model: every array shares the one kernel)."""
  return None if router == DENSE else ROUTERS[router].row(condition)


def table_names(router: str, router_tasks: tuple[str, ...], modalities: tuple[str, ...]) -> tuple[str, ...]:
  """Names that the router's embedding table holds, in order."""
  return {'task': router_tasks, 'modality': modalities}.get(router, ())


class Router(nn.Module):
  """LN(embed(row)) → gate → decision; private to one (block, attention | FFN).

  Attributes:
    kind: key of `ROUTERS`.
    width: D. num_experts: E. top_k: K.
    noise_std: standard deviation of the training noise times E.
    names: names of the embedding table (routers by name).
  """
  kind: str
  width: int
  num_experts: int
  top_k: int
  noise_std: float
  names: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, rows: tuple[RouterInput, ...], noise_key: jax.Array | None) -> Decision:
    """Decides for A rows; `noise_key` None means evaluation: no noise."""
    h = ROUTERS[self.kind].embed(self.width, self.names, name='embed')(rows)
    h = nn.LayerNorm(
        epsilon=NORM_EPSILON, use_fast_variance=False, name='norm',
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)))(h)
    gate = self.param(
        'gate', nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ('embed', 'gate_experts')),
        (self.width, self.num_experts))
    logits = h @ gate
    if noise_key is not None and self.noise_std > 0:
      logits = logits + input_noise(noise_key, rows, self.num_experts, self.noise_std)
    return decide(logits, self.top_k)
