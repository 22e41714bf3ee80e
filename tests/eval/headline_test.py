"""The headline: which metric stands for an evaluator, which baseline is the strongest, and the sentence below."""

import pytest

from uni_moe_jax.eval import headline
from uni_moe_jax.eval.metrics import Score

CLASSES = Score.proportion('top-1', .5, 2500, .02, {'majority': .14, 'pixels': .63})  # ± .01: 13 errors below
TOP5 = Score.proportion('top-5', .64, 2500, .1, {'majority': .63})  # ± .0096: level
WORDS = Score('accuracy', .1, 18000, .01, {'unigram': .06}, .002)
PERPLEXITY = Score('perplexity', 63.2, 18000, 2000., {'unigram': 70., 'bigram': 65.})
EXACT, F1 = (Score(name, .3, 100, baselines={'neighbor': .3}) for name in ('exact_match', 'word F1'))
CHANCE = Score.proportion('top-1', .5, 100, .1)
ALONE = Score('BLEU-4', .2, 100)


def _rows(**scores):
  return [score.row(name.replace('_', ' '), 7) for name, several in scores.items() for score in several]


def test_the_table_has_one_line_per_evaluator():
  rows = _rows(glyph_class=(CLASSES, TOP5), words=(WORDS, PERPLEXITY), captions=(EXACT, F1), digits=(CHANCE,),
               texts=(ALONE,))
  assert headline.table(rows).splitlines() == [
      'evaluator    metric                        model  strongest baseline',
      '-----------  ----------------------------  -----  ------------------  --------',
      'glyph class  top-1                         0.500  0.630 pixels        ▼ worse',
      'words        perplexity (lower is better)   63.2  65.0 bigram         ▲ better',
      'captions     word F1                       0.300  0.300 neighbor      = level',
      'digits       top-1                         0.500  0.100 chance        ▲ better',
      'texts        BLEU-4                        0.200  —',
      'Of 7 metrics, 3 are better than their strongest baseline, 3 level with it (less than 3 standard errors away) '
      'and 1 worse.']


@pytest.mark.parametrize('score, expected', [
    (CLASSES, ('pixels', .63)), (PERPLEXITY, ('bigram', 65.)), (CHANCE, ('chance', .1)), (ALONE, None)])
def test_the_strongest_baseline(score, expected):
  assert headline.strongest_baseline(score.row('e', 1)) == expected


def test_the_verdict_is_that_of_a_baseline_on_as_many_examples():
  lines = [headline.Line(Score('a', .5, 100, None, {'few': .2}, .05, baseline_counts=counts).row('e', 1), ('few', .2))
           for counts in ({}, {'few': 25})]
  assert [line.verdict for line in lines] == ['better', 'level']


def test_more_than_twelve_evaluators_are_counted():
  rows = _rows(**{f'e{i}': (CHANCE,) for i in range(15)})
  table = headline.table(rows).splitlines()
  assert [line.split()[0] for line in table[2:14]] == [f'e{i}' for i in range(12)]
  assert table[14] == '… and 3 more in evaluation.json'
  assert headline.table(rows[:12]).splitlines()[14].startswith('Of 12 metrics')


def test_of_many_splits_of_a_task_the_later_ones_are_left_out():
  names = ['a, x', 'a, y', 'b', *(f'c, {i}' for i in range(10)), 'd']
  shown = [line.split('  ')[0] for line in headline.table(_rows(**{name: (CHANCE,) for name in names})).splitlines()]
  assert shown[2:14] == ['a, x', 'a, y', 'b', *(f'c, {i}' for i in range(8)), 'd']
  assert shown[14] == '… and 2 more in evaluation.json'


def test_nothing_to_compare_has_no_sentence():
  assert headline.table([]) == 'no evaluation rows'
  assert headline.table(_rows(texts=(ALONE,))).splitlines()[-1].startswith('texts')
