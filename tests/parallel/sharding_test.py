"""Meshes, and the layout of every parameter of every router's model on them."""

import functools
import math
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import small_model
from uni_moe_jax.model.uni_perceiver import UniPerceiver, boxed_params
from uni_moe_jax.parallel import sharding
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.tree_paths import path_of

_ONE = dict(replica=1, data=1, expert=1, model=1)


@functools.cache
def _boxed(router: str, **changes):
  """Boxed shapes of a model with every parameter that exists: learned positions, prompts, a head, …"""
  spec = small_model.spec(
      router, posemb='learned', num_deep_prompts=2, prompt_sharing='separate', num_prefix_prompts=2,
      label_prompts=(('names', 3),), spe_bias=True, head=3, modality_embedding=True, frame_differences=True,
      word_neighbors=1, **changes)
  return jax.eval_shape(functools.partial(boxed_params, UniPerceiver(spec)), jax.random.key(0))


def _leaves(router: str, **changes):
  """(path, box or bare leaf) of every parameter."""
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return [(path_of(path), leaf) for path, leaf in
          jax.tree_util.tree_leaves_with_path(_boxed(router, **changes), is_leaf=is_box)]


@pytest.mark.parametrize('router, stem', [*((r, 'patch') for r in small_model.ROUTERS), ('dense', 'conv')])
def test_every_parameter_names_every_axis_by_a_name_of_the_table(router, stem):
  for path, leaf in _leaves(router, stem=stem):
    assert isinstance(leaf, nn.LogicallyPartitioned), path
    assert len(leaf.names) == leaf.value.ndim, path
    assert set(leaf.names) <= set(sharding.RULES), path


def test_every_name_of_the_table_is_used():
  assert set(sharding.RULES) == {name for r in small_model.ROUTERS for _, leaf in _leaves(r) for name in leaf.names}


@pytest.mark.parametrize('fsdp', [False, True])
def test_the_table_maps_to_axes_of_the_mesh(fsdp):
  assert {axis for _, axis in sharding.rules(fsdp)} <= {None, *sharding.AXES}


@pytest.mark.parametrize('requested, devices, expected', [
    (dict(data=-1), 8, (1, 8, 1, 1)),
    (dict(data=-1, expert=2, model=2), 8, (1, 2, 2, 2)),
    (dict(replica=2, data=2, model=-1), 8, (2, 2, 1, 2)),
    (dict(replica=2, data=2, expert=2, model=1), 8, (2, 2, 2, 1)),
    (dict(data=-1), 1, (1, 1, 1, 1))])
def test_the_free_axis_gets_the_remaining_devices(requested, devices, expected):
  shape = sharding.mesh_shape({**_ONE, **requested}, devices)
  assert tuple(shape[a] for a in sharding.AXES) == expected


@pytest.mark.parametrize('requested, message', [
    (dict(data=-1, model=-1), 'mesh: data and model are both -1; at most one axis can be inferred'),
    (dict(expert=0), r"mesh: \{'expert': 0\} must be positive, or -1 for one inferred axis"),
    (dict(data=-1, model=3), r'mesh: 3 \(the fixed axes of .*\) does not divide 8 devices'),
    (dict(data=4), 'needs 4 devices, there are 8; set one axis to -1'),
    (dict(data=16), 'needs 16 devices, there are 8; set one axis to -1')])
def test_a_mesh_that_does_not_fit_is_refused(requested, message):
  with pytest.raises(ValueError, match=message):
    sharding.mesh_shape({**_ONE, **requested}, 8)


def _mesh(**axes) -> jax.sharding.Mesh:
  assert jax.device_count() >= 8
  return sharding.make_mesh({**_ONE, **axes}, jax.devices()[:8])


