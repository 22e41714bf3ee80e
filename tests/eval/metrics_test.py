"""Every metric against numbers worked out by hand, in the comments."""

import functools
import math

import numpy as np
import pytest

from uni_moe_jax.eval import metrics

approx = functools.partial(pytest.approx, rel=1e-8)


def test_f1_and_matthews_of_a_hand_worked_table():
  # TP 3, FN 1, FP 2, TN 4.
  labels = np.array([1] * 4 + [0] * 6)
  predicted = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
  assert metrics.f1(predicted, labels) == approx(6 / 9)
  # (3 · 4 - 2 · 1) / sqrt(5 · 4 · 6 · 5)
  assert metrics.matthews(predicted, labels) == approx(10 / math.sqrt(600))
  assert metrics.f1(labels, labels) == 1.0
  assert metrics.matthews(1 - labels, labels) == -1.0


def test_a_constant_answer_is_at_chance():
  labels = np.array([1, 0, 1, 0])
  assert metrics.matthews(np.ones(4, int), labels) == 0.0
  assert metrics.f1(np.ones(4, int), labels) == approx(2 / 3)  # TP 2, FP 2
  assert metrics.f1(np.zeros(4, int), np.zeros(4, int)) == 0.0


@pytest.mark.parametrize('same, score', [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_an_answer_scores_by_how_many_of_ten_gave_it(same, score):
  people = ['yes'] * same + [f'other {i}' for i in range(10 - same)]
  assert metrics.vqa_score(['yes'], [people]) == approx([score])


def test_rank_is_that_of_the_best_positive_and_ties_count_against_the_model():
  similarity = np.array([
      [.9, .8, .1, .2],  # positives 1 and 3: best .8, one negative above it        -> rank 2
      [.5, .5, .5, .1],  # positive 0: negatives 1 and 2 are as high                 -> rank 3
      [.7, .7, .2, .1],  # positives 0 and 1 tie with each other, no negative near   -> rank 1
      [.3, .2, .1, .0],  # positive 3: lowest                                        -> rank 4
  ])
  positives = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], bool)
  np.testing.assert_array_equal(metrics.best_positive_rank(similarity, positives), [2, 3, 1, 4])
  for k, share in ((1, .25), (2, .5), (3, .75), (4, 1.)):
    assert metrics.share_within(metrics.best_positive_rank(similarity, positives), k) == share


@pytest.mark.parametrize('block', [1, 2, 3, 100])
def test_ranks_of_both_directions_do_not_depend_on_how_many_queries_are_ranked_at_once(block):
  rng = np.random.default_rng(0)
  similarity = rng.integers(0, 4, (7, 5)) / 4  # ties
  similarity[2, 1] = similarity[5, 3] = np.nan
  positives = rng.random((7, 5)) < .3
  positives[np.arange(7), np.arange(7) % 5] = True
  sizes = []
  read = lambda part: [sizes.append(len(similarity[part])), similarity[part]][1]
  ranks = metrics.mutual_ranks(read, positives, block)
  np.testing.assert_array_equal(ranks[0], metrics.best_positive_rank(similarity, positives))
  np.testing.assert_array_equal(ranks[1], metrics.best_positive_rank(similarity.T, positives.T))
  assert max(sizes) == min(block, 7) and len(set(ranks[1].tolist())) > 2


def test_chance_is_that_of_a_random_order():
  positives = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
  assert metrics.recall_by_chance(positives, 1) == approx((1 / 4 + 1 / 2 + 1) / 3)
  # Two of four are drawn: one of C(4, 2) = 6 pairs has neither of two right ones, three have not the only one.
  assert metrics.recall_by_chance(positives, 2) == approx((1 / 2 + 5 / 6 + 1) / 3)
  assert metrics.recall_by_chance(positives, 5) == 1.0  # more than there are


@pytest.mark.parametrize('similarity, rank', [([np.nan] * 3, 3), ([np.nan, .2, .1], 3), ([.5, np.nan, .1], 2)])
def test_nan_counts_against_the_model(similarity, rank):
  assert metrics.best_positive_rank(np.array([similarity]), np.array([[True, False, False]])) == rank


