"""Checkpoints give back what was saved, bit for bit, while the run goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uni_moe_jax import sharding
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.step import TrainState


def _state(step=3, ema=True):
  """A train state with every kind of leaf: parameters, a node without leaves, counters, no average or one."""
  kernel = jnp.linspace(-1, 1, 24, dtype=jnp.float32).reshape(8, 3) ** 3 + step
  params = {'kernel': kernel, 'scale': jnp.float32(1 / 3)}
  return TrainState(
      step=jnp.int32(step), params=params, opt_state=({'mu': params, 'frozen': ()}, jnp.int32(step)),
      ema=jax.tree.map(lambda x: x / 7, params) if ema else None, bad=jnp.int32(0), skipped=jnp.int32(2))


def _like(state, where=None):
  where = where or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)


def _assert_identical(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('ema', [True, False])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path, ema):
  state = _state(ema=ema)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(3, state)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest() == 3
    _assert_identical(checkpoints.restore(_like(state)), state)


def test_a_new_folder_holds_nothing(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest() is None


def test_the_newest_are_kept_and_restored(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 4):
      checkpoints.save(step, _state(step))
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '4']
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    _assert_identical(checkpoints.restore(_like(_state())), _state(4))
    _assert_identical(checkpoints.restore(_like(_state()), step=2), _state(2))


def test_a_step_that_is_saved_is_left_alone(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(3, _state(3))
    checkpoints.save(3, _state(5))
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    _assert_identical(checkpoints.restore(_like(_state())), _state(3))


def test_a_step_that_takes_the_buffers_does_not_change_what_is_being_saved(tmp_path):
  # Saving goes on in the background while the next step reuses the memory of the state.
  size = 1 << 20
  advance = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = advance(jnp.zeros(size))
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, {'x': x})
    for _ in range(5):
      x = advance(x)
    jax.block_until_ready(x)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    np.testing.assert_array_equal(checkpoints.restore(_like({'x': x}))['x'], 1)


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
  state = _state()
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(3, state)
  mesh = sharding.make_mesh(dict(replica=1, data=4, expert=1, model=2))
  like = _like(state, sharding.replicated(mesh))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  like.params['kernel'] = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=split)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    restored = checkpoints.restore(like)
  _assert_identical(restored, state)
  assert restored.params['kernel'].sharding == split
