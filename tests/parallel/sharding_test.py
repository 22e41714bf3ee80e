"""Meshes, and where every parameter of every router's model lies on them."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from tests.helpers import small_model
from uni_moe_jax.model.initialization import boxed_params
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.parallel import sharding

_ONE = dict(replica=1, data=1, expert=1, model=1)


def _is_box(x) -> bool:
  return isinstance(x, nn.LogicallyPartitioned)


@functools.cache
def _boxed(router: str):
  """Boxed shapes of a model with a learnt spatial table, prompts and a head: all parameters that exist are there."""
  model = UniPerceiver(small_model.spec(router, posemb='learned', num_deep_prompts=2, prompt_sharing='separate', num_prefix_prompts=2,
                                         label_prompts=(('names', 3),), spe_bias=True, head=3, modality_embedding=True,
                                         frame_differences=True))
  return jax.eval_shape(functools.partial(boxed_params, model), jax.random.key(0))


def _leaves(router: str):
  """(path, box or bare leaf) of every parameter."""
  leaves = jax.tree_util.tree_leaves_with_path(_boxed(router), is_leaf=_is_box)
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]


class NamesTest(parameterized.TestCase):

  @parameterized.parameters(*small_model.ROUTERS)
  def test_every_parameter_names_every_axis(self, router):
    for path, leaf in _leaves(router):
      self.assertTrue(_is_box(leaf), path)
      self.assertLen(leaf.names, leaf.value.ndim, path)
      self.assertNotIn(None, leaf.names, path)

  @parameterized.parameters(*small_model.ROUTERS)
  def test_every_name_is_in_the_table(self, router):
    names = {name for _, leaf in _leaves(router) for name in leaf.names}
    self.assertEqual(names - set(sharding.RULES), set())

  def test_every_row_of_the_table_is_used(self):
    names = {name for router in small_model.ROUTERS for _, leaf in _leaves(router) for name in leaf.names}
    self.assertEqual(set(sharding.RULES) - names, set())

  def test_the_table_names_axes_of_the_mesh(self):
    for fsdp in (False, True):
      self.assertLessEqual({axis for _, axis in sharding.rules(fsdp)}, {None, *sharding.AXES})


class MeshShapeTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(data=-1), 8, (1, 8, 1, 1)),
      (dict(data=-1, expert=2, model=2), 8, (1, 2, 2, 2)),
      (dict(replica=2, data=2, model=-1), 8, (2, 2, 1, 2)),
      (dict(replica=2, data=2, expert=2, model=1), 8, (2, 2, 2, 1)),
      (dict(data=-1), 1, (1, 1, 1, 1)))
  def test_the_free_axis_takes_the_devices_that_are_left(self, requested, devices, expected):
    shape = sharding.mesh_shape({**_ONE, **requested}, devices)
    self.assertEqual(tuple(shape[a] for a in sharding.AXES), expected)

  @parameterized.named_parameters(
      ('two_free', dict(data=-1, model=-1), 'mesh: data and model are both -1; at most one axis can be inferred'),
      ('zero', dict(expert=0), r"mesh: \{'expert': 0\} must be positive, or -1 for one inferred axis"),
      ('indivisible', dict(data=-1, model=3), r'mesh: 3 \(the fixed axes of .*\) does not divide 8 devices'),
      ('too_few', dict(data=4), 'asks for 4 devices, there are 8; set one axis to -1'),
      ('too_many', dict(data=16), 'asks for 16 devices, there are 8; set one axis to -1'))
  def test_a_mesh_that_does_not_fit_is_refused(self, requested, message):
    with self.assertRaisesRegex(ValueError, message):
      sharding.mesh_shape({**_ONE, **requested}, 8)


def _mesh(**axes) -> jax.sharding.Mesh:
  return sharding.make_mesh({**_ONE, **axes}, jax.devices()[:8])


class PlacementTest(parameterized.TestCase):

  def test_tests_have_eight_devices(self):
    self.assertGreaterEqual(jax.device_count(), 8)

  # PartitionSpecs by hand, for parameters of the scanned block: [layers, experts, …].
  #   qkv kernel      [L, E, embed, 3, heads, head dim]    ffn_out kernel  [L, E, mlp, embed]
  @parameterized.named_parameters(
      ('replicated', dict(data=8), False, (None,) * 6, (None,) * 4),
      ('fsdp', dict(data=8), True, (None, None, 'data', None, None, None), (None, None, None, 'data')),
      ('expert', dict(data=2, expert=4), False, (None, 'expert', None, None, None, None),
       (None, 'expert', None, None)),
      ('model', dict(data=4, model=2), False, (None, None, None, None, 'model', None), (None, None, 'model', None)),
      ('all', dict(data=2, expert=2, model=2), True, (None, 'expert', 'data', None, 'model', None),
       (None, 'expert', 'model', 'data')))
  def test_kernels_lie_as_the_mesh_says(self, axes, fsdp, qkv, ffn_out):
    shardings = sharding.param_shardings(_boxed('attribute'), _mesh(**axes), fsdp)
    block = shardings['encoder']['blocks']['block0']
    # A size-1 axis of the mesh may be named or not: it places nothing.
    self._assert_placed(block['qkv']['kernel'], qkv, (2, 4, 16, 3, 2, 8))
    self._assert_placed(block['ffn_out']['kernel'], ffn_out, (2, 4, 24, 16))

  def _assert_placed(self, placed, spec, shape):
    expected = jax.sharding.NamedSharding(placed.mesh, PartitionSpec(*spec))
    self.assertEqual(placed.shard_shape(shape), expected.shard_shape(shape))
    self.assertTrue(placed.is_equivalent_to(expected, len(shape)))

  def test_every_parameter_can_be_put_on_the_mesh(self):
    shardings = sharding.param_shardings(_boxed('attribute'), _mesh(data=2, expert=2, model=2), fsdp=True)
    shapes = nn.unbox(_boxed('attribute'))
    shards = jax.tree.map(lambda x, where: math.prod(where.shard_shape(x.shape)), shapes, shardings)
    # Kernels, most of the model, are split by all three axes, other parameters by one or none.
    self.assertLess(sum(jax.tree.leaves(shards)), sum(x.size for x in jax.tree.leaves(shapes)) / 4)

  def test_fsdp_leaves_an_eighth_of_every_parameter_with_a_width(self):
    mesh = _mesh(data=8)
    shardings = dict(zip((p for p, _ in _leaves('attribute')), jax.tree.leaves(
        sharding.param_shardings(_boxed('attribute'), mesh, fsdp=True)), strict=True))
    for path, box in _leaves('attribute'):
      share = math.prod(shardings[path].shard_shape(box.value.shape)) / max(1, box.value.size)
      self.assertEqual(share, 1 / 8 if 'embed' in box.names else 1, path)

  def test_an_expert_lies_on_one_expert_shard(self):
    shardings = sharding.param_shardings(_boxed('attribute'), _mesh(data=2, expert=4), fsdp=False)
    kernel = jnp.arange(4, dtype=jnp.float32)[:, None, None] * jnp.ones((4, 24, 16))
    placed = jax.device_put(kernel, shardings['encoder']['tail']['block0']['ffn_out']['kernel'])
    for shard in placed.addressable_shards:
      expert = int(np.argwhere(placed.sharding.mesh.devices == shard.device)[0][2])
      np.testing.assert_array_equal(shard.data, np.full((1, 24, 16), expert))


class BatchTest(absltest.TestCase):

  def test_all_axes_but_model_carry_the_batch(self):
    self.assertEqual(sharding.batch_shards(_mesh(replica=1, data=2, expert=2, model=2)), 4)

  def test_in_one_process_all_parts_are_here(self):
    self.assertEqual(sharding.local_shards(_mesh(data=2, expert=2, model=2)), (0, 1, 2, 3))
    self.assertEqual(sharding.local_shards(_mesh(model=8)), (0,))

  def test_a_batch_is_split_over_its_shard_axis(self):
    mesh = _mesh(data=2, expert=2, model=2)
    self.assertEqual(sharding.batch_sharding(mesh, 0).shard_shape((4, 3, 5)), (1, 3, 5))

  def test_micro_steps_stay_whole(self):
    mesh = _mesh(data=2, expert=2, model=2)
    self.assertEqual(sharding.batch_sharding(mesh, 1).shard_shape((6, 4, 5)), (6, 1, 5))

  def test_what_is_replicated_lies_everywhere(self):
    self.assertTrue(sharding.replicated(_mesh(data=8)).is_fully_replicated)


if __name__ == '__main__':
  absltest.main()
