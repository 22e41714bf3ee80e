"""Target sets as arrays: entries are tokenized once and grouped into buckets of similar length.

Most entries of a set are shorter than its longest. Entries of similar length are encoded together, which is exact and
saves most of the target-side compute that padding to the longest would take.
"""

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np

from uni_moe_jax.config.plan import SetSpec
from uni_moe_jax.data.text.token_rows import pad_tokens
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.utils.errors import UsageError

# A bucket must save so many tokens of padding, and this share of the set's tokens: every shape takes compile time.
MIN_SAVED_TOKENS, MIN_SAVED_SHARE = 128, 0.025

Buckets = tuple[dict[str, np.ndarray], ...]


@dataclasses.dataclass(frozen=True)
class TargetSet:
  """A target set.

  Attributes:
    buckets: {'text' int32 [n, S], 'valid' bool [n, S]} per length; empty for the vocabulary, whose rows are [v, eot].
      With synonyms, {'text' int32 [n, Y, S], 'valid' bool [n, Y, S], 'count' int32 [n]}: the first `count` of the Y
      rows of an entry are its names. The longest name determines the bucket of an entry.
    order: int32 [V], index of each entry in the concatenated buckets.
    names: First name of each entry (empty for the vocabulary).
  """
  buckets: Buckets
  order: np.ndarray
  names: tuple[str, ...]

  @property
  def size(self) -> int:
    return len(self.order)


def vocabulary_set(size: int) -> TargetSet:
  """Returns the target set of all token ids."""
  return TargetSet((), np.arange(size, dtype=np.int32), ())


def build_target_set(
    spec: SetSpec, entries: tuple[tuple[str, ...], ...], tokenizer: Tokenizer, max_text_len: int) -> TargetSet:
  """Tokenizes and buckets a set, given name and synonyms of each entry; with synonyms=False its names.

  Args:
    max_text_len: of the model, which has no other positions.

  Raises:
    UsageError: There are no entries, or one is longer than the set's `max_len` or `max_text_len`.
  """
  field = f'config.target_sets.{spec.name}'
  if spec.is_vocabulary:
    _check_positions('each word', 2, field, max_text_len)
    return vocabulary_set(tokenizer.size)
  if not entries:
    raise UsageError(f'{field} has no entries; give {field}.entries at least one string.')
  entries = entries if spec.synonyms else tuple(names[:1] for names in entries)
  rows = [[[*tokenizer.encode(name), tokenizer.eot] for name in names] for names in entries]
  longest = max((row for names in rows for row in names), key=len)
  if len(longest) > spec.max_len:
    raise UsageError(f'{field}.max_len={spec.max_len} is too short for {tokenizer.decode(longest)!r}, which has '
                     f'{len(longest)} tokens; raise it to {len(longest)}.')
  _check_positions(repr(tokenizer.decode(longest)), len(longest), field, max_text_len)
  if spec.label_prompts and max(map(len, entries)) > 1:
    raise UsageError(f'{field}.label_prompts=True requires entries with one name each; set it to False, or '
                     f'{field}.synonyms=False.')
  _report_equal(field, entries, rows)
  buckets, order = bucket_by_length(rows, tokenizer.pad)
  return TargetSet(buckets, order, tuple(names[0] for names in entries))


def _report_equal(
    field: str, entries: tuple[tuple[str, ...], ...], rows: Sequence[Sequence[Sequence[int]]]) -> None:
  """Prints a note on entries of equal tokens: of one name, or such as 'A' and 'a', or unknown characters."""
  first: dict[str, int] = {}
  same = [(entries[known], entries[i]) for i, tokens in enumerate(rows)
          if (known := first.setdefault(repr(tokens), i)) != i]
  if same:
    (a, *_), (b, *_) = same[0]
    more = f' (and {len(same) - 1} more)' if len(same) > 1 else ''
    print(f'note: {field}: {a!r} and {b!r}{more} are the same tokens, for example because the tokenizer has no upper '
          'case, or not these characters: only a linear head or label prompts can separate them. Rename one of them.',
          file=sys.stderr, flush=True)


def _check_positions(text: str, num_tokens: int, field: str, max_text_len: int) -> None:
  if num_tokens > max_text_len:
    raise UsageError(f'config.model.max_text_len={max_text_len} is too short for {text} of {field}, which has '
                     f'{num_tokens} tokens; raise it to {num_tokens}.')


def bucket_by_length(entries: Sequence[Sequence[Sequence[int]]], pad: int) -> tuple[Buckets, np.ndarray]:
  """Returns (buckets, order) of entries, each with one or more tokenized names; see `TargetSet`."""
  bucket = _bucket_of([max(map(len, names)) for names in entries])
  order = np.empty(len(entries), np.int32)
  order[np.argsort(bucket, kind='stable')] = np.arange(len(entries))
  has_synonyms, buckets = any(len(names) > 1 for names in entries), []
  for b in np.unique(bucket):
    members = [entries[i] for i in np.flatnonzero(bucket == b)]
    Y = max(map(len, members))
    # Padding repeats the first name of an entry: every row has a valid token.
    rows = [row for names in members for row in (*names, *[names[0]] * (Y - len(names)))]
    ids, valid = pad_tokens(rows, max(map(len, rows)), pad)
    if has_synonyms:
      shape, count = (len(members), Y, -1), np.array([len(names) for names in members], np.int32)
      buckets.append({'text': ids.reshape(shape), 'valid': valid.reshape(shape), 'count': count})
    else:
      buckets.append({'text': ids, 'valid': valid})
  return tuple(buckets), order


def _bucket_of(lengths: Sequence[int]) -> np.ndarray:
  """Returns int [V], the bucket of each entry, shortest first: padding plus the price of the buckets is least.

  The best buckets of the n shortest distinct lengths are those of fewer lengths and one bucket more.
  """
  distinct, entries = np.unique(lengths, return_counts=True)
  price = max(MIN_SAVED_TOKENS, MIN_SAVED_SHARE * np.sum(lengths))
  shorter = np.concatenate([[0], np.cumsum(entries)])  # number of entries below each distinct length
  cost, longest = [0.0], [()]  # of the best buckets; the longest length of each bucket
  for i, length in enumerate(distinct):
    costs = cost + (shorter[i + 1] - shorter[:i + 1]) * length
    best = np.argmin(costs)
    cost.append(costs[best] + price)
    longest.append((*longest[best], length))
  return np.searchsorted(longest[-1], lengths)
