"""The eight bits of a token, each by hand."""

import itertools

import pytest

from uni_moe_jax.tasks import attributes
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.errors import UsageError

_TASK_BITS = (1, 0, 0, 1)  # visual in, text out


def test_a_token_has_the_bits_of_its_task_and_its_own():
  # task 1001; token: visual 1, text 0, target side 0, causal 0.
  assert attributes.bits(_TASK_BITS, modality='visual', side='input', causal=False) == (1, 0, 0, 1, 1, 0, 0, 0)
  assert attributes.NUM_ATTRIBUTES == 8


@pytest.mark.parametrize('change, changed_bits', [
    (dict(modality='text'), {4: 0, 5: 1}), (dict(side='target'), {6: 1}), (dict(causal=True), {7: 1})])
def test_a_property_of_the_token_changes_only_its_own_bits(change, changed_bits):
  token = dict(modality='visual', side='input', causal=False)
  before, after = attributes.bits(_TASK_BITS, **token), attributes.bits(_TASK_BITS, **{**token, **change})
  assert {i: b for i, b in enumerate(after) if b != before[i]} == changed_bits
  assert len(after) == attributes.NUM_ATTRIBUTES


@pytest.mark.parametrize('inputs, targets, expected', [
    (('visual',), ('text',), (1, 0, 0, 1)),
    (('text',), ('text',), (0, 1, 0, 1)),
    (('visual', 'text'), ('text',), (1, 1, 0, 1)),
    (('text',), ('visual',), (0, 1, 1, 0)),
    (('text', 'text'), ('visual', 'text'), (0, 1, 1, 1))])
def test_task_bits_are_the_modalities_of_input_and_target(inputs, targets, expected):
  assert attributes.task_bits(inputs, targets) == expected


@pytest.mark.parametrize('rows', list(itertools.permutations([(0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 0, 0)])))
def test_union_is_the_or_of_every_column(rows):
  assert attributes.union(*rows) == (1, 1, 0, 1)


def test_a_condition_is_printed_as_its_bits_task_and_modality():
  assert str(Condition((1, 0, 0, 1, 1, 0, 0, 0), 'caption', 'visual')) == '10011000 (caption, visual)'


@pytest.mark.parametrize('bits, message', [
    ((1, 0, 0, 1, 1, 0, 0), r'8 zeros and ones, got \(1, 0, 0, 1, 1, 0, 0\) of 7'), ((1,) * 9, '1\\) of 9'),
    ((2,) * 8, r'got \(2, '), ([1] * 8, r'got \[1, ')])
def test_a_condition_has_eight_bits(bits, message):
  with pytest.raises(UsageError, match=f'attribute bits of a condition must be a tuple of .*{message}'):
    Condition(bits, 'caption', 'visual')