@pytest.mark.parametrize('classes', [[0, 1, 2], ['arrow', 'box', 'letter']])
def test_balanced_accuracy_is_the_mean_recall_of_present_classes(classes):
  # Class 0: 3 of 4 correct; class 1: 1 of 2; class 2: 0 of 1; a fourth class is predicted only.
  labels = np.array(classes)[[0, 0, 0, 0, 1, 1, 2]]
  predictions = np.array(classes)[[0, 0, 0, 1, 1, 0, 0]]
  assert metrics.balanced_accuracy(predictions, labels) == approx((3/4 + 1/2 + 0) / 3)
  assert metrics.accuracy(predictions, labels) == approx(4 / 7)


@pytest.mark.parametrize('function, args, message', [
    (metrics.best_positive_rank, (np.zeros((2, 2)), np.array([[True, False], [False, False]])),
     r'query 1 has no positive target \(1 of 2'),
    (metrics.mutual_ranks, (np.zeros((2, 2)).__getitem__, np.array([[True, False], [True, False]])),
     r'query 1 has no positive target \(1 of 2'),
    (metrics.share_within, ([], 1), 'no examples'),
    (metrics.balanced_accuracy, (np.zeros(0), np.zeros(0)), 'no examples'),
    (metrics.exact_match, ([], []), 'no examples'),
    (metrics.perplexity, (0., 0), 'weights sum to 0'),
    (metrics.word_f1, (['a', 'b'], ['a']), '2 predictions for 1 references'),
    (metrics.word_f1, (['a', 'b'], ['a', []]), 'example 1 has no reference')])
def test_arguments_without_a_score_are_errors(function, args, message):
  with pytest.raises(ValueError, match=message):
    function(*args)


def test_the_error_of_a_share_has_two_successes_and_two_failures_more():
  assert metrics.binomial_standard_error(.2, 396) == approx(math.sqrt(.203 * .797 / 400))  # 79.2 + 2 of 400
  # 0 of 400 and 1 of 400 are level; so are the means of as many values.
  for score in (metrics.Score.share('top-1', np.zeros(400)), metrics.Score.mean('word F1', np.zeros(400), {})):
    assert metrics.verdict(score.row('e', 1), .0025) == metrics.LEVEL, score


def test_perplexity_is_exp_of_the_weighted_mean():
  # Two tokens of probability 1/2 and 1/8: sqrt(2 * 8) = 4.
  assert metrics.perplexity(math.log(2) + math.log(8), 2) == approx(4)
  assert metrics.perplexity(1e6, 1) == math.inf


def test_perplexity_has_the_error_of_its_mean_log_p():
  # Means 0 of one position and -1 of three: -3/4; deviations 3/4 and -1/4, each times its weight 3/4 in size.
  log_p, weights = np.array([0., -1.]), np.array([1, 3])
  value = math.exp(.75)
  assert metrics.perplexity_error(value, log_p, weights) == approx(value * math.sqrt(2 / 1 * 2 * 9 / 16) / 4)
  assert metrics.perplexity_error(value, log_p[:1], weights[:1]) is None
  assert metrics.perplexity_error(math.inf, log_p, weights) is None


def test_exact_match_compares_what_the_tokenizer_can_write():
  """SentencePiece replaces signs that are compatible: a perfect caption would not equal its reference."""
  references = ['一只猫，在垫子上！', 'wait… what', '５ ㎏']
  assert metrics.exact_match(['一只猫,在垫子上!', 'wait... what', '5 kg'], references) == 1.0
  assert metrics.word_f1(['wait... what'], references[1:2]) == 1.0
  assert metrics.exact_match(['一只猫在垫子上', 'wait what', '5 g'], references) == 0.0


def test_exact_match_ignores_case_and_spacing_only():
  references = ['full block', 'full block', ['a', 'b']]
  assert metrics.exact_match(['Full  block', 'full blocks', 'b'], references) == 2 / 3


@pytest.mark.parametrize('prediction, reference, expected', [
    ('greek small letter', 'greek letter alpha', 2 / 3),  # 2 shared, 3 and 3 words
    ('a a b', 'a b b c', 4 / 7),  # shared a, b: 2 * 2 / (3 + 4)
    ('a a b', 'a a c', 4 / 6),  # shared a, a: a repeated word counts as often as both have it
    ('letter alpha', 'alpha letter', 1.),  # a bag has no order
    ('', 'full block', 0.), ('', '', 1.)])
