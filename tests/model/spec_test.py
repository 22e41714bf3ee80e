"""Which layers have experts, where layers are in the parameter tree, and how a config becomes a spec."""

import jax.numpy as jnp
from absl.testing import absltest, parameterized

from tests.helpers import small_model
from uni_moe_jax import config
from uni_moe_jax.config import schema
from uni_moe_jax.model.spec import ModelSpec, Stack
from uni_moe_jax.tasks import attributes, task_types

_BOTH = ('attention', 'mlp')


def _chosen(spec: ModelSpec) -> list[int]:
  return [i for i, parts in enumerate(spec.pattern) if parts]


class PatternTest(parameterized.TestCase):

  @parameterized.parameters(
      ('all', 5, [0, 1, 2, 3, 4]),
      ('every_2', 5, [0, 2, 4]),  # published name: the first layer is number one
      ('every_2', 4, [0, 2]),
      ('every_4', 9, [0, 4, 8]),
      ('none', 5, []),
      ((1, 4), 5, [1, 4]),
      ((), 5, []))
  def test_placement_chooses_layers(self, placement, layers, expected):
    self.assertEqual(_chosen(small_model.spec(num_layers=layers, placement=placement)), expected)

  def test_a_dense_model_has_experts_nowhere(self):
    self.assertEqual(_chosen(small_model.spec('dense', placement='all')), [])

  def test_only_the_named_sublayers_have_experts(self):
    spec = small_model.spec(num_layers=3, placement='every_2', sublayers=('mlp',))
    self.assertEqual(spec.pattern, (('mlp',), (), ('mlp',)))


class StackTest(parameterized.TestCase):

  @parameterized.parameters(
      # placement, layers, blocks a period, scanned periods, tail blocks
      ('all', 1, 1, 0, 1),
      ('all', 5, 1, 4, 1),
      ('none', 5, 1, 4, 1),
      ('every_2', 5, 2, 1, 3),
      ('every_2', 6, 2, 2, 2),
      ('every_2', 2, 2, 0, 2),
      ('every_4', 9, 4, 1, 5),
      ('every_4', 8, 4, 1, 4))
  def test_all_periods_but_the_last_are_scanned(self, placement, layers, period, periods, tail):
    stack = small_model.spec(num_layers=layers, placement=placement).stack
    self.assertEqual((len(stack.period), stack.periods, len(stack.tail)), (period, periods, tail))

  @parameterized.parameters(((0, 1, 4), 6), ((1, 2), 6), ((0, 1, 2, 3, 4), 9))
  def test_an_irregular_placement_is_unrolled(self, placement, layers):
    stack = small_model.spec(num_layers=layers, placement=placement).stack
    self.assertEqual((stack.period, stack.periods, len(stack.tail)), ((), 0, layers))

  def test_indices_that_are_regular_are_scanned(self):
    self.assertEqual(small_model.spec(num_layers=6, placement=(0, 2, 4)).stack,
                     small_model.spec(num_layers=6, placement='every_2').stack)

  def test_locate_by_hand(self):
    # 'every_2' with five layers: one scanned period (0, 1), then 2, 3, 4 in the tail.
    stack = small_model.spec(num_layers=5, placement='every_2').stack
    self.assertEqual([stack.locate(i) for i in range(5)], [
        ('blocks', 0, 'block0'), ('blocks', 0, 'block1'), ('tail', None, 'block0'), ('tail', None, 'block1'),
        ('tail', None, 'block2')])

  @parameterized.parameters(
      ('all', 5), ('every_2', 5), ('every_2', 6), ('every_4', 9), ('none', 3), ((0, 1, 4), 6), ((1, 2), 4))
  def test_locate_finds_every_block_of_the_tree_once(self, placement, layers):
    spec = small_model.spec(num_layers=layers, placement=placement)
    encoder = small_model.nn.unbox(small_model.boxed(spec))['encoder']
    actual = []
    for layer in range(layers):
      subtree, index, block = spec.stack.locate(layer)
      # The block of a layer has a router if, and only if, the layer has experts.
      self.assertEqual('attention_router' in encoder[subtree][block], bool(spec.pattern[layer]), layer)
      depth = encoder[subtree][block]['norm1']['scale'].shape[0] if subtree == 'blocks' else None
      self.assertTrue(index is None if depth is None else index < depth, layer)
      actual.append((subtree, index, block))
    expected = [(s, i, b) for s, blocks in encoder.items() for b, block in blocks.items()
                for i in (range(block['norm1']['scale'].shape[0]) if s == 'blocks' else (None,))]
    self.assertCountEqual(actual, expected)

  @parameterized.parameters(-1, 5)
  def test_an_unknown_layer_is_an_error(self, layer):
    with self.assertRaisesRegex(IndexError, rf'layer {layer} is outside 0…4'):
      Stack.of(((),) * 5).locate(layer)

  def test_the_stack_has_as_many_layers_as_the_pattern(self):
    for layers in range(1, 12):
      for placement in ('all', 'every_2', 'every_4'):
        self.assertEqual(small_model.spec(num_layers=layers, placement=placement).stack.num_layers, layers)


