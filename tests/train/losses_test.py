"""Losses against numbers worked out by hand, in the comments; and properties of the sampled vocabulary."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uni_moe_jax.train import losses

# Probabilities that are easy to read: logits are their logarithms.
HALF = np.log([.5, .25, .25]).astype(np.float32)
MOST = np.log([.8, .1, .1]).astype(np.float32)

# One compilation instead of dozens of operations.
cross_entropy = jax.jit(losses.cross_entropy, static_argnames='smoothing')
contrastive = jax.jit(losses.contrastive, static_argnames=('smoothing', 'reduction', 'block'))
sample_vocabulary = jax.jit(losses.sample_vocabulary, static_argnames='size')


def _cross_entropy(logits, labels, weights, smoothing=0., correction=None):
  return cross_entropy(
      np.array(logits, np.float32), np.array(labels, np.int32), np.array(weights, np.float32), smoothing=smoothing,
      correction=None if correction is None else np.array(correction, np.float32))


def test_cross_entropy_sums_weighted_nll_and_hits():
  # Sample 0 reads two rows: label 0 of HALF (p = 1/2, a hit, weight 1) and label 1 of MOST (p = 1/10, a miss,
  # weight 2); sample 1: label 2 of HALF (p = 1/4, a miss, weight 3), and a label of weight 0, which does not count.
  tally = _cross_entropy([[HALF, MOST], [HALF, MOST]], [[0, 1], [2, 0]], [[1., 2.], [3., 0.]])
  np.testing.assert_allclose(tally.loss, math.log(2) + 2 * math.log(10) + 3 * math.log(4), rtol=1e-6)
  assert float(tally.hits) == 1


def test_smoothing_mixes_in_the_mean_over_all_targets():
  # nll = ln 2; mean of -log p = (ln 2 + 2 ln 4) / 3 = 5/3 ln 2; 0.9 · ln 2 + 0.1 · 5/3 ln 2 = (0.9 + 1/6) ln 2.
  tally = _cross_entropy([[HALF]], [[0]], [[1.]], smoothing=.1)
  np.testing.assert_allclose(tally.loss, (.9 + 1 / 6) * math.log(2), rtol=1e-6)


def test_mixed_labels_read_one_row_twice():
  # Mixup of classes 0 and 1 with shares 0.75 and 0.25: -0.75 ln 1/2 - 0.25 ln 1/4 = 1.25 ln 2. The most likely
  # target is class 0: a hit of its share.
  tally = _cross_entropy([[HALF]], [[0, 1]], [[.75, .25]])
  np.testing.assert_allclose(tally.loss, 1.25 * math.log(2), rtol=1e-6)
  np.testing.assert_allclose(tally.hits, .75)


def test_mixed_labels_equal_the_soft_target_loss_in_value_and_gradient():
  logits = np.random.default_rng(0).normal(size=(3, 1, 5)).astype(np.float32)
  labels, shares = np.array([[0, 1], [2, 2], [4, 3]]), np.array([[.7, .3], [.5, .5], [.2, .8]], np.float32)
  soft = np.einsum('bm,bmv->bv', shares, np.eye(5, dtype=np.float32)[labels])

  def by_labels(x):
    return losses.cross_entropy(x, labels, shares, .1).loss

  def by_distribution(x):
    return -((.9 * soft + .1 / 5) * jax.nn.log_softmax(x[:, 0])).sum()

  (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(logits) for f in (by_labels, by_distribution))
  np.testing.assert_allclose(a, b, rtol=1e-6)
  np.testing.assert_allclose(da, db, atol=1e-6)


def test_a_small_loss_between_large_logits_is_exact():
  # ln(1 + e^-10): logits of 100 have neighbors 8e-6 apart.
  np.testing.assert_allclose(_cross_entropy([[[100., 90.]]], [[0]], [[1.]]).loss, 4.5398899e-05, rtol=2e-3)


# Three pairs; texts 0 and 2 are the same. Row i is the similarity of sample i with texts 0, 1, 2.
LEFT = np.log([[4., 2., 9.], [1., 3., 1.], [9., 2., 6.]])
TEXT_IDS = [7, 5, 7]


def _contrastive(left=LEFT, text_ids=TEXT_IDS, weights=(1., 1., 1.), **kw):
  text_ids = None if text_ids is None else np.array(text_ids)
  return contrastive(jnp.asarray(left, jnp.float32), text_ids, np.array(weights, np.float32), **kw)


# Left → right: sample 0 has 4 against 2 (the 9 is its own text): ln 6/4; sample 1: 3 of 5: ln 5/3; sample 2: 6
# against 2: ln 8/6. Right → left: text 0 has 4 against 1: ln 5/4; text 1: 3 of 7: ln 7/3; text 2: 6 against 1: ln 7/6.
FORWARD = [math.log(6 / 4), math.log(5 / 3), math.log(8 / 6)]
BACKWARD = [math.log(5 / 4), math.log(7 / 3), math.log(7 / 6)]


@pytest.mark.parametrize('reduction, factor', [('mean', .5), ('sum', 1.)])
def test_contrastive_loss_has_two_directions_and_masks_duplicate_texts(reduction, factor):
  tally = _contrastive(reduction=reduction)
  np.testing.assert_allclose(tally.loss, factor * (sum(FORWARD) + sum(BACKWARD)), rtol=1e-5)
  assert float(tally.hits) == 3  # the larger similarities of 0 and 2 are to their own text


def test_without_duplicates_every_other_text_is_a_negative():
  forward = [math.log(15 / 4), math.log(5 / 3), math.log(17 / 6)]
  backward = [math.log(14 / 4), math.log(7 / 3), math.log(16 / 6)]
  tally = _contrastive(text_ids=[0, 1, 2])
  np.testing.assert_allclose(tally.loss, .5 * (sum(forward) + sum(backward)), rtol=1e-5)
  assert float(tally.hits) == 1


def test_an_example_of_weight_zero_is_still_a_negative():
  tally = _contrastive(weights=[2., 0., 1.])
  expected = 2 * (FORWARD[0] + BACKWARD[0]) + FORWARD[2] + BACKWARD[2]
  np.testing.assert_allclose(tally.loss, .5 * expected, rtol=1e-5)
  assert float(tally.hits) == 3


def test_without_text_ids_equal_texts_are_negatives_as_published():
  np.testing.assert_array_equal(_contrastive(text_ids=None).loss, _contrastive(text_ids=[0, 1, 2]).loss)
  assert float(_contrastive(text_ids=None).loss) > float(_contrastive().loss) + .1  # the duplicate's 9 counts against 4


def test_smoothing_of_pairs_spreads_over_the_allowed_texts_only():
  # Sample 0 may have texts 0 and 1, p = 4/6 and 2/6: the mean of -log p is (ln 6/4 + ln 6/2) / 2, and so on.
  ln = math.log
  spread_forward = [(ln(6 / 4) + ln(3)) / 2, (ln(5) + ln(5 / 3) + ln(5)) / 3, (ln(8 / 2) + ln(8 / 6)) / 2]
  spread_backward = [(ln(5 / 4) + ln(5)) / 2, (ln(7 / 2) + ln(7 / 3) + ln(7 / 2)) / 3, (ln(7) + ln(7 / 6)) / 2]
  expected = .8 * (sum(FORWARD) + sum(BACKWARD)) + .2 * (sum(spread_forward) + sum(spread_backward))
  np.testing.assert_allclose(_contrastive(smoothing=.2).loss, .5 * expected, rtol=1e-5)


@pytest.mark.parametrize('smoothing', [0., .1])
def test_blocks_are_batches_of_their_own(smoothing):
  x, ids, weights = jax.random.normal(jax.random.key(0), (6, 6)), [7, 5, 7, 7, 2, 5], (1., 2., 1., 0., 1., 3.)

  def blocks(x):  # those of one batch
    return _contrastive(x, ids, weights, smoothing=smoothing, block=3)

  def batches(x):
    one, two = (_contrastive(x[b, b], ids[b], weights[b], smoothing=smoothing) for b in (slice(0, 3), slice(3, 6)))
    return jax.tree.map(jnp.add, one, two)

  for name in ('loss', 'hits'):
    np.testing.assert_allclose(getattr(blocks(x), name), getattr(batches(x), name), rtol=1e-6)
  gradients = [jax.grad(lambda x, f=f: f(x).loss)(x) for f in (blocks, batches)]
  np.testing.assert_allclose(*gradients, atol=1e-6)
  assert np.all(np.asarray(gradients[0])[:3, 3:] == 0)
  one_block = _contrastive(x, ids, weights, smoothing=smoothing)
  block_of_6 = _contrastive(x, ids, weights, smoothing=smoothing, block=6)
  np.testing.assert_allclose(block_of_6.loss, one_block.loss, rtol=1e-6)
  assert abs(float(one_block.loss) - float(blocks(x).loss)) > .1  # blocks matter


@pytest.mark.parametrize('smoothing', [0., .1])
def test_masked_duplicates_have_gradient_zero(smoothing):
  gradient = np.array(jax.jit(jax.grad(lambda x: _contrastive(x, smoothing=smoothing).loss))(LEFT.astype(np.float32)))
  assert np.isfinite(gradient).all()
  assert gradient[0, 2] == gradient[2, 0] == 0
  assert (np.abs(gradient[[0, 0, 1], [0, 1, 2]]) > 1e-3).all()


# The sampled vocabulary.
V, LABELS = 12, (2, 7, 11)


IS_LABEL = np.isin(np.arange(V), LABELS)


def _sample(seed, size):
  return jax.device_get(sample_vocabulary(jax.random.key(seed), IS_LABEL, size=size))


@pytest.mark.parametrize('size', [3, 4, 8])
def test_labels_are_always_sampled_and_words_are_distinct(size):
  drawn = np.stack([_sample(seed, size).ids for seed in range(50)])
  for ids in drawn.tolist():
    assert set(LABELS) <= set(ids)
    assert len(set(ids)) == size
  if size > 3:
    assert set(np.unique(drawn)) == set(range(V))  # every other word comes up


def test_the_correction_compensates_for_words_left_out():
  # 3 labels in a sample of 7 leave 4 draws for 9 others: each represents 9/4 words.
  words = _sample(0, 7)
  is_label = np.isin(words.ids, LABELS)
  np.testing.assert_allclose(words.correction, np.where(is_label, 0, math.log(9 / 4)), rtol=1e-6)


def test_a_sampled_word_represents_those_left_out_in_the_sum_and_in_smoothing():
  # Values 2 and 1, the second drawn for three words: their sum is 2 + 3 · 1, so log p is ln 2/5, and ln 1/5 three
  # times.
  tally = _cross_entropy([[[math.log(2), 0.]]], [[0]], [[1.]], .1, [0., math.log(3)])
  expected = .9 * math.log(5 / 2) + .1 * (math.log(5 / 2) + 3 * math.log(5)) / 4
  np.testing.assert_allclose(tally.loss, expected, rtol=1e-6)
  assert float(tally.hits) == 1  # the most likely word is the label, however many words the other one represents


def test_averaged_over_keys_the_corrected_partition_function_is_the_full_one():
  logits = np.random.default_rng(5).normal(size=V) * 2
  draws = 4000
  keys = jax.random.split(jax.random.key(6), draws)
  words = jax.device_get(jax.jit(jax.vmap(lambda k: losses.sample_vocabulary(k, jnp.asarray(IS_LABEL), 6)))(keys))
  sums = np.exp(logits[words.ids] + words.correction).sum(-1)
  error = sums.std() / math.sqrt(draws)
  full = np.exp(logits).sum()
  assert abs(sums.mean() - full) < 4 * error
  assert 4 * error < .05 * full  # the bound is tight enough to detect a missing correction


def test_labels_beyond_the_sample_size_are_counted_and_absent():
  words = _sample(0, 2)
  assert float(words.dropped) == 1
  absent = [p for p in LABELS if int(words.index[p]) == 2]
  assert len(absent) == 1
  np.testing.assert_array_equal(words.correction, 0)
  assert float(_sample(0, 3).dropped) == 0


@pytest.mark.parametrize('size', [1, 2])
def test_of_more_labels_than_the_sample_has_words_each_is_kept_as_often(size):
  kept = np.concatenate([_sample(seed, size).ids for seed in range(90)])
  counts = [(kept == label).sum() for label in LABELS]
  assert sum(counts) == len(kept)
  assert all(abs(n - 30 * size) < 4 * math.sqrt(20) for n in counts)  # binomial, 90 · 1/3 · 2/3