def test_word_f1_of_bags(prediction, reference, expected):
  assert metrics.word_f1([prediction], [reference]) == approx([expected])


def test_word_f1_takes_the_closest_reference_of_each_example():
  assert metrics.word_f1(['a b', 'c'], [['c d', 'a b'], 'd']).tolist() == [1., 0.]


def test_a_mean_has_the_standard_error_of_its_examples():
  # Values 0, 1, 1, 0: squared deviations 4 · ¼ over 3, over 4 examples.
  score = metrics.Score.mean('word F1', np.array([0., 1., 1., 0.]), {'copied': np.array([.5, 0.])})
  assert (score.value, score.count, score.baselines) == (.5, 4, {'copied': .25})
  assert score.standard_error == approx(math.sqrt(1 / 3 / 4))
  assert metrics.Score.mean('word F1', np.array([.3]), {}).standard_error is None


def test_balanced_accuracy_has_an_error_of_its_classes():
  # Shares 1/2 of 4 and 2/3 of 3: sqrt(¼ / 3 + 2/9 / 2) / 2.
  labels, output = np.array([0, 0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1, 0])
  assert metrics.balanced_accuracy(output, labels) == approx(7 / 12)
  assert metrics.balanced_accuracy_error(output, labels) == approx(math.sqrt(1 / 12 + 1 / 9) / 2)
  # A third class of one example has the variance of any: 5 of 8 are right, and 7 of 12 with two of both more.
  assert metrics.balanced_accuracy_error(np.append(output, 2), np.append(labels, 2)) == approx(
      math.sqrt(1 / 12 + 1 / 9 + 35 / 144) / 3)


@pytest.mark.parametrize('right', [0, 25, 50])
def test_balanced_accuracy_of_classes_of_one_example_has_the_error_of_the_accuracy(right):
  labels = np.arange(50)
  q = (right + 2) / 54
  assert metrics.balanced_accuracy_error(np.where(labels < right, labels, 50), labels) == approx(
      math.sqrt(q * (1 - q) / 50))


def test_balanced_accuracy_without_a_mistake_has_an_error():
  labels = np.repeat([0, 1], [90, 6])
  assert metrics.balanced_accuracy_error(labels, labels) == approx(math.sqrt(98 / 100**2 * 2 * (1 / 90 + 1 / 6)) / 2)


@pytest.mark.parametrize('reference, expected', [  # standard error of .5 in 100: .05, so the margin is .15
    (.34, metrics.BETTER), (.36, metrics.LEVEL), (.64, metrics.LEVEL), (.66, metrics.WORSE)])
def test_a_verdict_needs_three_standard_errors(reference, expected):
  row = metrics.Score.proportion('top1', .5, 100).row('glyphs', 10)
  assert metrics.verdict(row, reference) == expected


@pytest.mark.parametrize('baseline, expected', [('few', metrics.LEVEL), ('all', metrics.BETTER)])
def test_a_baseline_on_a_part_of_the_examples_has_an_error_too(baseline, expected):
  # Of 100 examples the error is .049 and the margin .147; on 25 of them the baseline's error is twice it: .329.
  score = metrics.Score('top1', .5, 100, None, {'few': .2, 'all': .2}, .049, baseline_counts={'few': 25, 'other': 9})
  row = score.row('glyphs', 10)
  assert row['baseline_counts'] == {'few': 25} and metrics.verdict(row, .2, baseline) == expected


@pytest.mark.parametrize('reference, expected', [(118.4, metrics.BETTER), (63.2, metrics.LEVEL), (60., metrics.WORSE)])
def test_a_lower_perplexity_is_better(reference, expected):
  row = metrics.Score('perplexity', 63.2, 5).row('mlm', 1)
  assert metrics.verdict(row, reference) == expected


def test_nan_is_worse_than_any_baseline():
  assert metrics.verdict(metrics.Score('top1', math.nan, 5).row('e', 1), 0.) == metrics.WORSE


@pytest.mark.parametrize('value, expected', [
    (None, '—'), (0., '0.000'), (1., '1.000'), (.0025, '0.0025'), (63.21, '63.2'), (12345.6, '12,346'),
    (math.nan, 'nan'), (-.5, '-0.500')])
def test_numbers_show_the_digits_that_matter(value, expected):
  assert metrics.format_number(value) == expected
