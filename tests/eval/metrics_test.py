"""Every metric against numbers worked out by hand, in the comments."""

import math

import numpy as np
from absl.testing import absltest, parameterized

from uni_moe_jax.eval import metrics


class AnswerTest(parameterized.TestCase):

  def test_f1_and_matthews_of_a_hand_worked_table(self):
    # TP 3, FN 1, FP 2, TN 4.
    labels = np.array([1] * 4 + [0] * 6)
    predicted = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    self.assertAlmostEqual(metrics.f1(predicted, labels), 6 / 9)
    # (3 · 4 - 2 · 1) / sqrt(5 · 4 · 6 · 5)
    self.assertAlmostEqual(metrics.matthews(predicted, labels), 10 / math.sqrt(600))
    self.assertEqual(metrics.f1(labels, labels), 1.0)
    self.assertEqual(metrics.matthews(1 - labels, labels), -1.0)

  def test_a_constant_answer_is_at_chance(self):
    labels = np.array([1, 0, 1, 0])
    self.assertEqual(metrics.matthews(np.ones(4, int), labels), 0.0)
    self.assertAlmostEqual(metrics.f1(np.ones(4, int), labels), 2 / 3)  # TP 2, FP 2
    self.assertEqual(metrics.f1(np.zeros(4, int), np.zeros(4, int)), 0.0)

  @parameterized.parameters((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0))
  def test_an_answer_scores_by_how_many_of_ten_gave_it(self, same, score):
    people = ['yes'] * same + [f'other {i}' for i in range(10 - same)]
    [value] = metrics.vqa_score(['yes'], [people])
    self.assertAlmostEqual(value, score)


class RecallTest(parameterized.TestCase):

  def test_rank_is_that_of_the_best_positive_and_ties_count_against_the_model(self):
    similarity = np.array([
        [.9, .8, .1, .2],  # positives 1 and 3: best .8, one negative above it        -> rank 2
        [.5, .5, .5, .1],  # positive 0: negatives 1 and 2 are as high                 -> rank 3
        [.7, .7, .2, .1],  # positives 0 and 1 tie with each other, no negative near   -> rank 1
        [.3, .2, .1, .0],  # positive 3: lowest                                        -> rank 4
    ])
    positives = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(metrics.best_positive_rank(similarity, positives), [2, 3, 1, 4])
    for k, share in ((1, .25), (2, .5), (3, .75), (4, 1.)):
      self.assertEqual(metrics.recall_at_k(similarity, positives, k), share)

  def test_chance_is_that_of_a_random_order(self):
    positives = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    self.assertAlmostEqual(metrics.recall_by_chance(positives, 1), (1 / 4 + 1 / 2 + 1) / 3)
    # Two of four are drawn: one of C(4, 2) = 6 pairs has neither of two right ones, three have not the only one.
    self.assertAlmostEqual(metrics.recall_by_chance(positives, 2), (1 / 2 + 5 / 6 + 1) / 3)
    self.assertEqual(metrics.recall_by_chance(positives, 5), 1.0)  # more than there are

  @parameterized.parameters(([np.nan] * 3, 3), ([np.nan, .2, .1], 3), ([.5, np.nan, .1], 2))
  def test_nan_counts_against_the_model(self, similarity, rank):
    positives = np.array([[True, False, False]])
    self.assertEqual(metrics.best_positive_rank(np.array([similarity]), positives), rank)

  def test_a_query_without_positive_is_named(self):
    with self.assertRaisesRegex(ValueError, r'query 1 has no positive target \(1 of 2'):
      metrics.recall_at_k(np.zeros((2, 2)), np.array([[True, False], [False, False]]), 1)

  def test_unequal_shapes_are_named(self):
    with self.assertRaisesRegex(ValueError, r'\(2, 3\) and positives \(3, 2\)'):
      metrics.recall_at_k(np.zeros((2, 3)), np.ones((3, 2), bool), 1)


