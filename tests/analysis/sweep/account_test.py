"""Variants against dense: by hand, equal models, real differences, and how often there is a false alarm."""

import numpy as np
import pytest
from scipy import stats

from uni_moe_jax.analysis.sweep import account


def _row(evaluator, metric='top-1', chance=.1, **baselines):
  return {'evaluator': evaluator, 'metric': metric, 'value': .5, 'standard_error': .1, 'chance': chance,
          'baselines': baselines, 'higher_is_better': metric != 'perplexity'}


def _cell(variant, seed, rows, seconds=1., parameters=None, loss=None):
  return {'variant': variant, 'seed': seed, 'evaluation': rows, 'seconds_per_step': seconds, 'final_loss': loss,
          'parameters': parameters or {'total': 8, 'active': 2}}


def _compare(values, row=None, weights=None):
  """values: {(variant, seed): scores of the examples of one evaluator}."""
  row = row or _row('e')
  ones = np.ones(len(next(iter(values.values()))))
  cells = [_cell(v, s, [row]) for v, s in values]
  examples = [{('e', row['metric']): np.stack([x, ones if weights is None else weights]).astype(np.float32)}
              for x in values.values()]
  return account.compare(cells, examples)


def _random(share, seed, N=1000):
  return (np.random.default_rng(seed).random(N) < share).astype(float)


def test_equal_models_tie():
  same = {(v, s): _random(.5, s) for v in ('dense', 'attribute') for s in range(3)}
  report = _compare(same)
  [pair] = report['paired']
  assert (pair['gain'], pair['low'], pair['high'], pair['p'], pair['p_holm']) == (0, 0, 0, 1, 1)
  assert pair['outcome'] == pair['outcome_holm'] == 'tie'
  dense, attribute = report['variants']
  assert (attribute['win'], attribute['tie'], attribute['loss']) == (0, 1, 0) and 'win' not in dense


@pytest.mark.parametrize('change, outcome', [(.1, 'win'), (-.1, 'loss')])
def test_a_real_difference_is_a_win_or_a_loss(change, outcome):
  values = {('dense', s): _random(.5, s) for s in range(3)}
  # In every seed, a tenth of the examples become right, or wrong.
  for s in range(3):
    values['task', s] = np.where(_random(.2, 9 + s) > 0, change > 0, values['dense', s]).astype(float)
  [pair] = _compare(values)['paired']
  expected = np.mean([values['task', s].mean() - values['dense', s].mean() for s in range(3)])
  assert pair['gain'] == pytest.approx(expected) and abs(pair['gain'] - change) < .02
  assert pair['outcome'] == outcome and pair['p'] < .01 and pair['seeds'] == 3


def test_pairs_are_of_the_same_seed_and_example():
  # Right and wrong examples differ from seed to seed; in every seed, attribute has one more of 200 than dense.
  values = {('dense', s): _random(.2 + .2 * s, s, 200) for s in range(3)}
  for s in range(3):
    values['attribute', s] = values['dense', s].copy()
    values['attribute', s][np.flatnonzero(values['dense', s] == 0)[:8]] = 1
  [pair] = _compare(values)['paired']
  assert pair['gain'] == pytest.approx(8 / 200) and pair['outcome'] == 'win'
  # Unpaired, seeds differ ten times as much.
  shuffled = {(v, (s + (v == 'attribute')) % 3): x for (v, s), x in values.items()}
  [pair] = _compare(shuffled)['paired']
  assert pair['outcome'] == 'tie'


def test_only_common_seeds_are_compared():
  values = {('dense', s): np.full(4, .5) for s in range(5)} | {('task', s): np.full(4, .75) for s in (1, 3)}
  report = _compare(values)
  assert report['paired'][0]['seeds'] == 2 and report['paired'][0]['gain'] == pytest.approx(.25)
  assert [v['seeds'] for v in report['variants']] == [5, 2]


def test_a_run_that_is_adapted_to_two_tasks_is_one_seed():
  cells = [_cell('dense', 0, [_row(evaluator)]) for evaluator in 'ab']
  [dense] = account.compare(cells, [{(e, 'top-1'): np.ones((2, 4), np.float32)} for e in 'ab'])['variants']
  assert dense['seeds'] == 1


def test_training_losses_are_paired_by_seed():
  losses = {('dense', 0): 9., ('dense', 1): 7., ('dense', 2): 1., ('task', 0): 8., ('task', 1): 6., ('token', 0): 1.,
            ('token', 3): 1.}
  cells = [_cell(v, s, [], loss=loss) for (v, s), loss in losses.items()] + [_cell('task', 2, [])]
  dense, task, token = account.compare(cells, [{} for _ in cells])['variants']
  assert tuple(v['training_loss'] for v in (dense, task, token)) == (pytest.approx(17 / 3), 7, 1)
  # 1 in both seeds, without any spread.
  assert [task[f'training_loss_{k}'] for k in ('gain', 'low', 'high')] == [1, 1, 1]
  assert task['training_loss_p'] < .001
  assert dense['training_loss_gain'] is None and token['training_loss_gain'] is None  # one seed has no spread


