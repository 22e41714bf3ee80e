"""Heads: p(x, y) ∝ exp(cos(f(x), f(y)) / τ) with f = proj(LN(hidden)), and a linear head.

Uni-Perceiver, eq. 1-2. All in float32, because predictions hang on small differences.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uni_moe_jax.moe.layers import LayerNorm, param, xavier_uniform
from uni_moe_jax.moe.precision import EXACT
from uni_moe_jax.parallel import sharding

MAX_SCALE = 100.0
LOG_SCALE = 'log_scale_'  # prefix of the path of a temperature group's parameter
MIN_SQUARE = 1e-24  # (1e-12)²; its power -3/2, a factor of the gradient, is still finite in float32


def normalize(features: jax.Array) -> jax.Array:
  """L2-normalizes the last axis; the zero vector keeps a finite gradient."""
  square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
  return features * jax.lax.rsqrt(jnp.maximum(square, MIN_SQUARE))


def logits(features: jax.Array, targets: jax.Array, scale: jax.Array) -> jax.Array:
  """cos / τ: features [..., D] against targets [V, D], neither normalized → [..., V]."""
  return jnp.matmul(scale * normalize(features), normalize(targets).T, precision=EXACT)


def scale_of(log_scale: jax.Array) -> jax.Array:
  """1/τ, clamped at 100; a clamped scale has no gradient (published)."""
  scale = jnp.exp(log_scale)
  return jnp.where(scale > MAX_SCALE, MAX_SCALE, scale)


class SimilarityHead(nn.Module):
  """LN → projection D × D: hidden [..., D] → features [..., D] f32, not yet normalized."""
  width: int
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    x = LayerNorm(name='norm')(hidden)
    axes = {'embed': self.width, 'feature': self.width}
    kernel = param(self, 'kernel', xavier_uniform(self.width, self.width), axes)
    bias = param(self, 'bias', nn.initializers.zeros, {'feature': self.width})
    kernel = sharding.as_used(kernel, tuple(axes), self.mesh)
    return jnp.matmul(x, kernel, precision=EXACT) + jax.lax.broadcast_to_rank(bias, x.ndim)


class LinearHead(nn.Module):
  """Logits of K classes from features, added to weighted logits of similarity. Starts at zero."""
  classes: int

  @nn.compact
  def __call__(self, features: jax.Array, logits: jax.Array) -> jax.Array:
    """features [..., D], not normalized, logits [..., K] f32 → [..., K]."""
    kernel = param(self, 'kernel', nn.initializers.zeros, {'embed': features.shape[-1], 'class': self.classes})
    bias = param(self, 'bias', nn.initializers.zeros, {'class': self.classes})
    weight = param(self, 'similarity_weight', nn.initializers.ones, {})
    bias = jax.lax.broadcast_to_rank(bias, features.ndim)
    return weight * logits + jnp.matmul(features, kernel, precision=EXACT) + bias
