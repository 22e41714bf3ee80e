"""Damaged checkpoints are skipped with a warning or refused, never read as if they were intact."""

import errno
import itertools
import os
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import saved_run
from tests.stress import injected_faults
from uni_moe_jax.io import storage
from uni_moe_jax.train import checkpoint, manifest
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.workdir import saved_steps
from uni_moe_jax.utils.errors import RunError


def _state(step):
  return {'params': {'kernel': jnp.arange(2048.) ** 2 + step}, 'step': jnp.int32(step), 'ema_params': None}


_LIKE = jax.eval_shape(_state, 0)


@pytest.fixture(name='two', scope='module')
def _two(tmp_path_factory):
  """A work directory with checkpoints of steps 1 and 2."""
  folder = tmp_path_factory.mktemp('two')
  with Checkpoints(folder, max_to_keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, _state(step))
  return folder


@pytest.fixture(name='workdir')
def _workdir(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'run')


def test_what_reads_a_run_that_trains_on_lists_again_if_checkpoints_are_deleted_meanwhile(workdir, monkeypatch, capfd):
  def damage_of_a_step_that_is_deleted_first(folder):
    if trains:
      trains.clear()
      with Checkpoints(workdir, max_to_keep=1) as checkpoints:
        checkpoints.save(3, _state(3))
    return damage(folder)

  damage, trains = manifest.damage, [True]
  monkeypatch.setattr(manifest, 'damage', damage_of_a_step_that_is_deleted_first)
  with Checkpoints(workdir, max_to_keep=None) as checkpoints:
    assert checkpoints.steps() == [3]
  assert capfd.readouterr().err == ''


def test_a_run_that_deletes_checkpoints_sooner_than_they_are_verified_is_an_error(workdir, monkeypatch):
  steps = itertools.count(3)
  monkeypatch.setattr(checkpoint, 'saved_steps', lambda _: [next(steps)])
  with pytest.raises(RunError, match='deletes checkpoints sooner than they are verified; raise train.max_to_keep'):
    Checkpoints(workdir, max_to_keep=None)


def _truncate(path: pathlib.Path):
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def _names(workdir, step) -> list[str]:
  folder = workdir / 'checkpoints' / str(step)
  return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


@pytest.mark.parametrize('damage', [_truncate, saved_run.flip_bit, pathlib.Path.unlink])
def test_with_any_damaged_file_the_previous_checkpoint_is_used(two, tmp_path, capfd, damage):
  names = _names(two, 2)
  assert len(names) > 10 and manifest.FILE in names
  for i, name in enumerate(names):
    workdir = shutil.copytree(two, tmp_path / str(i))
    damage(workdir / 'checkpoints/2' / name)
    with Checkpoints(workdir, max_to_keep=None) as checkpoints:
      assert checkpoints.latest() == 1, name
    warning = capfd.readouterr().err
    assert 'warning: the checkpoint of step 2 in' in warning and name in warning, (name, warning)
    assert 'falling back to the previous one, of step 1' in warning


@pytest.fixture(name='in_place', scope='module')
def _in_place(tmp_path_factory):
  """A work directory in which folders cannot be renamed, with checkpoints of steps 1 and 2."""
  folder = tmp_path_factory.mktemp('in_place')
  with pytest.MonkeyPatch.context() as patch:
    injected_faults.no_folder_renames(patch.setattr)
    with Checkpoints(folder, max_to_keep=3) as checkpoints:
      for step in (1, 2):
        checkpoints.save(step, _state(step))
  return folder


def _unlink(*names):
  return lambda folder: [(folder / name).unlink() for name in names]


# What a process leaves that is killed while it writes arrays, after the manifest, and while it writes the commit file.
@pytest.mark.parametrize('kill', [
    _unlink('manifest.json', 'commit_success.txt'), _unlink('commit_success.txt'),
    lambda folder: (folder / 'commit_success.txt').write_text('')])
def test_a_save_in_place_that_was_not_finished_is_no_damage(in_place, tmp_path, monkeypatch, capfd, kill):
  injected_faults.no_folder_renames(monkeypatch.setattr)
  workdir = shutil.copytree(in_place, tmp_path / 'run')
  kill(workdir / 'checkpoints/2')
  with Checkpoints(workdir, max_to_keep=None) as checkpoints:
    assert checkpoints.steps() == saved_steps(workdir) == [1]
    assert checkpoints.restore(_LIKE)['step'] == 1
  assert (workdir / 'checkpoints/2').exists()  # another process may be writing it
  kill(workdir / 'checkpoints/1')
  with Checkpoints(workdir, max_to_keep=3) as checkpoints:  # killed in its first save
    assert checkpoints.latest() is None and list((workdir / 'checkpoints').iterdir()) == []
    checkpoints.save(1, _state(1))
  with Checkpoints(workdir, max_to_keep=3) as checkpoints:
    assert checkpoints.restore(_LIKE)['step'] == 1
  assert 'warning' not in capfd.readouterr().err and not (workdir / 'damaged').exists()


def test_a_finished_save_in_place_can_be_damaged(in_place, tmp_path, monkeypatch, capfd):
  injected_faults.no_folder_renames(monkeypatch.setattr)
  for name in set(_names(in_place, 2)) - {'commit_success.txt'}:
    workdir = shutil.copytree(in_place, tmp_path / name.replace('/', '_'))
    (workdir / 'checkpoints/2' / name).unlink()
    with Checkpoints(workdir, max_to_keep=3) as checkpoints:
      assert checkpoints.latest() == 1
    assert f'is damaged: {name} is missing' in capfd.readouterr().err
    assert (workdir / 'damaged/2').is_dir() and not (workdir / 'checkpoints/2').exists()


