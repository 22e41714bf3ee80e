"""Target sets: every entry occurs once, in buckets of similar length, and `order` restores the order of the set."""

import string

import numpy as np
import pytest

from uni_moe_jax.config.plan import SetSpec
from uni_moe_jax.data.pipeline import target_sets
from uni_moe_jax.tasks import task_types

PAD, EOT = 0, 3


class _Letters:
  """One token per letter: 'abc' is 101 102 103."""
  pad, eot, size = PAD, EOT, 130

  def encode(self, text):
    return [100 + ord(c) - ord('`') for c in text]

  def decode(self, ids):
    return ''.join(chr(int(i) - 100 + ord('`')) for i in ids if i > 100)


def _build(names, max_len=64, entries=None, **values):
  """names: strings, or tuples of synonyms."""
  spec = SetSpec(
      name='things', entries=tuple(names) if entries is None else entries, family='names',
      condition=task_types.families()['names'], max_len=max_len, **values)
  return target_sets.build_target_set(spec, tuple((n,) if isinstance(n, str) else n for n in names), _Letters())


def _shapes(built):
  return [b['text'].shape for b in built.buckets]


def _check_rows(built, names):
  """Checks the entries' valid tokens in the order of the set."""
  rows = [text[valid].tolist() for b in built.buckets for text, valid in zip(b['text'], b['valid'])]
  assert [rows[i] for i in built.order] == [_Letters().encode(n) + [EOT] for n in names]


def _names(lengths):
  """Distinct names of the given numbers of letters."""
  return [''.join(string.ascii_lowercase[(i // 26**p) % 26] for p in range(n)) for i, n in enumerate(lengths)]


def test_a_small_set_is_one_bucket_of_its_longest_entry():
  built = _build(['b', 'abc', 'ab'])
  [bucket] = built.buckets
  np.testing.assert_array_equal(
      bucket['text'], [[102, EOT, PAD, PAD], [101, 102, 103, EOT], [101, 102, EOT, PAD]])
  np.testing.assert_array_equal(bucket['valid'], [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
  assert (bucket['text'].dtype, bucket['valid'].dtype) == (np.int32, bool)
  np.testing.assert_array_equal(built.order, [0, 1, 2])
  assert (built.size, built.names) == (3, ('b', 'abc', 'ab'))


def test_entries_are_in_the_smallest_bucket_that_fits_and_order_restores_them():
  # With `eot`: 20 entries of 4 tokens and 20 of 5, alternating, and 17 of 9: buckets of up to 4, 8 and 16 tokens, each
  # as long as its longest entry.
  names = _names([3, 4] * 20 + [8] * 17)
  built = _build(names)
  assert _shapes(built) == [(20, 4), (20, 5), (17, 9)]
  _check_rows(built, names)
  assert sorted(built.order) == list(range(57))


@pytest.mark.parametrize('lengths, shapes', [
    ([8] * 20 + [2] * 15, [(35, 9)]),
    ([8] * 20 + [2] * 16, [(16, 3), (20, 9)]),  # not merged
    ([2] * 5 + [6] * 20 + [12] * 20, [(25, 7), (20, 13)]),  # into the nearest
    ([2] * 5 + [6] * 5 + [12] * 5, [(15, 13)]),  # repeatedly, up to the longest
])
def test_a_bucket_with_few_entries_is_merged_into_the_next_longer_one(lengths, shapes):
  names = _names(lengths)
  built = _build(names)
  assert _shapes(built) == shapes
  _check_rows(built, names)


def test_the_vocabulary_has_no_buckets():
  built = _build((), entries='vocabulary')
  assert (built.buckets, built.size) == ((), 130)
  np.testing.assert_array_equal(built.order, np.arange(130))


def test_a_name_has_at_most_max_len_tokens():
  assert _shapes(_build(['abc', 'a'], max_len=4)) == [(2, 4)]
  with pytest.raises(ValueError, match=r"config.target_sets.things.max_len=4 is too short for 'abcde', which has 6 "
                                       'tokens; raise it to 6'):
    _build(['ab', 'abcde'], max_len=4)


def test_synonyms_are_in_the_bucket_of_the_longest():
  built = _build([('abc', 'd'), 'a'])
  [bucket] = built.buckets
  a, b, c, d = 101, 102, 103, 104
  np.testing.assert_array_equal(bucket['text'], [[[a, b, c, EOT], [d, EOT, PAD, PAD]], [[a, EOT, PAD, PAD]] * 2])
  np.testing.assert_array_equal(bucket['count'], [2, 1])
  assert bucket['valid'].sum(-1).tolist() == [[4, 2], [2, 2]]
  assert (built.names, built.size) == (('abc', 'a'), 2)


def test_without_synonyms_an_entry_has_its_first_name():
  built = _build([('abc', 'defghi'), 'a'], max_len=4, synonyms=False, label_prompts=True)
  [bucket] = built.buckets
  assert bucket['text'].shape == (2, 4) and 'count' not in bucket  # the longer synonym does not count
  _check_rows(built, ['abc', 'a'])


def test_no_entries_and_label_prompts_with_synonyms_are_errors():
  with pytest.raises(ValueError, match='config.target_sets.things has no entries'):
    _build([])
  message = 'config.target_sets.things.label_prompts=True requires entries with one name each; .*synonyms=False'
  with pytest.raises(ValueError, match=message):
    _build([('abc', 'd'), 'a'], label_prompts=True)
