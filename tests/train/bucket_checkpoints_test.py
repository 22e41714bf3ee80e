"""Checkpoints in a bucket are those of a disk: verified without a download, complete or not there, kept as long."""

import errno
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import processes, saved_run
from uni_moe_jax.io import storage
from uni_moe_jax.parallel import multihost
from uni_moe_jax.train import manifest
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.workdir import load_config, saved_steps
from uni_moe_jax.utils.errors import RunError, UsageError

pytest.importorskip('aiohttp')
from tests.stress import flaky_store  # noqa: E402


def _state(step):
  return {'params': {'kernel': jnp.sin(jnp.arange(2048.)) + step}, 'step': jnp.int32(step), 'ema_params': None}


_LIKE = jax.eval_shape(_state, 0)


@pytest.fixture(name='workdir')
def _workdir(store, request):
  """A work directory in a bucket, with checkpoints of steps 1 and 2."""
  folder = f'{store.address}/{abs(hash(request.node.name))}/größer'
  with Checkpoints(folder, max_to_keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, _state(step), {'loss/total': step})
  return storage.path(folder)


def _assert_step(workdir, step, restored=None, **options):
  with Checkpoints(workdir, **options) as checkpoints:
    assert checkpoints.latest() == step
    kernel = checkpoints.restore(_LIKE)['params']['kernel']
    assert checkpoints.latest() == (restored or step)
  np.testing.assert_array_equal(kernel, _state(restored or step)['params']['kernel'])


def test_a_state_is_restored_bit_for_bit_in_silence(capfd, workdir):
  _assert_step(workdir, 2, max_to_keep=None)
  with Checkpoints(workdir, max_to_keep=None, best_metric='loss/total') as checkpoints:
    assert checkpoints.best() == 1
    np.testing.assert_array_equal(
        checkpoints.restore_params(1)['kernel'], _state(1)['params']['kernel'])
  assert not re.search(r'note|warning|^E\d', capfd.readouterr().err, re.MULTILINE)  # E: TensorStore logs an error


def test_the_newest_the_best_and_every_nth_checkpoint_are_kept(workdir):
  with Checkpoints(workdir, max_to_keep=1, best_metric='loss/total', keep_every=3) as checkpoints:
    for step in range(3, 9):
      checkpoints.save(step, _state(step), {'loss/total': step})
    checkpoints.finish()
    assert checkpoints.steps() == saved_steps(workdir) == [1, 3, 6, 8]
  assert {name.split('/')[0] for name in storage.files_in(workdir / 'checkpoints')} == {'1', '3', '6', '8'}


def _truncate(path):
  storage.write_bytes(path, path.read_bytes()[:-1])


@pytest.mark.parametrize('damage, message', [
    (saved_run.flip_bit, '{} differs from what was saved (by its MD5)'), (_truncate, '{} has '),
    (lambda path: path.unlink(), '{} is missing')])
def test_a_damaged_checkpoint_is_named_and_set_aside_and_its_step_can_be_saved_again(workdir, damage, message, capfd):
  folder = workdir / 'checkpoints/2'
  largest = saved_run.largest_file(folder)
  damage(folder / largest)
  _assert_step(workdir, 1, max_to_keep=None)
  assert saved_steps(workdir) == [1, 2]  # who only reads moves nothing
  with pytest.raises(RunError, match='the checkpoint of step 2 in .* is damaged'), Checkpoints(workdir, None) as ones:
    ones.restore(_LIKE, step=2)
  capfd.readouterr()
  with Checkpoints(workdir, max_to_keep=3) as checkpoints:
    warning = capfd.readouterr().err
    assert f'the checkpoint of step 2 in {workdir} is damaged: {message.format(largest)}' in warning
    assert f'checkpoint 2 was moved to {workdir}/damaged/2' in warning
    assert saved_steps(workdir) == [1] and manifest.FILE in storage.files_in(workdir / 'damaged/2')
    checkpoints.save(2, _state(2))
  _assert_step(workdir, 2, max_to_keep=3)


@pytest.mark.parametrize('missing', [('commit_success.txt',), ('commit_success.txt', manifest.FILE)])
def test_a_save_that_was_not_finished_is_ignored_by_readers_and_deleted_by_the_next_start(workdir, missing, capfd):
  for name in missing:
    (workdir / 'checkpoints/2' / name).unlink()
  _assert_step(workdir, 1, max_to_keep=None)
  assert storage.files_in(workdir / 'checkpoints/2')  # another process may be writing it
  _assert_step(workdir, 1, max_to_keep=3)
  assert not storage.files_in(workdir / 'checkpoints/2') and 'warning' not in capfd.readouterr().err