def test_a_mean_over_seeds_and_examples_by_hand():
  # Two examples, of which the second counts three times. Means over seeds are 0 and 2, that of all is 6 / 4, and its
  # variance ((1 · 1.5)² + (3 · .5)²) / 4² · 2 / (2 - 1).
  mean = account.mean_of({0: np.array([0., 1]), 5: np.array([0., 3])}, np.array([1., 3]))
  assert (mean.by_seed, mean.value, mean.num_examples) == ({0: .75, 5: 2.25}, 1.5, 2)
  assert mean.variance == pytest.approx(4.5 / 16 * 2)
  scaled = mean.scaled(.5, 2.5)
  assert (scaled.by_seed, scaled.variance) == ({0: .125, 5: .875}, pytest.approx(mean.variance / 4))


@pytest.mark.parametrize('mean, half, freedom', [
    # Student's t of one degree of freedom: 12.706. Seeds 0 and 2 have variance 2, and their mean 1.
    (account.Mean({0: 0., 1: 2.}, 0., 1), 12.706, 1),
    # One seed: examples alone; 1.984 of 99 degrees of freedom.
    (account.Mean({0: 1.}, .25, 100), 1.984 * .5, 99),
    # Of seeds 0, 1, 2 the mean has variance 1/3, as by examples: (2/3)² / ((1/3)² / 2 + (1/3)² / 99) = 7.842; 2.314.
    (account.Mean({0: 0., 1: 1., 2: 2.}, 1 / 3, 100), 2.314 * (2 / 3)**.5, 7.842)])
def test_intervals_and_p_by_hand(mean, half, freedom):
  gain = account.interval(mean)
  assert [gain[k] for k in ('gain', 'low', 'high')] == pytest.approx([1, 1 - half, 1 + half], abs=1e-3)
  error = half / stats.t.ppf(.975, freedom)
  assert gain['p'] == pytest.approx(2 * stats.t.sf(1 / error, freedom), rel=1e-3)
  negative = account.Mean({s: -x for s, x in mean.by_seed.items()}, mean.variance, mean.num_examples)
  assert account.interval(negative)['p'] == gain['p']  # two-sided


@pytest.mark.parametrize('num_seeds', [2, 3, 5])
@pytest.mark.parametrize('level', [.05, .05 / 14])  # the second as Holm's correction of 14 evaluators needs it
def test_models_without_a_true_difference_have_as_many_false_alarms_as_the_level(num_seeds, level):
  rng = np.random.default_rng(0)
  seeds = [dict(enumerate(rng.normal(size=num_seeds))) for _ in range(1500)]

  def false_alarms(mean):
    return np.mean([account.interval(mean(x))['p'] < level for x in seeds])

  assert abs(false_alarms(lambda x: account.Mean(x, 0., 1)) - level) < 3 * (level / 1500)**.5
  # With the same error, but taken to be known as that of many examples is, there are many more.
  of_seeds = lambda x: account.Mean({0: np.mean([*x.values()])}, np.var([*x.values()], ddof=1) / len(x), 10**6)
  assert false_alarms(of_seeds) > level + 6 * (level / 1500)**.5


def test_differences_of_seeds_and_of_examples_together_give_no_more_false_alarms():
  rng, alarms, N = np.random.default_rng(0), 0, 50
  for _ in range(500):
    examples, seeds = rng.normal(size=N), rng.normal(size=3) / N**.5  # their means vary as much
    gain = account.interval(account.mean_of(dict(enumerate(examples + seeds[:, None])), np.ones(N)))
    alarms += gain['p'] < .05
  assert .025 < alarms / 500 < .08


def test_an_average_is_over_the_seeds_that_all_evaluators_have():
  means = account.Mean({0: 0., 1: 2., 2: 9.}, .5, 10), account.Mean({1: 4., 0: 0.}, 1.5, 8)
  assert account._average(means) == account.Mean({0: 0., 1: 3.}, 2 / 4, 8)
  assert account._average((means[0], account.Mean({3: 0.}, 0., 8))) is None


def test_holm_by_hand():
  # .01 · 3; .04 · 1; .03 · 2 = .06, and what is larger before holds.
  assert account.holm([.01, .04, .03]) == pytest.approx([.03, .06, .06])
  assert account.holm([.9, .6]) == [1, 1] and account.holm([]) == []


