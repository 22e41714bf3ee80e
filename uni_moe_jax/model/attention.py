"""Attention over keys that lie apart: of a cache, of prompts, of the tokens themselves.

Joining them would copy a cache for every word that is decoded. Instead each part has scores of its own; the softmax is over all of them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# (keys, values [b, N, S, H], as products read them, mask bool [B or 1, 1, Q or 1, S] or None: all may be seen). b divides B, and each
# row of a part serves the B / b rows in a row that share it: the hypotheses about one picture share its keys, all rows those of prompts.
Part = tuple[jax.Array, jax.Array, jax.Array | None]


def heads_first(x: jax.Array) -> jax.Array:
  """[…, S, N, H] → […, N, S, H]."""
  return x.swapaxes(-3, -2)


def attend(q: jax.Array, parts: Sequence[Part]) -> jax.Array:
  """softmax(q kᵀ / √H) v over the keys of all parts together, scores and sums in float32.

  Args:
    q: [B, Q, N, H].
    parts: see `Part`; every query sees a key of some part.

  Returns:
    [B, Q, N, H] of q's type.
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
  k = _for_each(k, q.shape[0])
  (B, Q, N, H), (b, _, S, _) = q.shape, k.shape
  s = jnp.einsum('bqnh,bnsh->bnqs', q.reshape(b, -1, N, H), k, preferred_element_type=jnp.float32) / H**0.5
  return s.reshape(b, N, B // b, Q, S).swapaxes(1, 2).reshape(B, N, Q, S)


def _weighted(w: jax.Array, v: jax.Array) -> jax.Array:
  """w f32 [B, N, Q, S], v [b, N, S, H] → f32 [B, Q, N, H]."""
  v = _for_each(v, w.shape[0])
  (B, N, Q, S), (b, _, _, H) = w.shape, v.shape
  w = w.astype(v.dtype).reshape(b, B // b, N, Q, S).swapaxes(1, 2).reshape(b, N, -1, S)
  return jnp.einsum('bnqs,bnsh->bqnh', w, v, preferred_element_type=jnp.float32).reshape(B, Q, N, H)


def _for_each(x: jax.Array, batch: int) -> jax.Array:
  """A part that serves all rows, once for each: on a mesh, rows that lie unevenly must not be joined (see `decode._repeat`)."""
  return jnp.broadcast_to(x, (batch, *x.shape[1:])) if x.shape[0] == 1 else x
