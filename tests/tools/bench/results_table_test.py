"""Budgets, and the formats of rows."""

import json

import pytest

from uni_moe_jax.tools.bench import results_table
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.timing import Estimate

_ROWS = (
    Row('routers', 'task / dense', Estimate(1.0723, 1.04, 1.12), 'x', Budget(1.1, 1.03), 'B 16'),
    Row('routers', 'dense step', Estimate(0.51, 0.5, 0.6), 's', note='B 16'),
    Row('compile', '12 layers', Estimate(71.26), 's', Budget(60, 30), 'cold'))


@pytest.mark.parametrize('budget, value, verdict', [
    (Budget(1.1, 1.03), 1.2, 'missed'), (Budget(1.1, 1.03), 1.1, 'met'), (Budget(1.1, 1.03), 1.05, 'met'),
    (Budget(1.1, 1.03), 1.03, 'met, stretch'), (Budget(10, 20, at_most=False), 9.9, 'missed'),
    (Budget(10, 20, at_most=False), 10, 'met'), (Budget(10, 20, at_most=False), 20, 'met, stretch'),
    (Budget(1.3), 1.0, 'met'), (Budget(1.3), 1.4, 'missed')])
def test_verdicts_of_upper_and_lower_bounds_with_and_without_a_stretch(budget, value, verdict):
  assert budget.verdict(value) == verdict


def test_a_row_has_figure_unit_spread_budget_and_verdict():
  assert str(Budget(1.3)) == '<= 1.3'  # without a stretch
  lines = results_table.render(_ROWS, {'device': 'cpu'}, reduced=False).splitlines()
  assert lines[0] == 'device: cpu'
  assert 'quartiles' in lines[1]
  fields = [[f.strip() for f in line.split('  ') if f.strip()] for line in lines[3:]]
  assert fields[0] == ['suite', 'measurement', 'figure', 'unit', 'spread', 'budget (stretch)', 'verdict', 'note']
  assert fields[2] == ['routers', 'task / dense', '1.07', 'x', '1.04 to 1.12', '<= 1.1 (1.03)', 'met', '[1]']
  assert fields[3] == ['routers', 'dense step', '0.510', 's', '0.500 to 0.600', '[1]']
  assert fields[4] == ['compile', '12 layers', '71.3', 's', 'once', '<= 60 (30)', 'missed', '[2]']
  assert lines[-2:] == ['[1] B 16', '[2] cold']
  column = lines[3].index('unit')
  assert [row[column - 1:column + 2].strip() for row in lines[5:-2]] == ['x', 's', 's']  # columns are aligned


def test_reduced_sizes_are_reported_and_judge_no_budget():
  text = results_table.render(_ROWS, {}, reduced=True)
  assert 'reduced (--quick)' in text
  assert text.count(results_table.NOT_JUDGED) == 2
  assert 'missed' not in text
  assert 'reduced' not in results_table.render(_ROWS, {}, reduced=False)


@pytest.mark.parametrize('judged, verdict, spread', [
    (True, 'met', '1.04 to 1.12, 2 rounds discarded'), (False, 'not judged', '1.04 to 1.12, 2 rounds disturbed')])
def test_rounds_that_other_processes_disturbed_are_counted_and_too_many_judge_no_budget(judged, verdict, spread):
  row = Row('routers', 'task / dense', Estimate(1.07, 1.04, 1.12, 2, judged), 'x', Budget(1.1))
  fields = [f.strip() for f in results_table.render([row], {}, reduced=False).splitlines()[-1].split('  ') if f.strip()]
  assert fields == ['routers', 'task / dense', '1.07', 'x', spread, '<= 1.1', verdict]


@pytest.mark.parametrize('value, text', [
    (0, '0'), (0.0012345, '0.00123'), (0.5, '0.500'), (1.0, '1.00'), (9.876, '9.88'), (12.34, '12.3'), (123.4, '123'),
    (98765.4, '98765'), (-0.25, '-0.250')])
def test_numbers_have_three_significant_digits(value, text):
  assert results_table.number(value) == text


def test_json_has_unrounded_figures():
  results = json.loads(json.dumps(results_table.as_json(_ROWS, {'device': 'cpu'}, reduced=False)))
  assert results['header'] == {'device': 'cpu'}
  assert results['rows'][0] == {
      'suite': 'routers', 'name': 'task / dense', 'value': 1.0723, 'low': 1.04, 'high': 1.12, 'discarded': 0,
      'judged': True, 'unit': 'x',
      'budget': {'bound': 1.1, 'stretch': 1.03, 'at_most': True}, 'verdict': 'met', 'note': 'B 16'}
  assert results['rows'][2]['low'] is None
  assert 'quartiles' in results['spread']


def test_a_row_without_a_figure_has_its_reason_as_verdict_and_the_message_as_note():
  row = Row('gpu', 'tokamax', None, '', Budget(1.), note='No module named tokamax', missing='not installed')
  lines = results_table.render([row], {}, reduced=True).splitlines()
  fields = [f.strip() for f in lines[-2].split('  ') if f.strip()]
  assert fields == ['gpu', 'tokamax', '–', '<= 1', 'not installed', '[1]']
  assert lines[-1] == '[1] No module named tokamax'
  [stored] = json.loads(json.dumps(results_table.as_json([row], {}, reduced=True)))['rows']
  assert (stored['value'], stored['low'], stored['verdict'], stored['note']) == (
      None, None, 'not installed', 'No module named tokamax')
