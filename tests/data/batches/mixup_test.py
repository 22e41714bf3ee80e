"""Mixup and CutMix: pixels, labels and weights, compared with values computed by hand."""

import numpy as np
import tensorflow as tf

from uni_moe_jax.data.batches import mixup
from uni_moe_jax.utils import splitmix


def _features(n=2, S=4):
  pixels = np.zeros((n, 1, S, S, 1), np.uint8)
  pixels[1::2] = 200
  return {'pixels': tf.constant(pixels), 'label': tf.constant(np.arange(n, dtype=np.int32)[:, None]),
          'weight': tf.ones([n, 1])}


def _mix(mixup_lambda=None, cutmix_lambda=None, box_center=((0.5, 0.5),) * 2, hashes=(1, 1), features=None):
  f32 = lambda x: None if x is None else tf.constant(x, tf.float32)
  mixed = mixup.apply(features or _features(), f32(mixup_lambda), f32(cutmix_lambda), f32(box_center),
                      tf.constant(np.array(hashes, np.uint64)))
  return {k: v.numpy() for k, v in mixed.items()}


def test_mixup_weights_pixels_and_labels_by_lambda():
  mixed = _mix(mixup_lambda=(0.75, 0.75))
  assert mixed['pixels'][0].max() == mixed['pixels'][0].min() == 50  # 0.25 · 200
  assert mixed['pixels'][1].max() == 150
  assert mixed['label'].tolist() == [[0, 1], [1, 0]]
  np.testing.assert_allclose(mixed['weight'], [[0.75, 0.25]] * 2)


def test_cutmix_copies_a_box_and_lambda_is_the_remaining_area():
  # A quarter of 4 × 4 is a box of side 2 around (2, 2): rows and columns 1 and 2.
  mixed = _mix(cutmix_lambda=(0.75, 0.75))
  in_box = np.zeros((4, 4), bool)
  in_box[1:3, 1:3] = True
  np.testing.assert_array_equal(mixed['pixels'][0, 0, ..., 0], np.where(in_box, 200, 0))
  np.testing.assert_array_equal(mixed['pixels'][1, 0, ..., 0], np.where(in_box, 0, 200))
  np.testing.assert_allclose(mixed['weight'], [[0.75, 0.25]] * 2)
  # In a corner a quarter of the box remains, 1 of 16 pixels, and the weights change accordingly.
  mixed = _mix(cutmix_lambda=(0.75, 0.75), box_center=((0.0, 0.0),) * 2)
  np.testing.assert_allclose(mixed['weight'], [[15 / 16, 1 / 16]] * 2)
  assert (mixed['pixels'][0] == 200).sum() == 1


def test_with_both_enabled_half_of_the_pairs_use_cutmix():
  n = 400
  hashes = np.repeat([splitmix.mix('pair', i) for i in range(n // 2)], 2).astype(np.uint64)
  mixed = _mix((0.5,) * n, (0.75,) * n, ((0.5, 0.5),) * n, hashes, _features(n))
  cut = mixed['weight'][:, 0] == 0.75
  np.testing.assert_array_equal(cut[::2], cut[1::2])
  assert abs(cut[::2].mean() - 0.5) < 4 * np.sqrt(0.25 / 200)
  assert ((mixed['pixels'] == 100).all((1, 2, 3, 4)) == ~cut).all()


def test_lambda_has_a_beta_distribution_and_differs_by_batch():
  sample = lambda count: mixup.sample_lambda(0.8, 2000, 0, 'task', tf.constant(count, tf.int64)).numpy()
  first = sample(0)
  # Beta(α, α): mean 1/2, variance 1 / (4 (2 α + 1)) = 0.0962.
  assert abs(first.mean() - 0.5) < 0.03 and abs(first.var() - 0.0962) < 0.01
  np.testing.assert_array_equal(first, sample(0))
  assert not np.array_equal(first, sample(1))
