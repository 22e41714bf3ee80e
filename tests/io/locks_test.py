"""The lock of a folder: one process has it, until it ends or dies; on a disk and in buckets."""

import concurrent.futures
import contextlib
import errno
import json
import subprocess
import sys
import time

import fsspec
import pytest

from tests.helpers import processes, saved_run
from uni_moe_jax import __version__
from uni_moe_jax.io import files as files_lib
from uni_moe_jax.io import locks, storage
from uni_moe_jax.train import manifest, workdir

_LOCKS = '''
import contextlib, sys, time
from uni_moe_jax.io import locks
with contextlib.ExitStack() as stack:
  print(locks.lock(sys.argv[1], stack, float(sys.argv[2])), flush=True)
  time.sleep(60)
'''
_PERIOD = 0.5  # seconds


@contextlib.contextmanager
def _owner(folder, period=_PERIOD):
  """A process that has the lock; it is killed when the block ends."""
  command = [sys.executable, '-c', _LOCKS, str(folder), str(period)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=processes.ROOT) as process:
    try:
      assert process.stdout.readline() == 'None\n'
      yield process
    finally:
      process.kill()


def _owner_of(folder, period=_PERIOD):
  with contextlib.ExitStack() as stack:
    return locks.lock(folder, stack, period)


def test_a_folder_is_locked_until_its_process_ends_or_dies(tmp_path):
  assert _owner_of(tmp_path) is None and _owner_of(tmp_path) is None  # closing the stack unlocks it
  with _owner(tmp_path):
    assert _owner_of(tmp_path) == 'another process'
  assert _owner_of(tmp_path) is None


def test_a_file_system_without_locks_is_noted_and_used(tmp_path, monkeypatch, capsys):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(locks.fcntl, 'flock', no_locks)
  assert _owner_of(tmp_path) is None
  note = 'cannot be locked (No locks available); make sure that no other process writes there'
  assert note in capsys.readouterr().err


def _objects(folder) -> list[str]:
  return list(storage.files_in(folder / locks.FILE))


def test_a_bucket_is_locked_while_its_owner_lives_and_free_at_once_when_it_has_ended(store, capfd):
  folder = storage.path(f'{store.address}/ended')
  assert _owner_of(folder) is None and _owner_of(folder) is None
  assert _objects(folder) == ['000002']
  assert 'is locked by' not in capfd.readouterr().err  # nothing was waited for
  with _owner(folder, 3.) as process:  # the wait ends with the next heartbeat
    assert f', process {process.pid}' in _owner_of(folder, 3.)
    assert capfd.readouterr().err.startswith(f'note: {folder} is locked by ')
    assert _objects(folder) == ['000003']


def test_a_folder_that_was_copied_from_a_bucket_is_locked_there_and_when_it_is_copied_back(store, tmp_path):
  folder, back = (storage.path(f'{store.address}/{name}') for name in ('copied', 'back'))
  assert _owner_of(folder) is None
  saved_run.copy(folder, tmp_path)
  with _owner(tmp_path):
    assert _owner_of(tmp_path) == 'another process'
  saved_run.copy(tmp_path, back)
  assert _owner_of(back) is None and '000002' in _objects(back)


def test_the_lock_of_a_dead_owner_is_taken_over_after_the_missed_heartbeats_and_by_one_process(store):
  folder = storage.path(f'{store.address}/dead')
  with _owner(folder):
    pass
  started = time.monotonic()
  with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(4) as pool:
    owners = list(pool.map(lambda _: locks.lock(folder, stack, _PERIOD), range(4)))
  assert owners.count(None) == 1
  assert time.monotonic() - started > 3 * _PERIOD  # of which the first may have been before the death
  assert _objects(folder) == ['000002']


def test_an_owner_that_was_suspended_for_too_long_ends_when_it_finds_another(store):
  folder = storage.path(f'{store.address}/suspended')
  with _owner(folder) as process:
    process.send_signal(19)  # SIGSTOP
    with contextlib.ExitStack() as stack:
      assert locks.lock(folder, stack, _PERIOD) is None
      process.send_signal(18)  # SIGCONT
      assert process.wait(timeout=30) == 1


def test_a_number_that_was_used_before_gives_no_lock(store):
  folder = storage.path(f'{store.address}/late') / locks.FILE
  storage.create(folder / '000007', b'{"owner": "a newer one", "released": false}')
  assert not locks._ObjectLock(folder, 1, _PERIOD).acquire()  # by who has looked for the newest before there was one
  assert list(storage.files_in(folder)) == ['000007']


@pytest.mark.parametrize('name, read', [
    ('.lock/000001', lambda path: locks._read(path.parent, 1)), ('config.json', workdir._read),
    ('evaluation.json', files_lib.read_json), ('manifest.json', lambda path: manifest._read(path.parent))])
def test_a_lock_or_a_file_of_a_run_is_read_while_another_process_rewrites_it(store, monkeypatch, name, read):
  path = storage.path(store.address) / 'renewed' / name
  contents = ({'config': {}, 'uni_moe_jax': __version__, 'beat': 10**i} for i in range(9))  # longer and longer
  if name == 'manifest.json':
    contents = ({**content, 'sha256': manifest._own_checksum(content)} for content in contents)
  contents = (json.dumps(content).encode() for content in contents)
  files = fsspec.get_filesystem_class(store.address.partition(':')[0])
  info = files._info

  async def then_renewed(self, *args, **options):
    details = await info(self, *args, **options)
    await self._pipe_file(str(path), next(contents))
    return details

  monkeypatch.setattr(files, '_info', then_renewed)  # before a file system is made, which binds it
  storage.write_bytes(path, next(contents))
  with pytest.raises((OSError, ValueError)):  # control: another version than announced, or cut off
    json.loads(path.read_text())
  storage.write_bytes(path, next(contents))
  assert read(path)['beat']
