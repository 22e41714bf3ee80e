"""Which layers have experts, where layers are in the parameter tree, and how a config becomes a spec."""

import collections

import jax.numpy as jnp
import pytest

from tests.helpers import small_model
from uni_moe_jax import config
from uni_moe_jax.config import schema
from uni_moe_jax.model.spec import ModelSpec, Stack
from uni_moe_jax.tasks import attributes, task_types
from uni_moe_jax.utils.errors import UsageError

_BOTH = ('attention', 'mlp')


def _chosen(spec: ModelSpec) -> list[int]:
  return [i for i, parts in enumerate(spec.pattern) if parts]


@pytest.mark.parametrize('placement, layers, expected', [
    ('all', 5, [0, 1, 2, 3, 4]), ('every_2', 5, [0, 2, 4]),  # published name: the first layer is number one
    ('every_2', 4, [0, 2]), ('every_4', 9, [0, 4, 8]), ('none', 5, []), ((1, 4), 5, [1, 4]), ((), 5, [])])
def test_placement_chooses_layers(placement, layers, expected):
  assert _chosen(small_model.spec(num_layers=layers, placement=placement)) == expected


@pytest.mark.parametrize('changes, message', [
    (dict(posemb='sincos'), r"model\.posemb='sincos' is unknown; did you mean 'sincos2d'"),
    (dict(sublayers=('mlp', 'atention')), r"moe\.sublayers='atention' is unknown"),
    (dict(dtype='float16'), r"model\.dtype='float16' is unknown"),
    (dict(variant='B16'), r"model\.variant='B16' is unknown"),
    (dict(variant='B/16'), r"model\.variant='B/16' sets config\.model\.num_layers=3 to another value; leave it out"),
    (dict(placement=(0, 3)), r'moe\.placement=\(0, 3\) has an index outside 0…2')])
def test_a_value_that_nothing_would_read_is_an_error_as_of_configs(changes, message):
  with pytest.raises(UsageError, match=message):
    small_model.spec(**changes)


def test_a_variant_sets_the_sizes():
  large = ModelSpec(variant='L/16', vocab_size=9, spe_id=0)
  assert (large.num_layers, large.width, large.num_heads, large.mlp_dim) == (24, 1024, 16, 4096)


def test_only_the_named_sublayers_have_experts_and_none_of_a_dense_model():
  spec = small_model.spec(num_layers=3, placement='every_2', sublayers=('mlp',))
  assert spec.pattern == (('mlp',), (), ('mlp',))
  assert _chosen(small_model.spec('dense', placement='all')) == []


@pytest.mark.parametrize('placement, layers, period, periods, tail', [
    ('all', 1, 1, 0, 1), ('all', 5, 1, 4, 1), ('none', 5, 1, 4, 1), ('every_2', 5, 2, 1, 3), ('every_2', 6, 2, 2, 2),
    ('every_2', 2, 2, 0, 2), ('every_4', 9, 4, 1, 5), ('every_4', 8, 4, 1, 4),
    # an irregular placement is unrolled
    ((0, 1, 4), 6, 0, 0, 6), ((1, 2), 6, 0, 0, 6), ((0, 1, 2, 3, 4), 9, 0, 0, 9)])
def test_all_periods_but_the_last_are_scanned(placement, layers, period, periods, tail):
  stack = small_model.spec(num_layers=layers, placement=placement).stack
  assert (len(stack.period), stack.periods, len(stack.tail)) == (period, periods, tail)


def test_indices_that_are_regular_are_scanned():
  by_index, by_name = (small_model.spec(num_layers=6, placement=p).stack for p in ((0, 2, 4), 'every_2'))
  assert by_index == by_name


def test_locate_by_hand():
  # 'every_2' with five layers: one scanned period (0, 1), then 2, 3, 4 in the tail.
  stack = small_model.spec(num_layers=5, placement='every_2').stack
  assert [stack.locate(i) for i in range(5)] == [
      ('blocks', 0, 'block0'), ('blocks', 0, 'block1'), *(('tail', None, f'block{j}') for j in range(3))]


