"""Whole-word masking: which tokens are selected, and what replaces them."""

import types

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.example_hashes import example_hashes
from uni_moe_jax.data.examples import masking

SPE, EOT = 2, 3
STARTS, INSIDE = range(4, 12), range(12, 20)  # pieces that start a word, and that continue one
WORD_START = np.array([i not in INSIDE for i in range(20)])
WORD_END = np.zeros(20, bool)  # these pieces mark where words start
SPECIAL = {0, 1, SPE, EOT}


def _mask(text, max_predictions, always_mask=False, hashes=None, word_start=WORD_START, word_end=WORD_END,
          random_special_tokens=False):
  tokenizer = types.SimpleNamespace(size=20, spe=SPE, special_ids=SPECIAL, word_start=word_start, word_end=word_end)
  out = masking.mask_words(
      tf.constant(text, tf.int32), example_hashes(len(text)) if hashes is None else hashes, tokenizer,
      max_predictions=max_predictions, always_mask=always_mask, random_special_tokens=random_special_tokens)
  return {k: v.numpy() for k, v in out.items()}


def _random_text(rows):
  """Words of one to four pieces, with some `eot`, in rows of 40."""
  rng = np.random.default_rng(0)
  words = [[rng.choice(STARTS), *rng.choice(INSIDE, rng.integers(0, 4))] if rng.random() < .9 else [EOT]
           for _ in range(rows * 40)]
  return np.concatenate(words)[:rows * 40].reshape(rows, 40).astype(np.int32)


def _selected(out, shape):
  """bool [n, S]: the selected tokens, from `position` and `weight`."""
  selected = np.zeros(shape, bool)
  for i in range(shape[0]):
    selected[i, out['position'][i][out['weight'][i] > 0]] = True
  return selected


@pytest.mark.parametrize('mirrored', [False, True], ids=['marked by their starts', 'marked by their ends'])
def test_words_are_selected_completely_or_not_at_all(mirrored):
  # A mirrored text has mirrored words: the pieces that started them end them.
  step = -1 if mirrored else 1
  text = _random_text(300)[:, ::step]
  marks = dict(word_start=WORD_END, word_end=WORD_START) if mirrored else {}
  selected = _selected(_mask(text, 6, **marks), text.shape)
  word = np.cumsum(WORD_START[text][:, ::step], axis=1)[:, ::step]
  shares = [row[words == w].mean() for row, words in zip(selected, word) for w in np.unique(words)]
  assert set(shares) == {0., 1.}
  lengths = [(w == words).sum() for row, words in zip(selected, word) for w in np.unique(words[row])]
  assert max(lengths) > 1  # long words do occur


def test_a_start_separates_words_without_an_end():
  # 12 13 | 4 14 5 | 15 16 | 4, repeated: 4 starts a word and 5 ends one.
  text = np.tile(np.array([12, 13, 4, 14, 5, 15, 16, 4], np.int32), (400, 5))
  starts, ends = np.isin(np.arange(20), [4]), np.isin(np.arange(20), [5])
  selected = _selected(_mask(text, 6, word_start=starts, word_end=ends), text.shape)
  # The word of the last 4 continues in the next repetition.
  same = [np.array_equal(selected[:, i], selected[:, i + 1]) for i in range(39)]
  assert same == [i % 8 in (0, 2, 3, 5, 7) for i in range(39)]


# 15 % of 40 is 6; of 10, 1.5, which rounds to even: 2; a row of 3 still has one position; M may be the smaller bound.
@pytest.mark.parametrize('length, max_predictions, expected', [(40, 20, 6), (40, 4, 4), (10, 10, 2), (3, 3, 1)])
def test_the_budget_is_15_percent_and_at_most_M(length, max_predictions, expected):
  text = np.random.default_rng(0).choice(STARTS, (50, length))  # words of one piece: the budget is used up
  out = _mask(text, max_predictions)
  np.testing.assert_array_equal(out['weight'].sum(1), expected)
  np.testing.assert_array_equal(_selected(out, text.shape).sum(1), expected)


def test_longer_words_stay_within_the_budget():
  counts = _mask(_random_text(300), 20)['weight'].sum(1)
  assert counts.max() == 6 and counts.mean() > 3


@pytest.mark.parametrize('max_predictions', [4, 10])  # less, and more, than the budget
def test_only_selected_tokens_change_and_labels_are_the_original_ones(max_predictions):
  text = _random_text(100)
  out = _mask(text, max_predictions)
  others, used = ~_selected(out, text.shape), out['weight'] > 0
  np.testing.assert_array_equal(out['text'][others], text[others])
  np.testing.assert_array_equal(out['label'][used], np.take_along_axis(text, out['position'], axis=1)[used])
  np.testing.assert_array_equal(out['position'][~used], 0)


def test_80_percent_are_masked_10_random_10_kept():
  text = np.random.default_rng(0).choice(STARTS, (2000, 40))
  out = _mask(text, 6)
  selected = _selected(out, text.shape)
  after, before = out['text'][selected], text[selected]
  error = 5 / np.sqrt(12000)
  assert len(after) == 12000
  assert abs(np.mean(after == SPE) - .8) < .4 * error
  # A random token equals the old one in one of 16 cases.
  assert abs(np.mean((after != SPE) & (after != before)) - .1 * 15 / 16) < .3 * error
  assert abs(np.mean(after == before) - (.1 + .1 / 16)) < .3 * error


def test_all_tokens_of_a_word_are_replaced_in_the_same_manner():
  text = np.tile(np.array([4, 12, 13, 14, 15, 16], np.int32), (500, 8))[:, :40]
  out = _mask(text, 6)
  selected = _selected(out, text.shape)
  shares = [np.mean(after[s] == SPE) for after, s in zip(out['text'], selected) if s.sum() == 6]
  assert len(shares) > 300 and set(shares) == {0., 1.}


@pytest.mark.parametrize('random_special_tokens', [False, True])
def test_all_ordinary_tokens_occur_as_random_ones_and_special_ones_only_if_configured(random_special_tokens):
  out = _mask(np.full((4000, 40), 4, np.int32), 6, random_special_tokens=random_special_tokens)
  changed = out['text'][(out['text'] != 4) & (out['text'] != SPE)]
  assert set(changed) == set(range(20)) - {4, SPE} - (set() if random_special_tokens else SPECIAL)


def test_evaluation_masks_every_selected_token():
  text = _random_text(100)
  out = _mask(text, 10, always_mask=True)
  selected = _selected(out, text.shape)
  np.testing.assert_array_equal(out['text'] == SPE, selected)
  assert selected.sum() > 300


def test_masks_are_a_function_of_the_example_with_fixed_shapes():
  text = _random_text(20)
  # One prediction more than the budget of six tokens.
  a, again, other = _mask(text, 7), _mask(text, 7), _mask(text, 7, hashes=example_hashes(20, seed=1))
  single = _mask(text[7:8], 7, hashes=example_hashes(20)[7:8])
  assert {k: (v.shape, v.dtype.name) for k, v in a.items()} == {
      'text': ((20, 40), 'int32'), 'position': ((20, 7), 'int32'), 'label': ((20, 7), 'int32'),
      'weight': ((20, 7), 'float32')}
  for k in a:
    np.testing.assert_array_equal(a[k], again[k])
    np.testing.assert_array_equal(a[k][7:8], single[k])
  assert (a['position'] != other['position']).any()
