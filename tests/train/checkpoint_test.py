"""Checkpoints give back what was saved, bit for bit, while the run goes on."""

import ctypes
import pathlib
import resource
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.stress import injected_faults
from uni_moe_jax.parallel import sharding
from uni_moe_jax.train import manifest
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.step import TrainState
from uni_moe_jax.utils.errors import RunError


def _state(step=3, ema=True):
  """A train state with every type of leaf: parameters, a node without leaves, counters, no average or one."""
  kernel = jnp.linspace(-1, 1, 24, dtype=jnp.float32).reshape(8, 3) ** 3 + step
  params = {'kernel': kernel, 'scale': jnp.float32(1 / 3)}
  return TrainState(
      step=jnp.int32(step), params=params, opt_state=({'mu': params, 'frozen': ()}, jnp.int32(step)),
      ema_params=jax.tree.map(lambda x: x / 7, params) if ema else None, nonfinite_streak=jnp.int32(0),
      skipped_steps=jnp.int32(2))


def _like(state, where=None):
  where = where or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)


def _assert_identical(got, expected):
  chex.assert_trees_all_equal_dtypes(got, expected)
  chex.assert_trees_all_equal(got, expected)


def _folders(workdir) -> list[str]:
  return sorted(p.name for p in (workdir / 'checkpoints').iterdir())


@pytest.mark.parametrize('ema', [True, False])
def test_a_state_is_restored_bit_for_bit(tmp_path, ema):
  state = _state(ema=ema)
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.save(3, state)
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    assert checkpoints.latest() == 3
    _assert_identical(checkpoints.restore(_like(state)), state)


def test_the_newest_are_kept_and_restored_and_a_saved_step_is_not_saved_again(tmp_path):
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    for step in (1, 2, 4):
      checkpoints.save(step, _state(step))
    checkpoints.save(4, _state(5))
  assert _folders(tmp_path) == ['2', '4']
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    _assert_identical(checkpoints.restore(_like(_state())), _state(4))
    _assert_identical(checkpoints.restore(_like(_state()), step=2), _state(2))


def test_a_step_that_donates_its_state_does_not_change_a_pending_save(tmp_path):
  # Saving goes on in the background while the next step reuses the memory of the state.
  size = 1 << 20
  advance = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = advance(jnp.zeros(size))
  with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
    checkpoints.save(1, {'x': x})
    for _ in range(5):
      x = advance(x)
    jax.block_until_ready(x)
  with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
    np.testing.assert_array_equal(checkpoints.restore(_like({'x': x}))['x'], 1)


def _onto(state, mesh, spec):
  """Shapes of a state on a mesh, the kernel split."""
  like = _like(state, sharding.replicated(mesh))
  like.params['kernel'] = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
  return like


# (axis sizes, how the kernel [8, 3] is split).
_MESHES = [
    (dict(data=1), (None,)), (dict(data=8), ('data',)), (dict(data=4, model=2), ('data',)),
    (dict(data=2, expert=2, model=2), (('data', 'expert'),)), (dict(replica=2, expert=2), ('expert',))]


@pytest.mark.parametrize('source', range(len(_MESHES)))
def test_a_checkpoint_is_restored_onto_any_mesh_from_any(tmp_path, source):
  def on_mesh(i):
    axes, spec = _MESHES[i]
    axes = dict(replica=1, data=1, expert=1, model=1) | axes
    mesh = sharding.make_mesh(axes, jax.devices()[:np.prod(list(axes.values()))])
    return _onto(_state(), mesh, jax.sharding.PartitionSpec(*spec))

  state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), _state(), on_mesh(source))
  with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
    checkpoints.save(3, state)
  with Checkpoints(tmp_path, max_to_keep=None) as checkpoints:
    for target in range(len(_MESHES)):
      like = on_mesh(target)
      restored = checkpoints.restore(like)
      _assert_identical(restored, _state())
      assert restored.params['kernel'].sharding == like.params['kernel'].sharding


def test_the_best_is_kept_beside_the_newest(tmp_path):
  losses = {1: 5.0, 2: 1.0, 3: 9.0, 4: float('nan'), 5: 2.0}
  with Checkpoints(tmp_path, max_to_keep=2, best_metric='loss/total') as checkpoints:
    for step, loss in losses.items():
      checkpoints.save(step, _state(step), {'loss/total': loss})
    checkpoints.finish()
    assert (checkpoints.steps(), checkpoints.best()) == ([2, 4, 5], 2)
  with Checkpoints(tmp_path, max_to_keep=2, best_metric='loss/total') as checkpoints:  # from the manifests
    assert checkpoints.best() == 2
    checkpoints.save(6, _state(6), {'loss/total': 0.5})
    checkpoints.save(7, _state(7))  # without metrics
    checkpoints.finish()
    assert (checkpoints.steps(), checkpoints.best()) == ([6, 7], 6)
  with Checkpoints(tmp_path, max_to_keep=None) as checkpoints:
    assert (checkpoints.steps(), checkpoints.best()) == ([6, 7], None)


