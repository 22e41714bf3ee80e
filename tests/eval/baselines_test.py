"""Each baseline on data whose result is known, or on data that only one baseline can solve."""

import numpy as np
import pytest
import threadpoolctl

from uni_moe_jax.eval import baselines, metrics


def test_questions_are_answered_from_examples_with_the_same_question():
  # Question a is that of train examples 0 and 2, b that of 1; c is new and answered from all.
  seen = []

  def predict(train, test):
    seen.append((train.tolist(), test.tolist()))
    return 10 * test + len(train)

  predicted = baselines.per_question(predict, np.array(['a', 'b', 'a']), np.array(['b', 'a', 'c', 'a']))
  assert seen == [([0, 2], [1, 3]), ([1], [0]), ([0, 1, 2], [2])]
  assert predicted.tolist() == [1, 12, 23, 32]


def test_majority_learns_from_train_and_is_scored_on_test():
  train = np.array(['arrow', 'box', 'box', 'letter', 'letter', 'letter'])
  test = np.array(['box', 'letter', 'arrow', 'box'])
  np.testing.assert_array_equal(baselines.majority_predictions(train, 2), ['letter', 'letter'])
  assert baselines.majority_accuracy(train, test) == .25
  assert baselines.majority_accuracy(train, test, k=2) == .75


def test_of_equally_frequent_labels_the_smaller_is_answered():
  np.testing.assert_array_equal(baselines.most_frequent(np.array([5, 3, 3, 5, 9]), 2), [3, 5])


def test_unigram_by_hand():
  # Counts 5, 2, 0 plus one each: 6/10, 3/10, 1/10. Tokens 0, 0, 2: (.6 * .6 * .1) ** (-1/3).
  scores = baselines.unigram(np.array([5, 2, 0]), np.array([0, 0, 2]))
  assert scores == pytest.approx((2 / 3, (.6 * .6 * .1) ** (-1 / 3)), rel=1e-8)


def test_neighbors_equal_the_exact_search():
  rng = np.random.default_rng(0)
  train, test = (rng.integers(0, 256, (n, 3, 4), np.uint8) for n in (4396, 521))
  gap = train[None].astype(np.int32) - test[:, None]
  np.testing.assert_array_equal(baselines.nearest_neighbor(train, test), np.square(gap).sum(axis=(2, 3)).argmin(axis=1))


def test_images_that_float32_cannot_distinguish_are_distinguished():
  # Squared norms are near 2 ** 26, where float32 has multiples of 4 or 8 only; the distances are 3, 2 and 1.
  test = np.full((1, 32, 32), 250, np.uint8)
  train = np.repeat(test, 3, axis=0)
  for i in range(3):
    train[i, 0, :3 - i] -= 1
  np.testing.assert_array_equal(baselines.nearest_neighbor(train, test), [2])


def test_similarity_is_the_word_f1_of_the_metrics():
  left = ['greek small letter', 'a a b', '', 'Full Block']
  right = ['greek letter alpha', 'a b b c', 'full block']
  expected = [[metrics.word_f1([x], [y])[0] for y in right] for x in left]
  np.testing.assert_allclose(baselines.name_similarity(left, right), expected, atol=2e-7)


def test_the_candidate_closest_to_the_neighbors_name_is_chosen():
  names = ['leftwards arrow', 'full block', 'greek small letter beta']
  similarity = baselines.name_similarity(['greek small letter alpha', 'upwards arrow'], names)
  np.testing.assert_array_equal(similarity.argmax(axis=1), [2, 0])


def test_ties_are_neither_all_won_nor_all_lost():
  # Four equal candidates: a fair draw is right in a quarter of 400 cases, give or take 3 * .022.
  similarity = baselines.name_similarity(['arrow'] * 400, ['left arrow', 'up arrow', 'down arrow', 'right arrow'])
  positives = np.arange(400)[:, None] % 4 == np.arange(4)
  assert .18 <= metrics.share_within(metrics.best_positive_rank(similarity, positives), 1) <= .32


def test_tfidf_finds_the_words_that_distinguish_labels():
  texts = np.array(['the array has a shape', 'the figure has an axis'] * 20)
  labels = np.array(['numpy', 'matplotlib'] * 20)
  predictions = baselines.tfidf_logistic((texts,), labels, (np.array(['an axis', 'a shape']),))
  np.testing.assert_array_equal(predictions, ['matplotlib', 'numpy'])


def test_a_fit_that_ends_early_does_not_depend_on_the_number_of_threads_and_warns_nobody(recwarn):
  # Noise, so that the last bits of sums decide some predictions: in float32 about 43 of 2,000.
  rng = np.random.default_rng(0)
  points, labels = rng.random((3000, 300), np.float32), rng.integers(0, 10, 1000)
  predictions = []
  for num_threads in (1, 2):
    with threadpoolctl.threadpool_limits(num_threads):
      predictions.append(baselines._logistic(points[:1000], labels, points[1000:], inverse_penalty=10.0))
  np.testing.assert_array_equal(*predictions)
  assert not recwarn


def test_pairs_are_judged_by_agreement_not_by_either_half():
  # Every word occurs equally often in both halves under both labels: only agreement shows.
  rng = np.random.default_rng(0)
  words = np.array(['alpha', 'beta', 'gamma', 'delta', 'omega', 'sigma'])
  a = rng.integers(0, 6, 600)
  same = rng.random(600) < .5
  b = np.where(same, a, (a + rng.integers(1, 6, 600)) % 6)
  labels = np.where(same, 'yes', 'no')
  predictions = baselines.tfidf_logistic(
      (words[a[:400]], words[b[:400]]), labels[:400], (words[a[400:]], words[b[400:]]))
  assert metrics.accuracy(predictions, labels[400:]) > .95


def test_motion_is_seen_by_all_frames_and_not_by_the_middle_one():
  # A bar moves left or right through the same middle frame.
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, 300)
  videos = np.zeros((300, 5, 8, 8), np.uint8)
  for i, label in enumerate(labels):
    start = rng.integers(0, 2)
    for t in range(5):
      videos[i, t, :, 3 + start + (t - 2) * (1 if label else -1)] = rng.integers(200, 256)
  predictions = {frames: baselines.frame_logistic(videos[:200], labels[:200], videos[200:], frames)
                 for frames in ('all', 'middle')}
  assert metrics.accuracy(predictions['all'], labels[200:]) == 1
  assert metrics.accuracy(predictions['middle'], labels[200:]) < .65


def test_large_color_frames_are_averaged_down():
  videos = np.zeros((2, 3, 64, 48, 3), np.uint8)
  videos[1, :, :3, :3] = 90  # one 3x3 tile of 21x16 tiles
  features = baselines._frame_features(videos, 'middle')
  assert features.shape == (2, 21 * 16 * 3)
  np.testing.assert_allclose(features[1, :4], [90 / 255] * 3 + [0], rtol=1e-6)


def test_one_class_needs_no_fit():
  np.testing.assert_array_equal(baselines.tfidf_logistic((['a b', 'c d'],), ['x', 'x'], (['a b'] * 3,)), ['x'] * 3)
