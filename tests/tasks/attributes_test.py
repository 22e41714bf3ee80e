"""The eight bits of a token, each by hand."""

import itertools

from absl.testing import absltest, parameterized

from uni_moe_jax.tasks import attributes
from uni_moe_jax.tasks.attributes import Condition

_TASK_BITS = (1, 0, 0, 1)  # visual in, text out


class BitsTest(parameterized.TestCase):

  def test_a_token_has_the_bits_of_its_task_then_its_own(self):
    # task 1001; token: visual 1, text 0, target side 0, causal 0.
    row = attributes.bits(_TASK_BITS, modality='visual', side='input', causal=False)
    self.assertEqual(row, (1, 0, 0, 1, 1, 0, 0, 0))

  @parameterized.named_parameters(
      ('modality', dict(modality='text'), {4: 0, 5: 1}),
      ('side', dict(side='target'), {6: 1}),
      ('mask', dict(causal=True), {7: 1}))
  def test_a_property_of_the_token_moves_its_own_bits_only(self, change, moved):
    token = dict(modality='visual', side='input', causal=False)
    before = attributes.bits(_TASK_BITS, **token)
    after = attributes.bits(_TASK_BITS, **{**token, **change})
    self.assertEqual({i: b for i, b in enumerate(after) if b != before[i]}, moved)

  def test_every_row_has_eight_bits(self):
    row = attributes.bits(_TASK_BITS, modality='text', side='target', causal=True)
    self.assertLen(row, attributes.NUM_ATTRIBUTES)

  @parameterized.parameters(
      (('visual',), ('text',), (1, 0, 0, 1)),
      (('text',), ('text',), (0, 1, 0, 1)),
      (('visual', 'text'), ('text',), (1, 1, 0, 1)),
      (('text',), ('visual',), (0, 1, 1, 0)),
      (('text', 'text'), ('visual', 'text'), (0, 1, 1, 1)))
  def test_task_bits_say_which_modalities_go_in_and_come_out(self, inputs, targets, expected):
    self.assertEqual(attributes.task_bits(inputs, targets), expected)

  def test_the_order_of_segments_does_not_matter(self):
    for inputs in itertools.permutations(('visual', 'text', 'text')):
      self.assertEqual(attributes.task_bits(inputs, ('text',)), (1, 1, 0, 1))


class UnionTest(absltest.TestCase):

  def test_union_is_the_or_of_every_column(self):
    rows = (0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 0, 0)
    for order in itertools.permutations(rows):
      self.assertEqual(attributes.union(*order), (1, 1, 0, 1))

  def test_rows_of_unequal_length_have_no_union(self):
    with self.assertRaises(ValueError):
      attributes.union((0, 1), (0, 1, 1))


class ConditionTest(absltest.TestCase):

  def test_a_condition_reads_as_its_bits_task_and_modality(self):
    condition = Condition((1, 0, 0, 1, 1, 0, 0, 0), 'caption', 'visual')
    self.assertEqual(str(condition), '10011000 (caption, visual)')


if __name__ == '__main__':
  absltest.main()