class AccuracyTest(parameterized.TestCase):

  def test_top_k_counts_labels_among_the_k_highest_scores(self):
    scores = np.array([[.1, .7, .2], [.5, .3, .2], [.2, .3, .5], [.4, .4, .2]])
    labels = np.array([1, 1, 0, 0])  # ranks 1, 2, 3, and 2 for the tie
    self.assertEqual(metrics.top_k_accuracy(scores, labels, 1), .25)
    self.assertEqual(metrics.top_k_accuracy(scores, labels, 2), .75)
    self.assertEqual(metrics.top_k_accuracy(scores, labels, 3), 1.)

  def test_a_constant_model_gets_no_accuracy_out_of_ties(self):
    self.assertEqual(metrics.top_k_accuracy(np.zeros((4, 3)), np.zeros(4, int)), 0)

  @parameterized.parameters(-1, 3)
  def test_a_label_outside_the_targets_is_an_error(self, label):
    with self.assertRaisesRegex(ValueError, r'there are 3 targets: labels must be in \[0, 3\)'):
      metrics.top_k_accuracy(np.zeros((1, 3)), np.array([label]))

  @parameterized.parameters(('ints', [0, 1, 2]), ('names', ['arrow', 'box', 'letter']))
  def test_balanced_accuracy_is_the_mean_recall_of_present_classes(self, _, classes):
    # Class 0: 3 of 4 correct; class 1: 1 of 2; class 2: 0 of 1; a fourth class is predicted only.
    labels = np.array(classes)[[0, 0, 0, 0, 1, 1, 2]]
    predictions = np.array(classes)[[0, 0, 0, 1, 1, 0, 0]]
    self.assertAlmostEqual(metrics.balanced_accuracy(predictions, labels), (3/4 + 1/2 + 0) / 3)
    self.assertAlmostEqual(metrics.accuracy(predictions, labels), 4 / 7)

  def test_a_class_that_is_only_predicted_has_no_share(self):
    self.assertEqual(metrics.balanced_accuracy(np.array([0, 9]), np.array([0, 0])), .5)

  def test_no_examples_are_an_error_not_a_number(self):
    with self.assertRaisesRegex(ValueError, 'no examples'):
      metrics.balanced_accuracy(np.zeros(0), np.zeros(0))
    with self.assertRaisesRegex(ValueError, 'no examples'):
      metrics.exact_match([], [])

  def test_binomial_standard_error(self):
    self.assertAlmostEqual(metrics.binomial_standard_error(.2, 400), .02)  # sqrt(.16 / 400)
    with self.assertRaisesRegex(ValueError, r'must be in \[0, 1\]'):
      metrics.binomial_standard_error(20., 400)


class TextTest(parameterized.TestCase):

  def test_perplexity_is_exp_of_the_weighted_mean(self):
    # Two tokens of probability 1/2 and 1/8: sqrt(2 * 8) = 4.
    self.assertAlmostEqual(metrics.perplexity(math.log(2) + math.log(8), 2), 4)
    self.assertEqual(metrics.perplexity(1e6, 1), math.inf)
    with self.assertRaisesRegex(ValueError, 'weights sum to 0'):
      metrics.perplexity(0., 0)

  def test_exact_match_ignores_case_and_spacing_only(self):
    self.assertEqual(metrics.exact_match(
        ['Full  block', 'full blocks', 'b'], ['full block', 'full block', ['a', 'b']]), 2 / 3)

  @parameterized.parameters(
      ('greek small letter', 'greek letter alpha', 2 / 3),  # 2 shared, 3 and 3 words
      ('a a b', 'a b b c', 4 / 7),  # shared a, b: 2 * 2 / (3 + 4)
      ('a a b', 'a a c', 4 / 6),  # shared a, a: a repeated word counts as often as both have it
      ('letter alpha', 'alpha letter', 1.),  # a bag has no order
      ('', 'full block', 0.), ('', '', 1.),
  )
  def test_word_f1_of_bags(self, prediction, reference, expected):
    self.assertAlmostEqual(metrics.word_f1([prediction], [reference])[0], expected)

  def test_word_f1_takes_the_closest_reference_of_each_example(self):
    self.assertEqual(metrics.word_f1(['a b', 'c'], [['c d', 'a b'], 'd']).tolist(), [1., 0.])

  def test_a_mean_has_the_standard_error_of_its_examples(self):
    # Values 0, 1, 1, 0: squared deviations 4 · ¼ over 3, over 4 examples.
    score = metrics.Score.mean('word F1', np.array([0., 1., 1., 0.]), {'copied': np.array([.5, 0.])})
    self.assertEqual((score.value, score.count, score.baselines), (.5, 4, {'copied': .25}))
    self.assertAlmostEqual(score.standard_error, math.sqrt(1 / 3 / 4))
    self.assertIsNone(metrics.Score.mean('word F1', np.array([.3]), {}).standard_error)

  def test_balanced_accuracy_has_an_error_of_its_classes(self):
    # Shares 1/2 of 4 and 2/3 of 3: sqrt(¼ / 4 + 2/9 / 3) / 2.
    labels, output = np.array([0, 0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1, 0])
    self.assertAlmostEqual(metrics.balanced_accuracy(output, labels), 7 / 12)
    self.assertAlmostEqual(metrics.balanced_accuracy_error(output, labels), math.sqrt(1 / 16 + 2 / 27) / 2)

  def test_bleu4_by_hand(self):
    # Precisions of 1- to 4-grams: 4/5, 3/4, 2/3, 1/2; product 1/5; equal lengths, so no penalty.
    self.assertAlmostEqual(
        metrics.bleu4(['greek small letter alpha x'], ['greek small letter alpha tonos']),
        .2 ** .25, places=6)

  def test_bleu4_counts_over_the_corpus_and_punishes_brevity(self):
    # All n-grams right, 8 words against 12: exp(1 - 12/8). A mean of sentences would differ.
    self.assertAlmostEqual(
        metrics.bleu4(['a b c d e f', 'g h'], ['a b c d e f', 'g h i j k l']),
        math.exp(1 - 12 / 8), places=6)

  def test_bleu4_takes_examples_with_unequally_many_references(self):
    self.assertAlmostEqual(
        metrics.bleu4(['a b c d', 'e f g h'], [['x y', 'a b c d'], 'e f g h']), 1., places=6)

  def test_missing_references_are_named(self):
    with self.assertRaisesRegex(ValueError, '2 predictions for 1 references'):
      metrics.word_f1(['a', 'b'], ['a'])
    with self.assertRaisesRegex(ValueError, 'example 1 has no reference'):
      metrics.word_f1(['a', 'b'], ['a', []])


