"""Masking of words and moving of pictures: what is picked, what it becomes, where things go."""

import numpy as np
import pytest
import tensorflow as tf

from uni_moe_jax.data.pipeline import hashing, preprocess

SPE, EOT = 2, 3
STARTS, INSIDE = range(4, 12), range(12, 20)  # pieces that begin a word, and that continue one
WORD_START = np.array([i not in INSIDE for i in range(20)])
WORD_END = np.zeros(20, bool)  # these pieces mark where words begin
ORDINARY = np.array([*STARTS, *INSIDE], np.int32)


def _hashes(count, seed=0):
  return tf.constant(np.array([hashing.mix(seed, i) for i in range(count)], np.uint64))


def _mask(text, picks, valid=None, always_mask=False, seed=0, word_start=WORD_START, word_end=WORD_END,
          ordinary=ORDINARY):
  text = np.array(text, np.int32)
  out = preprocess.mask_words(
      tf.constant(text), tf.constant(np.ones(text.shape, bool) if valid is None else valid), _hashes(len(text), seed),
      word_start=tf.constant(word_start), word_end=tf.constant(word_end), ordinary=tf.constant(ordinary), spe=SPE,
      picks=picks, always_mask=always_mask)
  return {k: v.numpy() for k, v in out.items()}


def _random_text(rows, length, seed=0):
  """Words of one to four pieces, `eot` among them."""
  rng = np.random.default_rng(seed)
  words = [[rng.choice(STARTS), *rng.choice(INSIDE, rng.integers(0, 4))] if rng.random() < .9 else [EOT]
           for _ in range(rows * length)]
  return np.concatenate(words)[:rows * length].reshape(rows, length).astype(np.int32)


def _picked(out, shape):
  """bool [n, S]: which positions are picked, from `position` and `weight`."""
  picked = np.zeros(shape, bool)
  for i in range(shape[0]):
    picked[i, out['position'][i][out['weight'][i] > 0]] = True
  return picked


def test_fields_have_fixed_shapes():
  out = _mask(_random_text(5, 40), picks=7)
  assert {k: (v.shape, v.dtype.name) for k, v in out.items()} == {
      'text': ((5, 40), 'int32'), 'position': ((5, 7), 'int32'), 'label': ((5, 7), 'int32'),
      'weight': ((5, 7), 'float32')}


def test_whole_words_are_picked_or_left():
  text = _random_text(300, 40)
  picked = _picked(_mask(text, picks=6), text.shape)
  word = np.cumsum(WORD_START[text], axis=1)
  partly = 0
  for row, words in zip(picked, word):
    for w in np.unique(words):
      partly += 0 < row[words == w].sum() < (words == w).sum()
  assert partly == 0
  lengths = [(w == words).sum() for row, words in zip(picked, word) for w in np.unique(words[row])]
  assert max(lengths) > 1  # long words do come up


def test_words_may_be_marked_by_their_ends():
  # A mirrored text is one of mirrored words: the pieces that began them end them.
  text = _random_text(300, 40)[:, ::-1]
  picked = _picked(_mask(text, picks=6, word_start=np.zeros(20, bool), word_end=WORD_START), text.shape)
  # Pieces that have equally many ends from them on are one word.
  word = np.cumsum(WORD_START[text][:, ::-1], axis=1)[:, ::-1]
  shares = [row[words == w].mean() for row, words in zip(picked, word) for w in np.unique(words)]
  assert set(shares) == {0., 1.}
  lengths = [(w == words).sum() for row, words in zip(picked, word) for w in np.unique(words[row])]
  assert max(lengths) > 1


def test_a_start_divides_words_that_no_end_divides():
  # 12 13 | 4 14 5 | 15 16 | 4, over and over: 4 starts a word and 5 ends one.
  text = np.tile(np.array([12, 13, 4, 14, 5, 15, 16, 4], np.int32), (400, 5))
  starts, ends = np.isin(np.arange(20), [4]), np.isin(np.arange(20), [5])
  picked = _picked(_mask(text, picks=6, word_start=starts, word_end=ends), text.shape)
  # The last 4 of a round goes on in the next one.
  same = [np.array_equal(picked[:, i], picked[:, i + 1]) for i in range(39)]
  assert same == [i % 8 in (0, 2, 3, 5, 7) for i in range(39)]


