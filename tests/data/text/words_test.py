"""Word dropout: which words of a template's texts are left out, and what remains."""

import types

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.example_hashes import example_hashes
from uni_moe_jax.data.text import words

PAD, SPE, EOT = 1, 2, 3  # padding that is not 0 shows that it is written
# The template '{text} <eot> it <spe> <eot>' with the words [4 12], [5], [6 13 14]; 'it' is 7.
TEXT = [4, 12, 5, 6, 13, 14, EOT, 7, SPE, EOT, PAD, PAD]
WORDS = [[4, 12], [5], [6, 13, 14]]
REST = [EOT, 7, SPE, EOT]
LENGTH, NUM_IN_FIELD, SLOT = 10, 6, 8
N = 4000
ENDS = np.array([i not in (4, 6, 13) for i in range(16)])  # pieces that end a word


def _tokenizer(marks):
  """One whose pieces mark the 'starts' or the 'ends' of words."""
  none = np.zeros(16, bool)
  starts = np.array([not 12 <= i < 16 for i in range(16)])
  return types.SimpleNamespace(pad=PAD, word_start=starts if marks == 'starts' else none,
                               word_end=ENDS if marks == 'ends' else none)


def _drop(rate, n=N, marks='starts', in_field=NUM_IN_FIELD):
  index = np.arange(len(TEXT))
  rows = dict(text=np.array(TEXT, np.int32), text_valid=index < LENGTH, position=np.array([SLOT], np.int32),
              in_field=index < in_field, label=np.array([5]))
  features = {name: tf.constant(np.tile(value, (n, 1))) for name, value in rows.items()}
  out = words.drop_words(features, example_hashes(n), types.SimpleNamespace(word_dropout=rate), _tokenizer(marks))
  return {name: value.numpy() for name, value in out.items()}


def _texts(out):
  """The tokens of each row that are not padding, which must be its first ones."""
  for text, valid in zip(out['text'], out['text_valid'], strict=True):
    assert not np.diff(valid.astype(int)).max(initial=0) > 0 and (text[~valid] == PAD).all()
  return [tuple(text[valid].tolist()) for text, valid in zip(out['text'], out['text_valid'], strict=True)]


@pytest.mark.parametrize('marks', ['starts', 'ends'])
def test_a_row_is_the_template_with_the_words_that_are_left_and_all_choices_occur(marks):
  out = _drop(.5, marks=marks)
  choices = {tuple(sum((w for i, w in enumerate(WORDS) if kept >> i & 1), []) + REST) for kept in range(8)}
  assert set(_texts(out)) == choices
  np.testing.assert_array_equal(np.take_along_axis(out['text'], out['position'], 1), SPE)
  assert out.keys() == {'text', 'text_valid', 'position', 'label'} and (out['label'] == 5).all()


@pytest.mark.parametrize('rate', [.1, .7])
def test_every_word_is_left_out_with_the_probability_given_and_independently(rate):
  kept = np.array([[word[0] in text for word in WORDS] for text in _texts(_drop(rate))])
  assert abs(1 - kept.mean(0) - rate).max() < 4 * np.sqrt(rate * (1 - rate) / N)
  assert abs(np.corrcoef(kept.T)[np.triu_indices(3, 1)]).max() < 4 / np.sqrt(N)


def test_the_words_of_the_template_always_stay():
  assert set(_texts(_drop(.5, 50, in_field=0))) == {tuple(TEXT[:LENGTH])}
  assert len(set(_texts(_drop(.5, 50)))) > 1


def test_features_that_are_not_marked_are_returned_as_they_are():
  features = {'text': tf.zeros([2, 4], tf.int32)}
  assert words.drop_words(features, None, types.SimpleNamespace(word_dropout=.5), None) is features
