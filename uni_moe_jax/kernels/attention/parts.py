"""Attention to keys and values in separate parts: of a cache, of prompts, of the tokens themselves."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# (keys, values [b, N, S, H] in the order of the products, mask bool [B or 1, 1, Q or 1, S] or None: all visible). b
# divides B, and each row serves B / b consecutive examples: hypotheses about one image share its keys, all examples
# those of prompts.
KeysValues = tuple[jax.Array, jax.Array, jax.Array | None]


def attend(q: jax.Array, parts: Sequence[KeysValues]) -> jax.Array:
  """softmax(q kᵀ / √H) v over the keys of all parts together, scores and sums in float32.

  Concatenation would copy a cache for every decoded word. Instead each part has its own scores, under one softmax.

  q and the result are [B, Q, N, H] of one type; every query must see a key of some part.
  """
  scores = [_scores(q, k) for k, _, _ in parts]
  scores = [s if mask is None else jnp.where(mask, s, -jnp.inf) for s, (_, _, mask) in zip(scores, parts, strict=True)]
  top = jax.lax.stop_gradient(jnp.stack([s.max(-1) for s in scores]).max(0))[..., None]
  weights = [jnp.exp(s - top) for s in scores]
  out = sum(_weighted(w, v) for w, (_, v, _) in zip(weights, parts, strict=True))
  total = sum(w.sum(-1) for w in weights)  # [B, N, Q]
  return (out / total.swapaxes(1, 2)[..., None]).astype(q.dtype)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """q [B, Q, N, H], k [b, N, S, H] → f32 [B, N, Q, S]."""
  k = _per_example(k, q.shape[0])
  (B, Q, N, H), (b, _, S, _) = q.shape, k.shape
  s = jnp.einsum('bqnh,bnsh->bnqs', q.reshape(b, -1, N, H), k, preferred_element_type=jnp.float32) / H**0.5
  return s.reshape(b, N, B // b, Q, S).swapaxes(1, 2).reshape(B, N, Q, S)


def _weighted(w: jax.Array, v: jax.Array) -> jax.Array:
  """w f32 [B, N, Q, S], v [b, N, S, H] → f32 [B, Q, N, H]."""
  v = _per_example(v, w.shape[0])
  (B, N, Q, S), (b, _, _, H) = w.shape, v.shape
  w = w.astype(v.dtype).reshape(b, B // b, N, Q, S).swapaxes(1, 2).reshape(b, N, -1, S)
  # Transposed afterwards: of 'bqnh' einsum makes a product of transposed operands, for which XLA's CPU backend has only
  # a loop, ten times as slow.
  y = jnp.einsum('bnqs,bnsh->bnqh', w, v, preferred_element_type=jnp.float32)
  return y.swapaxes(1, 2).reshape(B, Q, N, H)


def _per_example(x: jax.Array, batch: int) -> jax.Array:
  """Repeats a part that all examples share: a mesh must not join uneven rows (see `model.decoding`).

  In float32, as the gradient of a shared part is a sum over examples.
  """
  if x.shape[0] != 1:  # symbolic sizes have no order
    return x
  return jnp.broadcast_to(x.astype(jnp.float32), (batch, *x.shape[1:])).astype(x.dtype)