# 15 % of 40 is 6; of 10, 1.5, which rounds to even: 2; a row of 3 still has one pick; M may be the smaller bound.
@pytest.mark.parametrize('length, picks, most', [(40, 20, 6), (40, 4, 4), (10, 10, 2), (3, 3, 1)])
def test_the_budget_is_15_percent_and_at_most_M(length, picks, most):
  text = np.random.default_rng(0).choice(STARTS, (50, length))  # words of one piece: the budget is used up
  out = _mask(text, picks=picks)
  np.testing.assert_array_equal(out['weight'].sum(1), most)
  np.testing.assert_array_equal(_picked(out, text.shape).sum(1), most)


def test_longer_words_stay_within_the_budget():
  text = _random_text(300, 40)
  counts = _mask(text, picks=20)['weight'].sum(1)
  assert counts.max() == 6
  assert counts.mean() > 3


def test_padding_is_neither_picked_nor_counted():
  text = np.random.default_rng(0).choice(STARTS, (200, 40))
  valid = np.broadcast_to(np.arange(40) < 20, text.shape)
  out = _mask(text, picks=20, valid=valid)
  np.testing.assert_array_equal(out['weight'].sum(1), 3)  # 15 % of 20
  assert not _picked(out, text.shape)[~valid].any()


def test_labels_are_the_original_words():
  text = _random_text(100, 40)
  out = _mask(text, picks=10)
  used = out['weight'] > 0
  rows = np.broadcast_to(np.arange(100)[:, None], used.shape)
  np.testing.assert_array_equal(out['label'][used], text[rows, out['position']][used])
  np.testing.assert_array_equal(out['position'][~used], 0)


@pytest.mark.parametrize('picks', [4, 10])  # less, and more, than the budget
def test_only_picked_tokens_change(picks):
  text = _random_text(100, 40)
  out = _mask(text, picks=picks)
  left = ~_picked(out, text.shape)
  np.testing.assert_array_equal(out['text'][left], text[left])


def test_80_percent_are_masked_10_random_10_kept():
  text = np.random.default_rng(0).choice(STARTS, (2000, 40))
  out = _mask(text, picks=6)
  picked = _picked(out, text.shape)
  now, was = out['text'][picked], text[picked]
  n = len(now)
  error = 5 / np.sqrt(n)
  assert n == 12000
  assert abs(np.mean(now == SPE) - .8) < .4 * error
  # A random word is the old one in one of 16 cases.
  assert abs(np.mean((now != SPE) & (now != was)) - .1 * 15 / 16) < .3 * error
  assert abs(np.mean(now == was) - (.1 + .1 / 16)) < .3 * error


def test_a_word_has_one_fate():
  text = np.tile(np.array([4, 12, 13, 14, 15, 16], np.int32), (500, 8))[:, :40]
  out = _mask(text, picks=6)
  picked = _picked(out, text.shape)
  shares = [np.mean(now[p] == SPE) for now, p in zip(out['text'], picked) if p.sum() == 6]
  assert len(shares) > 300
  assert set(shares) == {0., 1.}


def test_random_words_are_ordinary_ones_and_all_of_them_occur():
  text = np.full((4000, 40), 4, np.int32)
  out = _mask(text, picks=6)
  changed = out['text'][(out['text'] != 4) & (out['text'] != SPE)]
  assert set(changed) == set(ORDINARY) - {4}


def test_random_words_may_be_special_ones_if_these_count_as_ordinary():
  text = np.full((4000, 40), 4, np.int32)
  out = _mask(text, picks=6, ordinary=np.arange(20, dtype=np.int32))
  changed = out['text'][(out['text'] != 4) & (out['text'] != SPE)]
  assert set(changed) == set(range(20)) - {4, SPE}


