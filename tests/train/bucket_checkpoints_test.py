"""Checkpoints in a bucket are those of a disk: verified without a download, complete or not there, kept as long."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import processes
from uni_moe_jax.train import manifest
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.workdir import saved_steps
from uni_moe_jax.utils import storage
from uni_moe_jax.utils.errors import RunError

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


def _assert_step(workdir, step, **options):
  with Checkpoints(workdir, **options) as checkpoints:
    assert checkpoints.latest() == step
    np.testing.assert_array_equal(checkpoints.restore(_LIKE)['params']['kernel'], _state(step)['params']['kernel'])


def test_a_state_is_restored_bit_for_bit_in_silence(workdir, capfd):
  _assert_step(workdir, 2, max_to_keep=None)
  with Checkpoints(workdir, max_to_keep=None, best_metric='loss/total') as checkpoints:
    assert checkpoints.best() == 1
    np.testing.assert_array_equal(
        checkpoints.restore_params(1)['kernel'], _state(1)['params']['kernel'])
  assert 'note' not in (err := capfd.readouterr().err) and 'warning' not in err


def test_the_newest_the_best_and_every_nth_checkpoint_are_kept(workdir):
  with Checkpoints(workdir, max_to_keep=1, best_metric='loss/total', keep_every=3) as checkpoints:
    for step in range(3, 9):
      checkpoints.save(step, _state(step), {'loss/total': step})
    checkpoints.finish()
    assert checkpoints.steps() == saved_steps(workdir) == [1, 3, 6, 8]
  assert {name.split('/')[0] for name in storage.files_in(workdir / 'checkpoints')} == {'1', '3', '6', '8'}


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 8
  storage.write_bytes(path, bytes(content))


def _truncate(path):
  storage.write_bytes(path, path.read_bytes()[:-1])


@pytest.mark.parametrize('damage, message', [
    (_flip, '{} differs from what was saved (by its MD5)'), (_truncate, '{} has '),
    (lambda path: path.unlink(), '{} is missing')])
def test_a_damaged_checkpoint_is_named_and_set_aside_and_its_step_can_be_saved_again(workdir, damage, message, capfd):
  folder = workdir / 'checkpoints/2'
  largest = max((name for name in storage.files_in(folder) if '/d/' in name),
                key=lambda name: storage.files_in(folder)[name])
  damage(folder / largest)
  _assert_step(workdir, 1, max_to_keep=None)
  assert saved_steps(workdir) == [1, 2]  # who only reads moves nothing
  with pytest.raises(RunError, match='the checkpoint of step 2 in .* is damaged'), Checkpoints(workdir, None) as ones:
    ones.restore(_LIKE, step=2)
  capfd.readouterr()
  with Checkpoints(workdir, max_to_keep=3) as checkpoints:
    warning = capfd.readouterr().err
    assert f'the checkpoint of step 2 in {workdir} is damaged: {message.format(largest)}' in warning
    assert f'it was moved to {workdir}/damaged/2' in warning
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


def test_verification_reads_no_array(workdir, monkeypatch):
  folder, files, read = workdir / 'checkpoints/2', type(storage.filesystem(workdir)), []
  original = files.open
  monkeypatch.setattr(files, 'open', lambda self, path, *args, **kwargs: (
      read.append(str(path).rpartition('/')[2]), original(self, path, *args, **kwargs))[1])
  assert not manifest.damage(folder)
  assert set(read) == {manifest.FILE, '_CHECKPOINT_METADATA', 'commit_success.txt'}


def test_arrays_whose_bits_are_not_those_that_were_saved_are_refused_by_name(workdir, monkeypatch):
  original = manifest.array_sums
  monkeypatch.setattr(manifest, 'array_sums', lambda folder: original(folder) | {'params/kernel': 7})
  with Checkpoints(workdir, None) as checkpoints:
    with pytest.raises(RunError, match=r'was read 2 times, and not as it was saved \(params/kernel\)'):
      checkpoints.restore(_LIKE)


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
  newest = checkpoints.latest()
with Checkpoints(workdir, max_to_keep=None) as checkpoints:
  restored = checkpoints.restore(_LIKE)
np.testing.assert_array_equal(restored['params']['kernel'], _state(newest)['params']['kernel'])
print('restored step', newest)
'''


@pytest.mark.slow
@pytest.mark.parametrize('flips', [1, 9])
def test_a_bit_that_changes_in_an_answer_is_found_and_the_arrays_are_read_again(gcs, flips):
  workdir = f'{gcs.address}/flips_{flips}'
  with Checkpoints(workdir, max_to_keep=1) as checkpoints:
    checkpoints.save(2, _state(2))
  with flaky_store.flaky(gcs, flipped='/d/', flips=flips) as (through, counts):
    done = processes.python('-c', _PROGRAM, workdir, **through.environment)
    assert counts()['flips'] >= 1
  assert f'arrays of the checkpoint of step 2 in {workdir} were not read as they were saved' in done.stderr, done.stderr
  if flips == 1:
    assert done.stdout == 'restored step 2\n'
  else:
    assert done.returncode == 1 and 'was read 2 times, and not as it was saved' in done.stderr


@pytest.mark.slow
def test_a_store_that_refuses_and_loses_requests_has_what_was_saved(store):
  # The server of GCS forgets a resumable upload when it is complete; GCS itself repeats the answer that was lost.
  lost = dict(resets=.03, truncated=.02) if store.address.startswith('s3:') else {}
  with flaky_store.flaky(store, seed=1, errors=.05, **lost) as (through, counts):
    done = processes.python('-c', _PROGRAM, f'{store.address}/flaky', '1', '2', '3', **through.environment)
    assert done.stdout == 'restored step 3\n', done.stderr
    assert all(counts()[fault] for fault in ('errors', *lost))
  assert saved_steps(f'{store.address}/flaky') == [2, 3]


def _copy(source, target):
  for name in storage.files_in(source):
    storage.make_folder((target / name).parent)
    (target / name).write_bytes((source / name).read_bytes())


def test_a_checkpoint_that_was_copied_from_a_bucket_to_a_disk_or_back_is_verified_by_its_content(
    workdir, tmp_path, capfd):
  _copy(workdir, tmp_path / 'copy')
  _assert_step(tmp_path / 'copy', 2, max_to_keep=None)
  with Checkpoints(tmp_path / 'disk', max_to_keep=1) as checkpoints:
    checkpoints.save(2, _state(2))
  _copy(tmp_path / 'disk', workdir.parent / 'back')
  _assert_step(workdir.parent / 'back', 2, max_to_keep=None)
  [name] = [name for name in storage.files_in(workdir.parent / 'back/checkpoints/2') if name.startswith('default/d/')]
  _flip(workdir.parent / 'back/checkpoints/2' / name)
  with pytest.raises(RunError, match='every checkpoint in .* is damaged'):
    Checkpoints(workdir.parent / 'back', max_to_keep=None)
  assert f'{name} differs from what was saved (by its SHA-256)' in capfd.readouterr().err