class TableTest(parameterized.TestCase):

  @parameterized.parameters(  # standard error of .5 in 100: .05, so the margin is .15
      (.34, metrics.BETTER), (.36, metrics.LEVEL), (.64, metrics.LEVEL), (.66, metrics.WORSE))
  def test_a_verdict_needs_three_standard_errors(self, reference, expected):
    row = metrics.Score.proportion('top1', .5, 100).row('glyphs', 10)
    self.assertEqual(metrics.verdict(row, reference), expected)

  @parameterized.parameters((118.4, metrics.BETTER), (63.2, metrics.LEVEL), (60., metrics.WORSE))
  def test_a_lower_perplexity_is_better(self, reference, expected):
    row = {'metric': 'perplexity', 'value': 63.2}
    self.assertEqual(metrics.verdict(row, reference), expected)
    self.assertEqual(metrics.verdict(
        metrics.Score('p', 63.2, 5, higher_is_better=False).row('mlm', 1), reference), expected)

  def test_nan_is_worse_than_any_baseline(self):
    self.assertEqual(metrics.verdict({'metric': 'top1', 'value': math.nan}, 0.), metrics.WORSE)

  def test_table_is_aligned_and_marks_every_baseline(self):
    rows = [metrics.Score.proportion('top1', .5, 2500, .02, {'majority': .14, 'pixels': .63})
            .row('glyphs', 7),
            metrics.Score('perplexity', 63.2, 18000, None, {'unigram': 63.2}, None, False)
            .row('mlm', 7)]
    self.assertEqual(metrics.evaluation_table(rows).splitlines()[:4], [
        'evaluator  metric                        value  ± s.e.   count   chance  baselines',
        '---------  ----------------------------  -----  ------  ------  -------  '
        '--------------------------------',
        'glyphs     top1                          0.500   0.010   2,500  0.020 +  '
        'majority 0.140 +, pixels 0.630 -',
        'mlm        perplexity (lower is better)   63.2       —  18,000        —  unigram 63.2 =',
    ])

  def test_no_rows_are_reported(self):
    self.assertEqual(metrics.evaluation_table([]), 'no evaluation rows')

  def test_a_score_prints_as_its_row(self):
    self.assertEqual(str(metrics.Score.proportion('top1', .5, 2500, .02, {'majority': .14})),
                     'top1  0.500  0.010  2,500  0.020 +  majority 0.140 +')

  @parameterized.parameters(
      (None, '—'), (0., '0.000'), (1., '1.000'), (.0025, '0.0025'), (63.21, '63.2'),
      (12345.6, '12,346'), (math.nan, 'nan'), (-.5, '-0.500'))
  def test_numbers_show_the_digits_that_matter(self, value, expected):
    self.assertEqual(metrics.format_number(value), expected)


if __name__ == '__main__':
  absltest.main()
