"""Target sets as arrays: tokenised once, in buckets of like length.

Most entries of a set are shorter than its longest; rows of one length are encoded together, which is exact and, for class
names, saves about a third of the target side.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from uni_moe_jax.config.plan import SetSpec
from uni_moe_jax.data.pipeline.examples import TextTable, text_rows
from uni_moe_jax.data.pipeline.tokenizer import Tokenizer
from uni_moe_jax.utils.errors import UsageError

BUCKETS = (4, 8, 16, 32, 64, 128, 256, 512)  # tokens; an entry lies in the smallest that holds it
MERGE_BELOW = 16  # entries: a smaller bucket is not worth a shape of its own and joins the next longer one


@dataclasses.dataclass(frozen=True)
class TargetSet:
  """One set.

  Attributes:
    buckets: {'text' int32 [n, S], 'valid' bool [n, S]} per length; empty for the vocabulary, whose rows are [v, eot]. Of a set
      with synonyms {'text' int32 [n, Y, S], 'valid' bool [n, Y, S], 'count' int32 [n]}: the first `count` of the Y rows of an
      entry are its texts. An entry lies where its longest text does.
    order: int32 [V], place of each entry in the concatenated buckets.
    texts: the entries by their first names ('' for the vocabulary).
    size: V.
  """
  buckets: tuple[dict[str, np.ndarray], ...]
  order: np.ndarray
  texts: tuple[str, ...]
  size: int


def build_set(spec: SetSpec, entries: tuple[tuple[str, ...], ...], tokenizer: Tokenizer) -> TargetSet:
  """Tokenises and buckets a set.

  Args:
    spec: of the set. entries: name and synonyms of each. tokenizer: of the run.

  Raises:
    UsageError: there is no entry, or one is longer than the set's length.
  """
  if spec.is_vocabulary:
    return TargetSet((), np.arange(tokenizer.size, dtype=np.int32), (), tokenizer.size)
  if not entries:
    raise UsageError(f'config.target_sets.{spec.name} has no entries; give its values at least one text.')
  names = tuple(e[0] for e in entries)
  flat = [text for entry in entries for text in entry]
  whole = [tokenizer.encode(t) + [tokenizer.eot] for t in flat]
  longest = max(whole, key=len)
  if len(longest) > spec.max_len:
    raise UsageError(f'config.target_sets.{spec.name}.max_len={spec.max_len} is too short for {tokenizer.decode(longest)!r}, '
                     f'which has {len(longest)} tokens; raise it to {len(longest)}.')
  if len(flat) > len(entries) and spec.label_prompts:
    raise UsageError(f'config.target_sets.{spec.name}.label_prompts=True is for entries of one text each; set it to False, or leave the '
                     'synonyms out.')
  if len(flat) == len(entries):
    buckets, order = bucket_rows(text_rows(flat, tokenizer, spec.max_len), tokenizer.pad)
  else:
    rows = iter(text_rows(flat, tokenizer, spec.max_len))
    buckets, order = bucket_synonyms([[next(rows) for _ in entry] for entry in entries], tokenizer.pad)
  return TargetSet(buckets, order, names, len(names))


def bucket_rows(rows: Sequence[Sequence[int]], pad: int) -> tuple[tuple[dict[str, np.ndarray], ...], np.ndarray]:
  """(buckets, order) of tokenised entries; see `TargetSet`."""
  members = _members([len(r) for r in rows])
  buckets = []
  for index in members:
    table = TextTable.of([rows[i] for i in index], max(len(rows[i]) for i in index), pad)
    buckets.append({'text': table.ids, 'valid': table.valid})
  return tuple(buckets), _order(members)


def bucket_synonyms(
    entries: Sequence[Sequence[Sequence[int]]], pad: int) -> tuple[tuple[dict[str, np.ndarray], ...], np.ndarray]:
  """(buckets, order) of entries of several tokenised texts, bucketed by their longest; see `TargetSet`."""
  members, buckets = _members([max(map(len, e)) for e in entries]), []
  for index in members:
    texts, most = [entries[i] for i in index], max(len(entries[i]) for i in index)
    # What fills up an entry repeats its first text: no row is ever without a valid token.
    table = TextTable.of([row for e in texts for row in (*e, *[e[0]] * (most - len(e)))], max(len(r) for e in texts for r in e), pad)
    shape = (len(index), most, -1)
    buckets.append({'text': table.ids.reshape(shape), 'valid': table.valid.reshape(shape),
                    'count': np.array([len(e) for e in texts], np.int32)})
  return tuple(buckets), _order(members)


def _members(lengths: Sequence[int]) -> list[np.ndarray]:
  """Indices of the entries of every bucket."""
  bucket = np.searchsorted(BUCKETS, lengths)
  for b in np.unique(bucket)[:-1]:
    if (bucket == b).sum() < MERGE_BELOW:
      bucket[bucket == b] = bucket[bucket > b].min()
  return [np.flatnonzero(bucket == b) for b in np.unique(bucket)]


def _order(members: Sequence[np.ndarray]) -> np.ndarray:
  order = np.empty(sum(map(len, members)), np.int32)
  order[np.concatenate(members)] = np.arange(len(order))
  return order