def test_without_checksums_a_flipped_bit_would_be_trained_on(workdir, monkeypatch):
  # The positive control: at least one of 40 flipped bits in the largest file is read silently as another number.
  monkeypatch.setattr(manifest, 'damage', lambda _: '')
  largest = max((workdir / 'checkpoints/2').rglob('d/*'), key=lambda p: p.stat().st_size)
  intact, is_wrong = largest.read_bytes(), False
  for i in range(0, len(intact), len(intact) // 40 + 1):
    largest.write_bytes(intact[:i] + bytes([intact[i] ^ 1]) + intact[i + 1:])
    try:
      with Checkpoints(workdir, max_to_keep=None) as checkpoints:
        got = checkpoints.restore(_LIKE)
    except Exception:  # TensorStore noticed; Orbax may raise anything
      continue
    is_wrong = got['step'] == 2 and not np.array_equal(got['params']['kernel'], _state(2)['params']['kernel'])
    if is_wrong:
      break
  assert is_wrong


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(workdir, capfd):
  for step in (1, 2):
    _truncate(workdir / 'checkpoints' / str(step) / 'default/manifest.ocdbt')
  for keep in (3, None):
    with pytest.raises(RunError, match='every checkpoint in .* is damaged .* delete .* to train from the start'):
      Checkpoints(workdir, keep)
  assert 'there is no earlier one' in capfd.readouterr().err
  assert _names(workdir, 2)  # they stay for inspection


def test_a_damaged_checkpoint_is_moved_away_when_its_step_is_saved_again(workdir, capfd):
  saved_run.flip_bit(workdir / 'checkpoints/2/default/_METADATA')
  with Checkpoints(workdir, max_to_keep=3) as checkpoints:
    assert checkpoints.steps() == [1]
    checkpoints.save(2, _state(5))
  assert f'moved to {workdir / "damaged/2"}' in capfd.readouterr().err
  with Checkpoints(workdir, max_to_keep=3) as checkpoints:
    np.testing.assert_array_equal(checkpoints.restore(_LIKE)['params']['kernel'], _state(5)['params']['kernel'])
  assert (workdir / 'damaged/2/manifest.json').exists()


def test_a_reader_moves_nothing_and_can_restore_any_intact_step(workdir):
  _truncate(workdir / 'checkpoints/1/default/_METADATA')
  with Checkpoints(workdir, max_to_keep=None) as checkpoints:
    assert checkpoints.steps() == [1, 2]  # older ones are verified when they are restored
    for read in (lambda: checkpoints.restore(_LIKE, 1), lambda: checkpoints.restore_params(1)):
      with pytest.raises(RunError, match='the checkpoint of step 1 in .* is damaged: default/_METADATA has'):
        read()
    np.testing.assert_array_equal(checkpoints.restore_params(2)['kernel'], _state(2)['params']['kernel'])
  assert not (workdir / 'damaged').exists()


def _refuse(number):
  def refuse(folder, *_):
    raise OSError(number, os.strerror(number), str(folder))
  return refuse


@pytest.mark.parametrize('read', ['files_in', '_read'])
@pytest.mark.parametrize('number', [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_checkpoint_that_cannot_be_read_is_no_damaged_one_but_for_an_error_of_the_disk(
    workdir, monkeypatch, number, read):
  owner = storage if read == 'files_in' else manifest
  original = getattr(owner, read)
  monkeypatch.setattr(owner, read, lambda folder: (_refuse(number) if folder.name == '2' else original)(folder))
  if number == errno.EIO:
    with Checkpoints(workdir, max_to_keep=3) as checkpoints:
      assert checkpoints.latest() == 1
    assert (workdir / 'damaged/2').is_dir()
  else:
    with pytest.raises(OSError, match=os.strerror(number)):
      Checkpoints(workdir, max_to_keep=3)
    assert saved_steps(workdir) == [1, 2] and not (workdir / 'damaged').exists()


@pytest.mark.parametrize('number', [errno.EACCES, errno.EIO])
def test_the_best_checkpoint_is_not_deleted_because_its_metrics_cannot_be_read(workdir, monkeypatch, number):
  """If its manifest is damaged, it is not the best one any more."""
  read = manifest._read
  monkeypatch.setattr(manifest, '_read', lambda folder: (_refuse(number) if folder.name == '1' else read)(folder))
  if number == errno.EIO:
    with Checkpoints(workdir, max_to_keep=1, best_metric='loss/total') as checkpoints:
      assert checkpoints.best() is None
  else:
    with pytest.raises(OSError, match=os.strerror(number)):
      Checkpoints(workdir, max_to_keep=1, best_metric='loss/total')


@pytest.mark.parametrize('checks, number, message', [
    (True, errno.ENOSPC, r'step 3 could not be written: the disk is full \(.* MB free .*\); that of step 2 is'),
    (False, errno.ENOSPC, 'step 3 could not be written'),
    (False, errno.EACCES, 'Permission denied.*that of step 2 is safe. Check whether .*checkpoints can be reached')])
def test_a_save_that_failed_is_reported_with_the_step_that_is_safe(workdir, monkeypatch, checks, number, message):
  with monkeypatch.context() as patch, pytest.raises(RunError, match=message):
    patch.setattr(manifest, 'write', _refuse(number))
    with Checkpoints(workdir, max_to_keep=1) as checkpoints:
      checkpoints.save(3, _state(3))
      end = time.monotonic() + 20
      while checks and time.monotonic() < end:  # as the loop does between two steps, without waiting
        checkpoints.check()
        time.sleep(.01)
      assert not checks
  with Checkpoints(workdir, max_to_keep=2) as checkpoints:
    assert checkpoints.restore(_LIKE)['step'] == 2
    checkpoints.save(3, _state(3))
    checkpoints.finish()
    assert checkpoints.steps() == [2, 3]
