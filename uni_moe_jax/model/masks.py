"""Attention masks: pure functions of static segments and of padding. True: visible.

Segments with mask 'full' see every full segment. A 'two_stream' segment is a caption [words | queries] of 2n tokens:
word i sees words ≤ i; query i sees words < i and itself; both see every full segment, and no full segment sees them.
Keys are concatenated in the order of `visible_segments`.
"""

import jax
import jax.numpy as jnp
import numpy as np


def visible_segments(masks: tuple[str, ...], index: int) -> tuple[int, ...]:
  """Indices of the segments that a segment may attend to, in order."""
  full = tuple(i for i, m in enumerate(masks) if m == 'full')
  return full if masks[index] == 'full' else tuple(sorted({*full, index}))


def two_stream(num_words: int) -> np.ndarray:
  """bool [2n, 2n]: rows attend to columns, [words | queries] on both axes."""
  word, itself = causal(num_words), np.eye(num_words, dtype=bool)
  return np.block([[word, np.zeros_like(word)], [word & ~itself, itself]])


def causal(num_tokens: int) -> np.ndarray:
  """bool [S, S]: token i sees tokens ≤ i."""
  return np.tril(np.ones((num_tokens, num_tokens), bool))


def attention_mask(
    masks: tuple[str, ...], index: int, lengths: tuple[int, ...], valid: tuple[jax.Array | None, ...],
    queries_only: bool = False) -> jax.Array | None:
  """Mask of the queries of one segment over its concatenated keys.

  Args:
    masks: mask type per segment: 'full', 'two_stream', or 'causal' (one decoding step: [word | query]).
    index: of the attending segment. lengths, valid: S and bool [B, S] per segment, None where nothing is padded.
    queries_only: only the rows of the second half (of a two-stream or causal segment).

  Returns:
    bool [B or 1, 1, Q or 1, K], or None if everything is visible.
  """
  visible = visible_segments(masks, index)
  structure = None
  if masks[index] != 'full':
    own = causal(lengths[index]) if masks[index] == 'causal' else two_stream(lengths[index] // 2)
    if queries_only:
      own = own[lengths[index] // 2:]
    blocks = [own if i == index else np.ones((len(own), lengths[i]), bool) for i in visible]
    structure = np.concatenate(blocks, axis=1)[None, None]
  keys = [valid[i] for i in visible]
  if all(k is None for k in keys):
    return None if structure is None else jnp.asarray(structure)
  batch = next(k.shape[0] for k in keys if k is not None)
  keys = [jnp.ones((batch, lengths[i]), bool) if k is None else k for i, k in zip(visible, keys)]
  padding = jnp.concatenate(keys, axis=1)[:, None, None, :]
  return padding if structure is None else padding & jnp.asarray(structure)