def test_evaluation_masks_every_pick():
  text = _random_text(100, 40)
  out = _mask(text, picks=10, always_mask=True)
  picked = _picked(out, text.shape)
  np.testing.assert_array_equal(out['text'] == SPE, picked)
  assert picked.sum() > 300


def test_masks_are_a_function_of_the_example():
  text = _random_text(20, 40)
  a, again, other = _mask(text, 6), _mask(text, 6), _mask(text, 6, seed=1)
  alone = preprocess.mask_words(
      tf.constant(text[7:8]), tf.ones((1, 40), tf.bool), _hashes(20)[7:8], word_start=tf.constant(WORD_START),
      word_end=tf.constant(WORD_END), ordinary=tf.constant(ORDINARY), spe=SPE, picks=6, always_mask=False)
  for k in a:
    np.testing.assert_array_equal(a[k], again[k])
    np.testing.assert_array_equal(a[k][7:8], alone[k])
  assert (a['position'] != other['position']).any()


PICTURE = np.arange(1, 17, dtype=np.uint8).reshape(4, 4)
# The picture under every move by at most one pixel: (down, right) → what is seen; zeros enter.
MOVES = {
    (0, 0): [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]],
    (1, 0): [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]],
    (-1, 0): [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [0, 0, 0, 0]],
    (0, 1): [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11], [0, 13, 14, 15]],
    (0, -1): [[2, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0], [14, 15, 16, 0]],
    (1, 1): [[0, 0, 0, 0], [0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11]],
    (1, -1): [[0, 0, 0, 0], [2, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0]],
    (-1, 1): [[0, 5, 6, 7], [0, 9, 10, 11], [0, 13, 14, 15], [0, 0, 0, 0]],
    (-1, -1): [[6, 7, 8, 0], [10, 11, 12, 0], [14, 15, 16, 0], [0, 0, 0, 0]],
}


def test_a_picture_moves_by_whole_pixels_and_zeros_enter():
  n = 90
  moved = preprocess.shift(tf.constant(np.tile(PICTURE[None, None, :, :, None], (n, 1, 1, 1, 1))), _hashes(n), 1)
  assert moved.shape == (n, 1, 4, 4, 1)
  expected = {np.array(m, np.uint8).tobytes() for m in MOVES.values()}
  assert {m.tobytes() for m in moved.numpy()[:, 0, :, :, 0]} == expected


def test_half_of_the_pictures_stay_where_they_are():
  # And of those that may move by two pixels, one in 25 draws no move.
  n = 2000
  moved = preprocess.shift(tf.constant(np.tile(PICTURE[None, None, :, :, None], (n, 1, 1, 1, 1))), _hashes(n), 2)
  still = np.mean([np.array_equal(m[0, :, :, 0], PICTURE) for m in moved.numpy()])
  assert abs(still - (.5 + .5 / 25)) < 4 * np.sqrt(.25 / n)


def test_all_frames_and_colours_of_a_clip_move_alike():
  clips = np.random.default_rng(0).integers(1, 255, (6, 3, 8, 8, 3), dtype=np.uint8)
  moved = preprocess.shift(tf.constant(clips), _hashes(6), 3).numpy()
  for i in range(6):
    places = [(d, r) for d in range(-3, 4) for r in range(-3, 4)
              if np.array_equal(moved[i], _move(clips[i], d, r))]
    assert len(places) == 1


def _move(clip, down, right):
  padded = np.pad(clip, ((0, 0), (3, 3), (3, 3), (0, 0)))
  return padded[:, 3 - down:11 - down, 3 - right:11 - right]


def test_no_shift_is_no_change():
  clips = tf.constant(np.random.default_rng(0).integers(0, 255, (2, 1, 4, 4, 1), dtype=np.uint8))
  assert preprocess.shift(clips, _hashes(2), 0) is clips


def test_grey_becomes_equal_channels():
  grey = tf.constant(PICTURE[None])
  coloured = preprocess.colours(grey, 3).numpy()
  assert coloured.shape == (1, 4, 4, 3)
  for channel in range(3):
    np.testing.assert_array_equal(coloured[..., channel], grey)
