"""Attention masks: pure functions of static segments and of padding. True = may look.

Segments with mask 'full' see every full segment. A 'two_stream' segment is a caption [words | queries] of 2n tokens:
word i sees words ≤ i; query i sees words < i and itself; both see every full segment, none of which looks back.
Keys are joined in the order of the arrays that `visible_segments` lists.
"""

import jax
import jax.numpy as jnp
import numpy as np


def visible_segments(masks: tuple[str, ...], index: int) -> tuple[int, ...]:
  """Indices of the arrays whose tokens array `index` may look at, in order."""
  full = tuple(i for i, m in enumerate(masks) if m == 'full')
  return full if masks[index] == 'full' else tuple(sorted({*full, index}))


def two_stream(num_words: int) -> np.ndarray:
  """bool [2n, 2n]: rows look at columns, [words | queries] on both axes."""
  word, query = np.tril(np.ones((num_words, num_words), bool)), np.eye(num_words, dtype=bool)
  before = np.tril(np.ones((num_words, num_words), bool), -1)
  return np.block([[word, np.zeros_like(word)], [before, query]])


def causal(num_tokens: int) -> np.ndarray:
  """bool [S, S]: token i sees tokens ≤ i."""
  return np.tril(np.ones((num_tokens, num_tokens), bool))


def attention_mask(
    masks: tuple[str, ...],
    index: int,
    lengths: tuple[int, ...],
    valid: tuple[jax.Array | None, ...],
    queries_only: bool = False,
) -> jax.Array | None:
  """Mask of the queries of one array over its joined keys.

  Args:
    masks: mask kind per array: 'full', 'two_stream', or 'causal' (one decoding pass: [word | query]).
    index: the array that asks.
    lengths: S per array.
    valid: bool [B, S] per array, or None where nothing is padded.
    queries_only: only the rows of the second half (of a two-stream or causal array).

  Returns:
    bool [B or 1, 1, Q or 1, K], or None when everything may be seen.
  """
  seen = visible_segments(masks, index)
  structure = None
  if masks[index] != 'full':
    own = {'two_stream': lambda n: two_stream(n // 2), 'causal': causal}[masks[index]](lengths[index])
    if queries_only:
      own = own[lengths[index] // 2:]
    blocks = [own if i == index else np.ones((len(own), lengths[i]), bool) for i in seen]
    structure = np.concatenate(blocks, axis=1)[None, None]
  keys, sizes = [valid[i] for i in seen], [lengths[i] for i in seen]
  if all(k is None for k in keys):
    return None if structure is None else jnp.asarray(structure)
  batch = next(k.shape[0] for k in keys if k is not None)
  padding = jnp.concatenate(
      [jnp.ones((batch, n), bool) if k is None else k for k, n in zip(keys, sizes)], axis=1)[:, None, None, :]
  return padding if structure is None else padding & jnp.asarray(structure)
