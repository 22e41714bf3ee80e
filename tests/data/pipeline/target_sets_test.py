"""Target sets: every entry once, in buckets of like length, and the order that puts the buckets back."""

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

  def encode_batch(self, texts):
    return [self.encode(t) for t in texts]

  def decode(self, ids):
    return ''.join(chr(int(i) - 100 + ord('`')) for i in ids if i > 100)


def _build(texts, max_len=64, entries=None):
  """texts: or tuples of synonyms."""
  spec = SetSpec(
      name='things', entries=tuple(texts) if entries is None else entries, family='names',
      condition=task_types.families()['names'], max_len=max_len)
  return target_sets.build_target_set(spec, tuple((t,) if isinstance(t, str) else t for t in texts), _Letters())


def _rows(built):
  """The entries' valid tokens, in the order of the set."""
  rows = [text[valid].tolist() for b in built.buckets for text, valid in zip(b['text'], b['valid'])]
  return [rows[i] for i in built.order]


def test_a_small_set_is_one_bucket_of_its_longest_entry():
  built = _build(['b', 'abc', 'ab'])
  [bucket] = built.buckets
  np.testing.assert_array_equal(
      bucket['text'], [[102, EOT, PAD, PAD], [101, 102, 103, EOT], [101, 102, EOT, PAD]])
  np.testing.assert_array_equal(bucket['valid'], [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
  assert (bucket['text'].dtype, bucket['valid'].dtype) == (np.int32, bool)
  np.testing.assert_array_equal(built.order, [0, 1, 2])
  assert (built.size, built.names) == (3, ('b', 'abc', 'ab'))


def _texts(lengths):
  """Distinct texts of the given numbers of letters."""
  letters = 'abcdefghijklmnopqrstuvwxyz'
  return [''.join(letters[(i // 26**p) % 26] for p in range(n)) for i, n in enumerate(lengths)]


def test_entries_lie_in_the_smallest_bucket_that_holds_them_and_order_restores_them():
  # With `eot`: 20 entries of 4 tokens and 20 of 5, mixed, and 17 of 9: buckets of up to 4, 8 and 16 tokens, each cut
  # to its longest entry.
  lengths = [3, 4] * 20 + [8] * 17
  texts = _texts(lengths)
  built = _build(texts)
  assert [b['text'].shape for b in built.buckets] == [(20, 4), (20, 5), (17, 9)]
  assert _rows(built) == [_Letters().encode(t) + [EOT] for t in texts]
  assert sorted(built.order) == list(range(57))


@pytest.mark.parametrize('short, shapes', [(15, [(35, 9)]), (16, [(16, 3), (20, 9)])])
def test_a_bucket_of_few_entries_joins_the_next_longer_one(short, shapes):
  texts = _texts([8] * 20 + [2] * short)
  built = _build(texts)
  assert [b['text'].shape for b in built.buckets] == shapes
  assert _rows(built) == [_Letters().encode(t) + [EOT] for t in texts]


def test_the_next_longer_bucket_is_the_nearest_one():
  assert [b['text'].shape for b in _build(_texts([2] * 5 + [6] * 20 + [12] * 20)).buckets] == [(25, 7), (20, 13)]


def test_few_entries_of_every_length_join_up_to_the_longest():
  built = _build(_texts([2] * 5 + [6] * 5 + [12] * 5))
  assert [b['text'].shape for b in built.buckets] == [(15, 13)]


def test_the_vocabulary_has_no_rows_of_its_own():
  built = _build((), entries='vocabulary')
  assert built.buckets == ()
  assert built.size == 130
  np.testing.assert_array_equal(built.order, np.arange(130))


def test_a_text_of_exactly_the_length_fits():
  assert _build(['abc', 'a'], max_len=4).buckets[0]['text'].shape == (2, 4)


def test_too_long_an_entry_is_named_with_the_length_it_needs():
  with pytest.raises(ValueError, match=r"config.target_sets.things.max_len=4 is too short for 'abcde', which has 6 tokens; "
                                       'raise it to 6'):
    _build(['ab', 'abcde'], max_len=4)


def test_synonyms_lie_side_by_side_where_the_longest_does():
  built = _build([('abc', 'd'), 'a'])
  [bucket] = built.buckets
  a, b, c, d = 101, 102, 103, 104
  np.testing.assert_array_equal(bucket['text'], [[[a, b, c, EOT], [d, EOT, PAD, PAD]], [[a, EOT, PAD, PAD]] * 2])
  np.testing.assert_array_equal(bucket['count'], [2, 1])
  assert bucket['valid'].sum(-1).tolist() == [[4, 2], [2, 2]]
  assert (built.names, built.size) == (('abc', 'a'), 2)


def test_a_set_without_entries_is_an_error():
  with pytest.raises(ValueError, match='config.target_sets.things has no entries'):
    _build([])