def test_corrected_outcomes_are_counted_beside_the_others():
  rows = [_row(f'e{i}') for i in range(20)]
  examples = {'dense': {}, 'task': {}}
  for i in range(20):  # one of 20 evaluators has p of about .01
    examples['dense'][f'e{i}', 'top-1'] = np.stack([np.zeros(50), np.ones(50)])
    gains = np.repeat([1, -1, 0], [9, 1, 40] if i == 0 else [5, 5, 40])
    examples['task'][f'e{i}', 'top-1'] = np.stack([gains, np.ones(50)])
  report = account.compare([_cell(v, 0, rows) for v in examples], list(examples.values()))
  task = report['variants'][1]
  assert (task['win'], task['tie'], task['loss']) == (1, 19, 0)
  assert (task['win_holm'], task['tie_holm']) == (0, 20)


def test_lower_perplexity_wins_and_is_compared_in_logarithms():
  # Two texts, with one and three masked words: log p of their words.
  row = _row('e', 'perplexity', chance=2000., unigram=400.)
  values = {('dense', 0): np.log([.02, .01]), ('task', 0): np.log([.04, .02])}
  report = _compare(values, row, weights=np.array([1., 3]))
  [pair], [task] = report['paired'], report['tasks']
  assert pair['gain'] == pytest.approx(np.log(2)) and pair['outcome'] == 'win'
  assert task['best'] == pytest.approx((np.log(.04) + 3 * np.log(.02)) / 4)
  assert (task['reference'], task['reference_score']) == ('unigram', pytest.approx(-np.log(400)))


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_a_run_without_the_main_metric_changes_it_for_no_other(order):
  """The last run has an infinite perplexity, which is left out of its evaluation."""
  accuracy, perplexity = _row('e', 'accuracy'), _row('e', 'perplexity')
  runs = [(_cell('dense', 0, [accuracy, perplexity]), .2), (_cell('task', 0, [accuracy, perplexity]), .4),
          (_cell('token', 0, [accuracy]), 0.)]
  with np.errstate(divide='ignore'):
    examples = [{('e', 'accuracy'): np.stack([[x], [1]]), ('e', 'perplexity'): np.stack([np.log([x]), [1]])}
                for _, x in runs]
  report = account.compare([runs[i][0] for i in order], [examples[i] for i in order])
  assert [(t['evaluator'], t['metric']) for t in report['tasks']] == [('e', 'perplexity')]
  assert [(p['variant'], p['gain']) for p in report['paired']] == [('task', pytest.approx(np.log(2)))]


def test_averages_are_normalized_by_reference_and_best():
  values = {('dense', 0): np.array([1., 0, 0, 0]), ('task', 0): np.array([1., 1, 0, 0])}
  [task] = _compare(values, _row('e', chance=.1, majority=.2, neighbor=.4))['tasks']
  # The neighbor is better than dense; the strongest below all variants is the majority.
  assert (task['reference'], task['reference_score'], task['best'], task['examples']) == ('majority', .2, .5, 4)
  dense, other = _compare(values, _row('e', chance=.1, majority=.2))['variants']
  assert dense['average'] == pytest.approx((.25 - .2) / (.5 - .2)) and other['average'] == 1
  assert other['gain'] == pytest.approx(1 - dense['average'])
  [task] = _compare(values, _row('e', chance=None, neighbor=.6))['tasks']
  assert (task['reference'], task['reference_score']) == ('0', 0)


def test_a_variant_that_lacks_an_evaluation_has_no_average():
  rows = [_row('a'), _row('b')]
  both = {(name, 'top-1'): np.ones((2, 3)) for name in 'ab'}
  cells = [_cell('dense', 0, rows), _cell('task', 0, rows[:1]), _cell('token', 0, [], None)]
  report = account.compare(cells, [both, {('a', 'top-1'): np.ones((2, 3))}, {}])
  assert [v['average'] for v in report['variants']] == [1, None, None]
  assert [(p['variant'], p['evaluator']) for p in report['paired']] == [('task', 'a')]
  assert (report['variants'][2]['seeds'], report['variants'][2]['seconds_per_step']) == (0, None)


def test_runs_on_other_examples_are_left_out():
  values, weights = np.ones(3), [np.ones(3), np.array([1., 2, 1])]
  cells = [_cell('dense', 0, [_row('e')]), _cell('task', 0, [_row('e')])]
  report = account.compare(cells, [{('e', 'top-1'): np.stack([values, w])} for w in weights])
  assert report['errors'] == ['task-0: e has other examples than in the first run.'] and not report['paired']


def test_costs_are_medians_over_runs():
  cells = [_cell('dense', s, [], seconds) for s, seconds in enumerate((1., 9., 2.))]
  [dense] = account.compare(cells, [{}] * 3)['variants']
  assert (dense['seconds_per_step'], dense['total'], dense['active']) == (2, 8, 2)