def test_verification_opens_no_array(workdir, monkeypatch):
  files, opened = type(storage.filesystem(workdir)), []
  original = files.open
  monkeypatch.setattr(files, 'open', lambda self, path, *args, **kwargs: (
      opened.append(str(path).rpartition('/')[2]), original(self, path, *args, **kwargs))[1])
  assert not manifest.damage(workdir / 'checkpoints/2')
  assert {*opened} == {'_CHECKPOINT_METADATA', 'commit_success.txt'}


@pytest.fixture(name='altered')
def _altered(monkeypatch):
  """What was stored of step 2 is not what was to be saved, though the digests of its objects are right."""
  original = manifest.array_sums
  monkeypatch.setattr(manifest, 'array_sums', lambda folder: original(folder) | (
      {'params/kernel': 7} if folder.name == '2' else {}))


def test_a_checkpoint_whose_arrays_are_not_those_that_were_saved_is_named_and_set_aside(workdir, altered, capfd):
  with Checkpoints(workdir, None) as checkpoints:
    with pytest.raises(RunError, match=r'of step 2 in .* is damaged: 2 reads differ from what was saved '
                                       r'\(params/kernel\); choose another step'):
      checkpoints.restore(_LIKE, step=2)
    np.testing.assert_array_equal(checkpoints.restore_params()['kernel'], _state(1)['params']['kernel'])
    assert checkpoints.latest() == 1 and saved_steps(workdir) == [1, 2]  # who only reads moves nothing
  capfd.readouterr()
  with Checkpoints(workdir, max_to_keep=3) as checkpoints:
    assert checkpoints.latest() == 2
    np.testing.assert_array_equal(checkpoints.restore(_LIKE)['params']['kernel'], _state(1)['params']['kernel'])
    warning = capfd.readouterr().err
    assert 'is damaged: 2 reads differ from what was saved (params/kernel); falling back to' in warning
    assert f'checkpoint 2 was moved to {workdir}/damaged/2' in warning
    assert checkpoints.latest() == 1 and saved_steps(workdir) == [1]
    checkpoints.save(2, _state(2))
    checkpoints.finish()
    assert checkpoints.steps() == saved_steps(workdir) == [1, 2]


@pytest.mark.parametrize('error, restored', [
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), None), (MemoryError(), None),
    (ValueError('Error decoding chunk'), 1)])
def test_a_checkpoint_that_is_too_large_for_the_devices_is_no_damaged_one(workdir, error, restored, monkeypatch):
  read = ocp.StandardCheckpointHandler.restore

  def refuse(handler, folder, args):
    if folder.parent.name == '2':
      raise error
    return read(handler, folder, args=args)

  monkeypatch.setattr(ocp.StandardCheckpointHandler, 'restore', refuse)
  if restored:
    _assert_step(workdir, 2, max_to_keep=3, restored=restored)
  else:
    with Checkpoints(workdir, max_to_keep=3) as checkpoints, pytest.raises(type(error)):
      checkpoints.restore(_LIKE)
    assert saved_steps(workdir) == [1, 2]


def test_a_store_that_does_not_answer_is_no_damage(workdir, monkeypatch):
  def refuse(folder):
    raise OSError(errno.EIO, 'We encountered an internal error')  # as s3fs reports what it does not know
  with monkeypatch.context() as patch, pytest.raises(OSError, match='internal error'):
    patch.setattr(manifest.storage, 'files_in', refuse)
    Checkpoints(workdir, max_to_keep=3)
  assert saved_steps(workdir) == [1, 2]


@pytest.mark.parametrize('failures, restored', [((0, 0, 1), 2), ((0, 1, 0, 1), 1)])  # elsewhere, by agreement
def test_a_process_reads_again_or_the_earlier_step_if_another_one_must(gcs, failures, restored, monkeypatch, capfd):
  workdir, others = f'{gcs.address}/others_{restored}', iter(failures)
  with Checkpoints(workdir, max_to_keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, _state(step))
  monkeypatch.setattr(multihost, 'sums_over_processes', lambda numbers: [numbers[0] + next(others, 0)])
  _assert_step(workdir, 2, max_to_keep=2, restored=restored)
  assert 'differ from what was saved (in another process, see its output)' in capfd.readouterr().err