def test_replicas_are_in_different_slices_of_tpus():
  device = type('Device', (types.SimpleNamespace,), {'__hash__': object.__hash__})
  devices = [device(
      id=i, platform='tpu', device_kind='TPU v4', process_index=i // 4, slice_index=i // 4, core_on_chip=0,
      coords=(i % 2, i // 2 % 2, 0)) for i in range(8)]
  for replica in (2, 4):
    mesh = sharding.make_mesh({**_ONE, 'replica': replica, 'data': -1}, devices)
    assert [{d.slice_index for d in block.flat} for block in np.split(mesh.devices, 2)] == [{0}, {1}]
    assert mesh.devices.shape == (replica, 8 // replica, 1, 1)
  with pytest.raises(UsageError, match=r'config\.mesh\.replica=1 must be a multiple of 2, the number of TPU slices'):
    sharding.make_mesh({**_ONE, 'data': -1}, devices)


def _assert_sharded(sharded: NamedSharding, spec, shape):
  # A mesh axis of size 1 may be named or not: it splits nothing.
  expected = NamedSharding(sharded.mesh, PartitionSpec(*spec))
  assert sharded.shard_shape(shape) == expected.shard_shape(shape)
  assert sharded.is_equivalent_to(expected, len(shape))


# PartitionSpecs by hand, for parameters of the scanned block: [layers, experts, …].
#   qkv kernel      [L, E, embed, 3, heads, head dim]    ffn_out kernel  [L, E, mlp, embed]
@pytest.mark.parametrize('axes, fsdp, qkv, ffn_out', [
    (dict(data=8), False, (None,) * 6, (None,) * 4),
    (dict(data=8), True, (None, None, 'data', None, None, None), (None, None, None, 'data')),
    (dict(data=2, expert=4), False, (None, 'expert', None, None, None, None), (None, 'expert', None, None)),
    (dict(data=4, model=2), False, (None, None, None, None, 'model', None), (None, None, 'model', None)),
    (dict(data=2, expert=2, model=2), True, (None, 'expert', 'data', None, 'model', None),
     (None, 'expert', 'model', 'data'))], ids=['replicated', 'fsdp', 'expert', 'model', 'all'])
def test_kernels_are_split_as_the_mesh_defines(axes, fsdp, qkv, ffn_out):
  block = sharding.param_shardings(_boxed('attribute'), _mesh(**axes), fsdp)['encoder']['blocks']['block0']
  _assert_sharded(block['qkv']['kernel'], qkv, (2, 4, 16, 3, 2, 8))
  _assert_sharded(block['ffn_out']['kernel'], ffn_out, (2, 4, 24, 16))


def test_every_parameter_can_be_put_on_the_mesh():
  shardings = sharding.param_shardings(_boxed('attribute'), _mesh(data=2, expert=2, model=2), fsdp=True)
  shapes = nn.unbox(_boxed('attribute'))
  sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), shapes, shardings)
  # Kernels, most of the model, are split by all three axes, other parameters by one or none.
  assert sum(jax.tree.leaves(sizes)) < sum(x.size for x in jax.tree.leaves(shapes)) / 4


def test_fsdp_leaves_an_eighth_of_every_parameter_with_a_width():
  shardings = jax.tree.leaves(sharding.param_shardings(_boxed('attribute'), _mesh(data=8), fsdp=True))
  for (path, box), sharded in zip(_leaves('attribute'), shardings, strict=True):
    share = math.prod(sharded.shard_shape(box.value.shape)) / max(1, box.value.size)
    assert share == (1 / 8 if 'embed' in box.names else 1), path


def test_an_expert_is_on_one_expert_shard():
  shardings = sharding.param_shardings(_boxed('attribute'), _mesh(data=2, expert=4), fsdp=False)
  kernel = jnp.arange(4, dtype=jnp.float32)[:, None, None] * jnp.ones((4, 24, 16))
  kernel = jax.device_put(kernel, shardings['encoder']['tail']['block0']['ffn_out']['kernel'])
  for shard in kernel.addressable_shards:
    expert = int(np.argwhere(kernel.sharding.mesh.devices == shard.device)[0][2])
    np.testing.assert_array_equal(shard.data, np.full((1, 24, 16), expert))


def test_all_axes_except_model_shard_the_batch_and_none_its_micro_steps():
  mesh = _mesh(replica=1, data=2, expert=2, model=2)
  assert sharding.batch_shards(mesh.shape) == 4
  assert sharding.batch_sharding(mesh, 0).shard_shape((4, 3, 5)) == (1, 3, 5)
  assert sharding.batch_sharding(mesh, 1).shard_shape((6, 4, 5)) == (6, 1, 5)
  assert sharding.local_shards(mesh) == (0, 1, 2, 3)  # a single process has all
  assert sharding.local_shards(_mesh(model=8)) == (0,)
  assert sharding.replicated(mesh).is_fully_replicated


def test_arrays_of_the_host_are_put_on_every_device_without_a_gather():
  mesh = sharding.make_mesh(dict(replica=1, data=4, expert=2, model=1))
  tree = {'a': np.arange(6.).reshape(2, 3), 'b': [jnp.ones(4, jnp.bfloat16)], 'nan': np.array([np.nan])}
  placed = sharding.on_every_device(tree, mesh)
  chex.assert_trees_all_equal(placed, tree)
  assert all(len(x.addressable_shards) == 8 and x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
