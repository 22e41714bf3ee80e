"""Budgets and how rows are written."""

import json

from absl.testing import absltest, parameterized

from uni_moe_jax.tools.bench import results_table
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.timing import Estimate

_ROWS = (
    Row('routers', 'task / dense', Estimate(1.0723, 1.04, 1.12), 'x', Budget(1.1, 1.03), 'B 16'),
    Row('routers', 'dense step', Estimate(0.51, 0.5, 0.6), 's', note='B 16'),
    Row('compile', '12 layers', Estimate(71.26), 's', Budget(60, 30), 'cold'))


class BudgetTest(parameterized.TestCase):

  @parameterized.parameters((1.2, 'missed'), (1.1, 'met'), (1.05, 'met'), (1.03, 'met, stretch'))
  def test_at_most(self, value, verdict):
    self.assertEqual(Budget(1.1, 1.03).verdict(value), verdict)

  @parameterized.parameters((9.9, 'missed'), (10, 'met'), (20, 'met, stretch'))
  def test_at_least(self, value, verdict):
    self.assertEqual(Budget(10, 20, at_most=False).verdict(value), verdict)

  def test_without_a_stretch_it_is_met_or_missed(self):
    self.assertEqual((Budget(1.3).verdict(1.0), Budget(1.3).verdict(1.4)), ('met', 'missed'))
    self.assertEqual(str(Budget(1.3)), '<= 1.3')


class RenderTest(parameterized.TestCase):

  def test_figures_units_spreads_budgets_and_verdicts_stand_in_one_line_each(self):
    lines = results_table.render(_ROWS, {'device': 'cpu'}, reduced=False).splitlines()
    self.assertEqual(lines[0], 'device: cpu')
    self.assertIn('quartiles', lines[1])
    fields = [[f.strip() for f in line.split('  ') if f.strip()] for line in lines[3:]]
    self.assertEqual(fields[0], ['subject', 'what', 'figure', 'unit', 'spread', 'budget (stretch)', 'verdict', 'note'])
    self.assertEqual(fields[2], ['routers', 'task / dense', '1.07', 'x', '1.04 to 1.12', '<= 1.1 (1.03)', 'met', '[1]'])
    self.assertEqual(fields[3], ['routers', 'dense step', '0.510', 's', '0.500 to 0.600', '[1]'])
    self.assertEqual(fields[4], ['compile', '12 layers', '71.3', 's', 'once', '<= 60 (30)', 'missed', '[2]'])
    self.assertEqual(lines[-2:], ['[1] B 16', '[2] cold'])

  def test_columns_are_aligned(self):
    head, _, *rows = results_table.render(_ROWS, {}, reduced=False).splitlines()[2:-2]
    at = head.index('unit')
    self.assertEqual([r[at - 1:at + 2].strip() for r in rows], ['x', 's', 's'])

  def test_reduced_sizes_are_said_and_judge_no_budget(self):
    text = results_table.render(_ROWS, {}, reduced=True)
    self.assertIn('reduced (--quick)', text)
    self.assertEqual(text.count(results_table.NOT_JUDGED), 2)
    self.assertNotIn('missed', text)
    self.assertNotIn('reduced', results_table.render(_ROWS, {}, reduced=False))

  @parameterized.parameters(
      (0, '0'), (0.0012345, '0.00123'), (0.5, '0.500'), (1.0, '1.00'), (9.876, '9.88'), (12.34, '12.3'), (123.4, '123'),
      (98765.4, '98765'), (-0.25, '-0.250'))
  def test_numbers_have_three_significant_digits(self, value, text):
    self.assertEqual(results_table.number(value), text)

  def test_json_keeps_whole_figures(self):
    found = json.loads(json.dumps(results_table.as_json(_ROWS, {'device': 'cpu'}, reduced=False)))
    self.assertEqual(found['header'], {'device': 'cpu'})
    self.assertEqual(found['rows'][0], {
        'subject': 'routers', 'what': 'task / dense', 'value': 1.0723, 'low': 1.04, 'high': 1.12, 'unit': 'x',
        'budget': {'bound': 1.1, 'stretch': 1.03, 'at_most': True}, 'verdict': 'met', 'note': 'B 16'})
    self.assertIsNone(found['rows'][2]['low'])
    self.assertIn('quartiles', found['spread'])


if __name__ == '__main__':
  absltest.main()
