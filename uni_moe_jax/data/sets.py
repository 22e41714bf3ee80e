"""Target sets as arrays: tokenised once, in buckets of like length.

Most entries of a set are shorter than its longest; rows of one length are encoded together, which is exact and, for class
names, saves about a third of the target side.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from uni_moe_jax.plan import SetSpec
from uni_moe_jax.data.examples import TextTable, text_rows
from uni_moe_jax.data.tokenizer import Tokenizer

BUCKETS = (4, 8, 16, 32, 64, 128, 256, 512)  # tokens; an entry lies in the smallest that holds it
MERGE_BELOW = 16  # entries: a smaller bucket is not worth a shape of its own and joins the next longer one


@dataclasses.dataclass(frozen=True)
class TargetSet:
  """One set.

  Attributes:
    buckets: {'text' int32 [n, S], 'valid' bool [n, S]} per length; empty for the vocabulary, whose rows are [v, eot].
    order: int32 [V], place of each entry in the concatenated buckets.
    texts: the entries ('' for the vocabulary).
    size: V.
  """
  buckets: tuple[dict[str, np.ndarray], ...]
  order: np.ndarray
  texts: tuple[str, ...]
  size: int


def build_set(spec: SetSpec, texts: tuple[str, ...], tokenizer: Tokenizer) -> TargetSet:
  """Tokenises and buckets a set.

  Raises:
    ValueError: there is no entry, one is longer than the set's length, or two are the same text.
  """
  if spec.is_vocabulary:
    return TargetSet((), np.arange(tokenizer.size, dtype=np.int32), (), tokenizer.size)
  if not texts:
    raise ValueError(f'config.sets.{spec.name} has no entries; give its values at least one text.')
  if len(set(texts)) < len(texts):
    twice = next(t for t in texts if texts.count(t) > 1)
    raise ValueError(f'config.sets.{spec.name}: entry {twice!r} occurs twice.')
  whole = [tokenizer.encode(t) + [tokenizer.eot] for t in texts]
  longest = max(whole, key=len)
  if len(longest) > spec.length:
    raise ValueError(f'config.sets.{spec.name}.length={spec.length} is too short for {tokenizer.decode(longest)!r}, '
                     f'which has {len(longest)} tokens; raise it to {len(longest)}.')
  buckets, order = bucket_rows(text_rows(texts, tokenizer, spec.length), tokenizer.pad)
  return TargetSet(buckets, order, texts, len(texts))


def bucket_rows(rows: Sequence[Sequence[int]], pad: int) -> tuple[tuple[dict[str, np.ndarray], ...], np.ndarray]:
  """(buckets, order) of tokenised entries; see `TargetSet`."""
  bucket = np.searchsorted(BUCKETS, [len(r) for r in rows])
  for b in np.unique(bucket)[:-1]:
    if (bucket == b).sum() < MERGE_BELOW:
      bucket[bucket == b] = bucket[bucket > b].min()
  buckets, members = [], []
  for b in np.unique(bucket):
    index = np.flatnonzero(bucket == b)
    table = TextTable.of([rows[i] for i in index], max(len(rows[i]) for i in index), pad)
    buckets.append({'text': table.ids, 'valid': table.valid})
    members.append(index)
  order = np.empty(len(rows), np.int32)
  order[np.concatenate(members)] = np.arange(len(rows))
  return tuple(buckets), order