def test_if_no_checkpoint_has_the_arrays_that_were_saved_nothing_is_moved(workdir, altered):
  storage.remove_folder(workdir / 'checkpoints/1')
  with Checkpoints(workdir, max_to_keep=3) as checkpoints, pytest.raises(RunError, match='every checkpoint in .* is d'):
    checkpoints.restore(_LIKE)
  assert saved_steps(workdir) == [2]


def test_a_run_that_is_read_from_a_bucket_that_does_not_exist_is_refused(store):
  with pytest.raises(UsageError, match="names the bucket 'absent', which does not exist"):
    load_config(store.address.replace('bucket', 'absent') + '/run')


# In a process of its own, since TensorStore reads the address of the server once.
_PROGRAM = '''
import sys
import numpy as np
from tests.train.bucket_checkpoints_test import _LIKE, _state
from uni_moe_jax.train.checkpoint import Checkpoints
workdir, *steps = sys.argv[1:]
with Checkpoints(workdir, max_to_keep=2) as checkpoints:
  for step in map(int, steps):
    checkpoints.save(step, _state(step))
with Checkpoints(workdir, max_to_keep=None) as checkpoints:
  restored = checkpoints.restore(_LIKE)
  newest = checkpoints.latest()
np.testing.assert_array_equal(restored['params']['kernel'], _state(newest)['params']['kernel'])
print('restored step', newest)
'''


@pytest.mark.parametrize('flipped, flips, restored', [
    pytest.param('default/d/', 99, 1, marks=pytest.mark.nightly),
    *(pytest.param(flipped, 1, 2, marks=pytest.mark.nightly) for flipped in ('default/d/', 'manifest'))])
def test_after_a_bit_that_changes_in_an_answer_it_is_read_again_and_after_more_the_earlier_step(
    gcs, flipped, flips, restored):
  workdir = f'{gcs.address}/flips_{flips}_{flipped}'.rstrip('/')
  with Checkpoints(workdir, max_to_keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, _state(step))
  with flaky_store.flaky(gcs, flipped=f'/2/{flipped}', flips=flips) as (through, counts):
    done = processes.python('-c', _PROGRAM, workdir, **through.environment)
    assert counts()['flips'] >= 1
  assert done.stdout == f'restored step {restored}\n', done.stderr
  assert ('falling back' in done.stderr) == (restored == 1)
  assert ('arrays of the checkpoint of step 2 in' in done.stderr) == (flipped != 'manifest')


@pytest.mark.nightly
@pytest.mark.parametrize('store', ['s3', 'gs'], indirect=True)
def test_a_store_that_refuses_and_loses_requests_has_what_was_saved(store):
  # The server of GCS forgets a resumable upload when it is complete; GCS itself repeats the answer that was lost.
  lost = dict(resets=.03, truncated=.02) if store.address.startswith('s3:') else {}
  with flaky_store.flaky(store, seed=1, errors=.05, **lost) as (through, counts):
    done = processes.python('-c', _PROGRAM, f'{store.address}/flaky', '1', '2', '3', **through.environment)
    assert done.stdout == 'restored step 3\n', done.stderr
    assert all(counts()[fault] for fault in ('errors', *lost))
  assert saved_steps(f'{store.address}/flaky') == [2, 3]


def test_a_checkpoint_that_was_copied_from_a_bucket_to_a_disk_or_back_is_verified_by_its_content(
    workdir, tmp_path, capfd):
  saved_run.copy(workdir, tmp_path / 'copy')
  _assert_step(tmp_path / 'copy', 2, max_to_keep=None)
  with Checkpoints(tmp_path / 'disk', max_to_keep=1) as checkpoints:
    checkpoints.save(2, _state(2))
  saved_run.copy(tmp_path / 'disk', workdir.parent / 'back')
  _assert_step(workdir.parent / 'back', 2, max_to_keep=None)
  [name] = [name for name in storage.files_in(workdir.parent / 'back/checkpoints/2') if name.startswith('default/d/')]
  saved_run.flip_bit(workdir.parent / 'back/checkpoints/2' / name)
  with pytest.raises(RunError, match='every checkpoint in .* is damaged'):
    Checkpoints(workdir.parent / 'back', max_to_keep=None)
  assert f'{name} differs from what was saved (by its SHA-256)' in capfd.readouterr().err
