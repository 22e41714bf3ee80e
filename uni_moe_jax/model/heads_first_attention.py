"""Attention for CPUs: contiguous heads in every product, and weights that the backward pass computes again.

In the layout of `jax.nn.dot_product_attention`, XLA's products on CPU run at a third of their rate, and its gradient
copies weights [B, N, Q, K] to transpose them. Here the backward pass starts from scores of keys by queries, so that
only arrays [B, N, S, H] are transposed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from uni_moe_jax.model.sequences import heads_first
from uni_moe_jax.moe import products
from uni_moe_jax.moe.layers import PRODUCT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(rounded: bool, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """softmax(q kᵀ / √H) v over the visible keys → [B, Q, N, H] in the type of q; scores and sums in float32.

  Args:
    rounded: whether operands of products are rounded to bfloat16, see `products.matmul_rounded`.
    q: [B, Q, N, H]. k, v: [B, K, N, H]. mask: bool [B or 1, 1, Q or 1, K]; None: every key is visible.
  """
  return _forward(rounded, q, k, v, mask)[0]


def _forward(rounded, q, k, v, mask):
  matmul, _ = _matmuls(rounded)
  q, k, v = heads_first(q), heads_first(k), heads_first(v)
  scores = _visible(matmul(_scaled(q), k.mT), mask)
  top = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - top)
  total = weights.sum(-1, keepdims=True)
  out = heads_first((matmul(weights.astype(v.dtype), v) / total).astype(q.dtype))
  out, top, total = (checkpoint_name(x, PRODUCT) for x in (out, top, total))
  return out, (q, k, v, mask, out, top, total)


def _backward(rounded, saved, d_out):
  matmul, transposed_matmul = _matmuls(rounded)
  q, k, v, mask, out, top, total = saved
  # Of softmax's gradient: Σ_k weight_k · d_weight_k.
  mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)[:, :, None]  # [B, N, 1, Q]
  mean = jax.lax.optimization_barrier(mean)  # otherwise XLA computes it again for every key
  d_out = heads_first(d_out)
  scores = _visible(matmul(k, _scaled(q).mT), None if mask is None else mask.mT)  # [B, N, K, Q], as all that follow
  weights = jnp.exp(scores - top.mT) / total.mT
  d_v = matmul(weights.astype(v.dtype), d_out)
  d_scores = (weights * (matmul(v, d_out.mT) - mean)).astype(q.dtype)
  d_k = matmul(d_scores, _scaled(q))
  d_q = _scaled(transposed_matmul(k, d_scores).mT)
  return (*(heads_first(x).astype(q.dtype) for x in (d_q, d_k, d_v)), None)


attend.defvjp(_forward, _backward)


def _scaled(q: jax.Array) -> jax.Array:
  return (q.astype(jnp.float32) * q.shape[-1]**-0.5).astype(q.dtype)


def _visible(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
  # A finite number: a row of padding sees no key, and must not become NaN.
  return scores if mask is None else jnp.where(mask, scores, -0.7 * jnp.finfo(scores.dtype).max)


def _matmuls(rounded: bool) -> tuple[Callable, Callable]:
  """(x y, xᵀ y) with float32 results."""
  if rounded:
    return products.matmul_rounded, products.transposed_matmul_rounded
  matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  return matmul, lambda x, y: matmul(x.mT, y)