@pytest.mark.parametrize('metric, best', [('eval/photos/top-1', 3), ('eval/masked/perplexity', 1), ('loss/total', 1)])
def test_the_best_is_the_highest_score_or_the_lowest_loss_or_perplexity(tmp_path, metric, best):
  with Checkpoints(tmp_path, max_to_keep=1, best_metric=metric) as checkpoints:
    for step, value in ((1, .1), (2, .9), (3, .9), (4, .5)):
      checkpoints.save(step, _state(step), {metric: value})
    checkpoints.finish()
    assert (checkpoints.steps(), checkpoints.best()) == ([best, 4], best)


def test_another_model_is_refused_with_the_arrays_that_differ(tmp_path):
  with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
    checkpoints.save(3, _state())
    other = _state()
    other = other.replace(params=other.params | {'kernel': jnp.zeros((8, 4)), 'extra': jnp.zeros(2)})
    message = (r'params/extra: absent → float32\[2\]; params/kernel: float32\[8, 3\] → float32\[8, 4\]\).*'
            r'Continue with the version that wrote it')
    with pytest.raises(ValueError, match=message):
      checkpoints.restore(_like(other))


def test_reading_creates_and_deletes_nothing(tmp_path):
  with Checkpoints(tmp_path / 'none', max_to_keep=None) as checkpoints:
    assert checkpoints.latest() is None
  assert not (tmp_path / 'none').exists()
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    checkpoints.save(3, _state())
  unfinished = tmp_path / 'checkpoints' / '4.orbax-checkpoint-tmp'
  unfinished.mkdir()
  with Checkpoints(tmp_path, max_to_keep=None) as checkpoints:
    assert checkpoints.latest() == 3
  assert unfinished.exists()  # another process may be writing it
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    checkpoints.save(4, _state(4))
  assert _folders(tmp_path) == ['3', '4']


@pytest.mark.parametrize('when', ['never', 'before', 'while'])
def test_a_reader_reports_that_the_run_has_deleted_its_checkpoint(tmp_path, monkeypatch, when):
  array_sums = manifest.array_sums

  def save(*steps):
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
      for step in steps:
        checkpoints.save(step, _state(step))

  def sums_of_a_step_that_is_deleted_then(folder):
    sums = array_sums(folder)
    save(4)
    return sums

  save(3)
  with Checkpoints(tmp_path, max_to_keep=None) as checkpoints:
    if when == 'before':
      save(4)
    elif when == 'while':
      monkeypatch.setattr(manifest, 'array_sums', sums_of_a_step_that_is_deleted_then)
    if when == 'never':
      _assert_identical(checkpoints.restore(_like(_state()), 3), _state())
      return
    for step in (None, 3):
      with pytest.raises(RunError, match='the checkpoint of step 3 in .* was deleted meanwhile.*repeat the command'):
        checkpoints.restore(_like(_state()), step)
  assert _folders(tmp_path) == ['4']


@pytest.fixture(name='no_folder_renames')
def _no_folder_renames(monkeypatch):
  """Folders cannot be renamed, as on buckets mounted by gcsfuse; a function that ends it."""
  injected_faults.no_folder_renames(monkeypatch.setattr)
  return monkeypatch.undo


def test_where_folders_cannot_be_renamed_a_commit_file_completes_checkpoints(tmp_path, no_folder_renames, capsys):
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    assert capsys.readouterr().err == (f'note: folders cannot be renamed in {tmp_path}; a file that is written last '
                                       'completes each checkpoint.\n')
    for step in (1, 2, 4):
      checkpoints.save(step, _state(step), {'loss/total': 1 / step})
  assert _folders(tmp_path) == ['2', '4'] and {p.name for p in tmp_path.iterdir()} == {'checkpoints'}
  for ends in (lambda: None, no_folder_renames):  # also where it was copied to
    ends()
    for max_to_keep in (None, 2):
      with Checkpoints(tmp_path, max_to_keep, best_metric='loss/total') as checkpoints:
        assert (checkpoints.steps(), checkpoints.best()) == ([2, 4], 4)
        _assert_identical(checkpoints.restore(_like(_state())), _state(4))
        _assert_identical(checkpoints.restore(_like(_state()), step=2), _state(2))
        np.testing.assert_array_equal(checkpoints.restore_params(2)['kernel'], _state(2).ema_params['kernel'])
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    checkpoints.save(5, _state(5))
  assert _folders(tmp_path) == ['4', '5'] and capsys.readouterr().err.count('note: ') == 1


def test_free_heap_pages_are_returned_to_the_system_after_each_save(tmp_path):
  libc = ctypes.CDLL(None)
  if not hasattr(libc, 'malloc_trim'):
    pytest.skip('another C library than glibc')
  libc.malloc.restype, libc.free.argtypes, libc.memset.argtypes = (
      ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t])
  blocks = [libc.malloc(100_000) for _ in range(2000)]
  for block in blocks:
    libc.memset(block, 1, 100_000)
  with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    checkpoints.save(1, _state(1))
    while checkpoints._manager.is_saving_in_progress():
      time.sleep(.01)
    for block in blocks[::2]:
      libc.free(block)
    full = _resident()
    checkpoints.check()
    assert full - _resident() > 50e6
    for block in blocks[1::4]:
      libc.free(block)
    full = _resident()
    checkpoints.finish()  # nothing was saved since
    assert full - _resident() < 5e6
  for block in blocks[3::4]:
    libc.free(block)


def _resident() -> float:
  """Bytes of this process."""
  return resource.getpagesize() * int(pathlib.Path('/proc/self/statm').read_text().split()[1])
