"""Selection of parameters by pattern and layers, as subsets."""

import jax
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.analysis import param_subsets


def _tree(**changes):
  spec = small_model.spec(**changes)
  return spec.stack, small_model.params(spec)


def test_by_default_every_fourth_layer_is_selected_and_all_layers_of_a_small_model():
  assert [param_subsets.default_layers(n) for n in (3, 8, 12)] == [(0, 1, 2), (3, 7), (3, 7, 11)]


def test_layers_of_the_stack_and_of_the_tail_are_separate_subsets():
  stack, params = _tree()  # layers 0 and 1 are stacked, 2 is the tail
  slices = param_subsets.select(params, stack, r'ffn_out/kernel$')
  assert [(p.subset, p.layer, p.projection) for p in slices] == [(f'layer {i} ffn_out', i, 'ffn_out') for i in range(3)]
  subsets = param_subsets.extract(slices, params)
  stacked = params['encoder']['blocks']['block0']['ffn_out']['kernel']
  for layer, expected in enumerate((stacked[0], stacked[1], params['encoder']['tail']['block0']['ffn_out']['kernel'])):
    [array] = subsets[f'layer {layer} ffn_out'].values()
    np.testing.assert_array_equal(array, expected)
  assert not np.array_equal(stacked[0], stacked[1])


def test_periods_of_two_blocks_keep_the_order_of_the_layers():
  stack, params = _tree(num_layers=6, placement='every_2')
  assert len(stack.period) == 2
  subsets = param_subsets.extract(param_subsets.select(params, stack, r'ffn_out/kernel$', [1, 2]), params)
  blocks = params['encoder']['blocks']
  np.testing.assert_array_equal(*subsets['layer 1 ffn_out'].values(), blocks['block1']['ffn_out']['kernel'][0])
  np.testing.assert_array_equal(*subsets['layer 2 ffn_out'].values(), blocks['block0']['ffn_out']['kernel'][1])


def test_a_projection_is_one_subset_and_other_parameters_are_subsets_of_their_own():
  stack, params = _tree()
  subsets = param_subsets.extract(param_subsets.select(params, stack, r'/qkv/|embed/word$', [1]), params)
  assert {subset: len(arrays) for subset, arrays in subsets.items()} == {'layer 1 qkv': 2, 'embed/word': 1}
  assert sum(x.size for x in jax.tree.leaves(subsets['embed/word'])) == small_model.VOCABULARY * 16


@pytest.mark.parametrize('pattern, layers, message', [
    ('ffn_uot', None,
     r"parameters='ffn_uot' matches nothing in the layers 0, 1, 2 .*choices: .*encoder/tail/block0/ffn_out/kernel"),
    ('ffn_out', [1, 3], r'layers 3: the model has the layers 0…2'),
    ('ffn_out(', None, r"parameters='ffn_out\(' is not a regular expression")])
def test_a_wrong_selection_is_an_error(pattern, layers, message):
  stack, params = _tree()
  with pytest.raises(ValueError, match=message):
    param_subsets.select(params, stack, pattern, layers)
