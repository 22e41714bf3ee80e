"""Prompts: what tuning adds to a finished model. Few parameters, all of them beside the model's own.

Deep prompts are P rows per layer that every token may look at: they go through the layer's own norm and its projection to
keys and values, are put before the other keys, and never become tokens themselves (published; the condition is that of the
sequence's first segment). The linear head adds its logits to those of similarity.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from uni_moe_jax.model.spec import ModelSpec

SIDES = ('shared', 'separate')
_STD = 0.02


class DeepPrompts(nn.Module):
  """The rows of one layer: one table for both sides, or one for each."""
  spec: ModelSpec

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    """([1, P, D] for the input side, [1, P, D] for the target side)."""
    def table(name):
      return self.param(name, nn.with_logical_partitioning(nn.initializers.normal(_STD), ('prompt', 'embed')),
                        (self.spec.prompts, self.spec.width))[None]
    inputs = table('input')
    return inputs, table('target') if self.spec.prompt_sides == 'separate' else inputs


def put_before(
    prompt: tuple[jax.Array, jax.Array], cached: tuple[jax.Array, jax.Array] | None, past_valid: jax.Array | None,
    batch: int) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
  """Prompts as keys and values before those of a cache.

  Args:
    prompt: keys and values [1, P, N, H]. cached: the same of earlier tokens [B, S, N, H], or None.
    past_valid: bool [B, S] of the cache, or None.
    batch: B.

  Returns:
    (keys and values [B, P + S, N, H], bool [B, P + S] or None where all are valid).
  """
  wide = tuple(jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in prompt)
  if cached is None:
    return wide, None
  joined = tuple(jnp.concatenate([p, c.astype(p.dtype)], axis=1) for p, c in zip(wide, cached))
  if past_valid is not None:
    past_valid = jnp.concatenate([jnp.ones((batch, prompt[0].shape[1]), bool), past_valid], axis=1)
  return joined, past_valid


class LinearHead(nn.Module):
  """Logits of K classes from features that are not normalised, added to weighted logits of similarity. Starts at zero."""
  classes: int

  @nn.compact
  def __call__(self, features: jax.Array, logits: jax.Array) -> jax.Array:
    """features [..., D], logits [..., K] f32 → [..., K]."""
    width = features.shape[-1]
    kernel = self.param('kernel', nn.with_logical_partitioning(nn.initializers.zeros, ('embed', 'class')),
                        (width, self.classes))
    bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('class',)), (self.classes,))
    weight = self.param('similarity_weight', nn.with_logical_partitioning(nn.initializers.ones, ()), ())
    return weight * logits + features @ kernel + bias.reshape((1,) * (features.ndim - 1) + (-1,))