@pytest.mark.parametrize('placement, layers', [
    ('all', 5), ('every_2', 5), ('every_2', 6), ('every_4', 9), ('none', 3), ((0, 1, 4), 6), ((1, 2), 4)])
def test_locate_finds_every_block_of_the_tree_once(placement, layers):
  spec = small_model.spec(num_layers=layers, placement=placement)
  encoder = small_model.nn.unbox(small_model.boxed(spec))['encoder']
  actual = []
  for layer in range(layers):
    subtree, index, block = spec.stack.locate(layer)
    # The block of a layer has a router if, and only if, the layer has experts.
    assert ('attention_router' in encoder[subtree][block]) == bool(spec.pattern[layer]), layer
    depth = encoder[subtree][block]['norm1']['scale'].shape[0] if subtree == 'blocks' else None
    assert index is None if depth is None else index < depth, layer
    actual.append((subtree, index, block))
  expected = [(s, i, b) for s, blocks in encoder.items() for b, block in blocks.items()
              for i in (range(block['norm1']['scale'].shape[0]) if s == 'blocks' else (None,))]
  assert collections.Counter(actual) == collections.Counter(expected)


@pytest.mark.parametrize('layer', [-1, 5])
def test_an_unknown_layer_is_an_error(layer):
  with pytest.raises(IndexError, match=rf'layer {layer} is outside 0…4'):
    Stack.of(((),) * 5).locate(layer)


def test_the_stack_has_as_many_layers_as_the_pattern():
  for layers in range(1, 12):
    for placement in ('all', 'every_2', 'every_4'):
      assert small_model.spec(num_layers=layers, placement=placement).stack.num_layers == layers


def test_sizes_by_hand():
  spec = small_model.spec(width=24, num_heads=3, image_size=32, patch_size=8)
  assert (spec.head_dim, spec.patches) == (8, 16)


_CONDITIONS = (*task_types.TASK_TYPES['image_caption'].conditions, task_types.families()['words'])


def test_names_of_router_inputs_are_bits_or_names():
  bits = '11011000', '11010101', '11010110'
  names = {r: small_model.spec(r).router_input_names(_CONDITIONS) for r in small_model.ROUTERS}
  # Token routers read no condition: their names are those of separate segments.
  assert names == {'attribute': bits, 'token': bits, 'context': bits, 'task': ('caption', 'words'),
                   'modality': ('visual', 'text'), 'dense': ('all tokens',)}
  assert bits[0] == attributes.to_string(_CONDITIONS[0].bits)


def _spec(c) -> ModelSpec:
  return ModelSpec.from_config(
      schema.parse_config(c), vocab_size=50, spe_id=3, temperatures=('a', 'b'),
      router_tasks=task_types.router_tasks())


def test_sizes_and_choices_come_from_the_config_and_those_of_data_and_plan_are_arguments():
  model = dict(num_layers=5, width=64, num_heads=4, mlp_dim=96, layer_scale_init=.25, drop_path=.1, dtype='bfloat16')
  moe = dict(num_experts=6, top_k=3, placement='every_2', sublayers=('mlp',), capacity_factor=1.5, gmm='ragged')
  c = config.base()
  c.model.update(model)
  c.moe.update(moe)
  spec = _spec(c)
  expected = {**model, **moe, 'dtype': jnp.bfloat16, 'vocab_size': 50, 'spe_id': 3, 'temperature_groups': ('a', 'b')}
  assert {name: getattr(spec, name) for name in expected} == expected
  assert _chosen(spec) == [0, 2, 4]


def test_a_router_by_name_gets_its_table():
  names = {}
  for router in small_model.ROUTERS:
    c = config.base()
    c.moe.router = router
    names[router] = _spec(c).router_names
  assert names == {'attribute': (), 'dense': (), 'token': (), 'context': (), 'modality': ('visual', 'text'),
                   'task': task_types.router_tasks()}


def test_a_spec_can_be_a_static_argument():
  c = config.base()
  c.moe.placement = (0, 3)
  assert hash(_spec(c)) == hash(_spec(c))
