"""Mixup and cutmix: pixels, labels and weights by hand, and pairs that no layout takes apart."""

import numpy as np
import tensorflow as tf

from uni_moe_jax.data.pipeline import hashing, mixup


def _fields(n=2, S=4):
  pixels = np.zeros((n, 1, S, S, 1), np.uint8)
  pixels[1::2] = 200
  return {'pixels': tf.constant(pixels), 'label': tf.constant(np.arange(n, dtype=np.int32)[:, None]), 'weight': tf.ones([n, 1])}


def _mix(blended=None, boxed=None, place=((0.5, 0.5),) * 2, hashes=(1, 1), fields=None):
  f32 = lambda x: None if x is None else tf.constant(x, tf.float32)
  made = mixup.apply(fields or _fields(), f32(blended), f32(boxed), f32(place), tf.constant(np.array(hashes, np.uint64)))
  return {k: v.numpy() for k, v in made.items()}


def test_a_blend_takes_its_share_of_pixels_and_labels():
  made = _mix(blended=(0.75, 0.75))
  assert made['pixels'][0].max() == made['pixels'][0].min() == 50  # 0.25 · 200
  assert made['pixels'][1].max() == 150
  assert made['label'].tolist() == [[0, 1], [1, 0]]
  np.testing.assert_allclose(made['weight'], [[0.75, 0.25]] * 2)


def test_a_box_has_the_other_pictures_pixels_and_its_share_is_what_was_cut():
  # A quarter of 4 × 4 is a box of side 2 around (2, 2): rows and columns 1 and 2.
  made = _mix(boxed=(0.75, 0.75))
  inside = np.zeros((4, 4), bool)
  inside[1:3, 1:3] = True
  np.testing.assert_array_equal(made['pixels'][0, 0, ..., 0], np.where(inside, 200, 0))
  np.testing.assert_array_equal(made['pixels'][1, 0, ..., 0], np.where(inside, 0, 200))
  np.testing.assert_allclose(made['weight'], [[0.75, 0.25]] * 2)
  # In a corner a quarter of the box is left, 1 of 16 pixels: the weights follow.
  made = _mix(boxed=(0.75, 0.75), place=((0.0, 0.0),) * 2)
  np.testing.assert_allclose(made['weight'], [[15 / 16, 1 / 16]] * 2)
  assert (made['pixels'][0] == 200).sum() == 1


def test_with_both_on_half_of_the_pairs_are_cut():
  n = 400
  hashes = np.repeat([hashing.mix('pair', i) for i in range(n // 2)], 2).astype(np.uint64)
  made = _mix((0.5,) * n, (0.75,) * n, ((0.5, 0.5),) * n, hashes, _fields(n))
  cut = made['weight'][:, 0] == 0.75
  np.testing.assert_array_equal(cut[::2], cut[1::2])
  assert abs(cut[::2].mean() - 0.5) < 4 * np.sqrt(0.25 / 200)
  assert ((made['pixels'] == 100).all((1, 2, 3, 4)) == ~cut).all()


def test_shares_are_beta_and_differ_by_batch():
  share = lambda alpha, count: mixup.sample_lambda(alpha, 2000, 0, 'task', tf.constant(count, tf.int64)).numpy()
  one = share(0.8, 0)
  # Beta(α, α): mean 1/2, variance 1 / (4 (2 α + 1)) = 0.0962.
  assert abs(one.mean() - 0.5) < 0.03 and abs(one.var() - 0.0962) < 0.01
  np.testing.assert_array_equal(one, share(0.8, 0))
  assert not np.array_equal(one, share(0.8, 1))
