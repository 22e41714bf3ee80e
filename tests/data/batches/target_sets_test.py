"""Target sets: every entry occurs once, in buckets of similar length, and `order` restores the order of the set."""

import string

import numpy as np
import pytest

from uni_moe_jax.config.plan import SetSpec
from uni_moe_jax.data.batches import target_sets
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
from uni_moe_jax.tasks import task_types

PAD, EOT = 0, 3


class _Letters:
  """One token per letter: 'abc' is 101 102 103."""
  pad, eot, size = PAD, EOT, 130

  def encode(self, text):
    return [100 + ord(c) - ord('`') for c in text]

  def decode(self, ids):
    return ''.join(chr(int(i) - 100 + ord('`')) for i in ids if i > 100)


def _build(names, max_len=64, entries=None, max_text_len=64, **values):
  """names: strings, or tuples of synonyms."""
  spec = SetSpec(
      name='things', entries=tuple(names) if entries is None else entries, family='names',
      condition=task_types.families()['names'], max_len=max_len, **values)
  return target_sets.build_target_set(
      spec, tuple((n,) if isinstance(n, str) else n for n in names), _Letters(), max_text_len)


def _shapes(built):
  return [b['text'].shape for b in built.buckets]


def _check_rows(built, names):
  """Checks the entries' valid tokens in the order of the set."""
  rows = [text[valid].tolist() for b in built.buckets for text, valid in zip(b['text'], b['valid'])]
  assert [rows[i] for i in built.order] == [_Letters().encode(n) + [EOT] for n in names]


def _names(lengths):
  """Distinct names of the given numbers of letters."""
  return [''.join(string.ascii_lowercase[(i // 26**p) % 26] for p in range(n)) for i, n in enumerate(lengths)]


def test_a_note_names_entries_of_equal_tokens(tmp_path, capsys):
  tokenizer = SentencePieceTokenizer.train(
      ['capital letter a', 'small letter b'] * 9, tmp_path / 'x.model', 40, allow_smaller_vocab=True)

  def note(*names, **values):
    spec = SetSpec(name='letters', entries=names, family='names', condition=task_types.families()['names'], max_len=64,
                   **values)
    entries = tuple((n,) if isinstance(n, str) else n for n in names)
    assert target_sets.build_target_set(spec, entries, tokenizer, 64).size == len(names)
    return capsys.readouterr().err

  assert note('a', 'b', 'small a', 'capital a') == ''
  assert "'crane' and 'crane' are the same tokens" in note('crane', 'hen', 'crane')  # the classes of two keys
  assert note('a', 'b', 'A').startswith("note: config.target_sets.letters: 'a' and 'A' are the same tokens, ")
  assert "'東' and '京' (and 1 more) are the same tokens" in note('a', '東', '京', 'b', 'B')
  assert note(('a', 'b'), ('A', 'small'), synonyms=True) == ''  # a synonym differs
  assert "'a' and 'A' are" in note(('a', 'b'), ('A', 'small'), synonyms=False)


def test_a_small_set_is_one_bucket_of_its_longest_entry():
  built = _build(['b', 'abc', 'ab'])
  [bucket] = built.buckets
  np.testing.assert_array_equal(
      bucket['text'], [[102, EOT, PAD, PAD], [101, 102, 103, EOT], [101, 102, EOT, PAD]])
  np.testing.assert_array_equal(bucket['valid'], [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
  assert (bucket['text'].dtype, bucket['valid'].dtype) == (np.int32, bool)
  np.testing.assert_array_equal(built.order, [0, 1, 2])
  assert (built.size, built.names) == (3, ('b', 'abc', 'ab'))


def test_buckets_are_as_long_as_their_longest_entry_and_order_restores_the_set():
  # With `eot`: 100 entries of 4 tokens and 100 of 9, alternating, and 50 of 8.
  names = _names([3, 8] * 100 + [7] * 50)
  built = _build(names)
  assert _shapes(built) == [(100, 4), (150, 9)]
  _check_rows(built, names)
  assert sorted(built.order) == list(range(250))


@pytest.mark.parametrize('entries, shapes', [
    # {letters: entries}; a token more is `eot`. A bucket saves at least 128 tokens,
    ({2: 128, 3: 9}, [(137, 4)]),
    ({2: 129, 3: 9}, [(129, 3), (9, 4)]),
    ({2: 20, 8: 20}, [(40, 9)]),
    ({2: 22, 8: 20}, [(22, 3), (20, 9)]),
    # of a large set a fortieth of its tokens: here 150 of 6,000,
    ({2: 149, 3: 1400}, [(1549, 4)]),
    ({2: 152, 3: 1400}, [(152, 3), (1400, 4)]),
    # and the best of several: 3 and 4 tokens together, not 4 and 9.
    ({2: 100, 3: 100, 8: 100}, [(200, 4), (100, 9)]),
    ({8: 1, 2: 1}, [(2, 9)]),
])
def test_a_bucket_of_its_own_saves_enough_padding(entries, shapes):
  built = _build(_names([letters for letters, n in entries.items() for _ in range(n)]))
  assert _shapes(built) == shapes


def test_the_vocabulary_has_no_buckets():
  built = _build((), entries='vocabulary')
  assert (built.buckets, built.size) == ((), 130)
  np.testing.assert_array_equal(built.order, np.arange(130))


def test_a_name_has_at_most_max_len_tokens():
  assert _shapes(_build(['abc', 'a'], max_len=4)) == [(2, 4)]
  with pytest.raises(ValueError, match=r"config.target_sets.things.max_len=4 is too short for 'abcde', which has 6 "
                                       'tokens; raise it to 6'):
    _build(['ab', 'abcde'], max_len=4)


def test_the_model_has_a_position_for_every_token_of_a_name():
  assert _shapes(_build(['abc', 'a'], max_text_len=4)) == [(2, 4)]
  with pytest.raises(ValueError, match=r"config\.model\.max_text_len=4 is too short for 'abcde' of "
                                       r'config\.target_sets\.things, which has 6 tokens; raise it to 6'):
    _build(['ab', 'abcde'], max_text_len=4)
  assert _build((), entries='vocabulary', max_text_len=2).size == 130  # a word and its end
  with pytest.raises(ValueError, match=r'max_text_len=1 is too short for each word of .* 2 tokens; raise it to 2'):
    _build((), entries='vocabulary', max_text_len=1)


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