class SizesTest(absltest.TestCase):

  def test_by_hand(self):
    spec = small_model.spec(width=24, num_heads=3, image_size=32, patch_size=8)
    self.assertEqual((spec.head_dim, spec.patches), (8, 16))


class RouterInputNamesTest(absltest.TestCase):

  _CONDITIONS = (*task_types.TASK_TYPES['image_caption'].conditions, task_types.families()['words'])

  def test_names_are_bits_or_names(self):
    names = {r: small_model.spec(r).router_input_names(self._CONDITIONS) for r in small_model.ROUTERS}
    self.assertEqual(names, {
        'attribute': ('11011000', '11010101', '11010110'), 'task': ('caption', 'words'),
        'modality': ('visual', 'text'), 'dense': ('all tokens',),
        # Token routers read no condition: their names are those of separate segments.
        'token': ('11011000', '11010101', '11010110'), 'context': ('11011000', '11010101', '11010110')})

  def test_bits_are_those_of_the_condition(self):
    bits = attributes.to_string(self._CONDITIONS[0].bits)
    self.assertEqual(small_model.spec().router_input_names(self._CONDITIONS[:1]), (bits,))


class FromConfigTest(absltest.TestCase):

  def _spec(self, c) -> ModelSpec:
    return ModelSpec.from_config(
        schema.parse_config(c), vocab_size=50, spe_id=3, temperatures=('a', 'b'),
        router_tasks=task_types.router_tasks())

  def test_sizes_and_choices_come_from_the_config(self):
    c = config.base()
    c.model.update(dict(num_layers=5, width=64, num_heads=4, mlp_dim=96, layer_scale_init=.25, drop_path=.1,
                        dtype='bfloat16'))
    c.moe.update(dict(num_experts=6, top_k=3, placement='every_2', sublayers=('mlp',), capacity_factor=1.5,
                      gmm='ragged'))
    spec = self._spec(c)
    self.assertEqual((spec.num_layers, spec.width, spec.num_heads, spec.mlp_dim), (5, 64, 4, 96))
    self.assertEqual((spec.layer_scale_init, spec.drop_path, spec.dtype), (.25, .1, jnp.bfloat16))
    self.assertEqual((spec.num_experts, spec.top_k, spec.sublayers), (6, 3, ('mlp',)))
    self.assertEqual((spec.capacity_factor, spec.gmm), (1.5, 'ragged'))
    self.assertEqual(_chosen(spec), [0, 2, 4])

  def test_sizes_of_data_and_plan_are_arguments(self):
    spec = self._spec(config.base())
    self.assertEqual((spec.vocab_size, spec.spe_id, spec.temperature_groups), (50, 3, ('a', 'b')))

  def test_a_router_by_name_gets_its_table(self):
    names = {}
    for router in small_model.ROUTERS:
      c = config.base()
      c.moe.router = router
      names[router] = self._spec(c).router_names
    self.assertEqual(names, {
        'attribute': (), 'dense': (), 'token': (), 'context': (), 'modality': ('visual', 'text'),
        'task': task_types.router_tasks()})

  def test_a_spec_can_be_a_static_argument(self):
    c = config.base()
    c.moe.placement = (0, 3)
    self.assertEqual(hash(self._spec(c)), hash(self._spec(c)))


if __name__ == '__main__':
  absltest.main()
