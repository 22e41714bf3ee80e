"""Records of many files are read by many threads with a bounded number of open files."""

import concurrent.futures
import contextlib
import os
import resource
import shutil
import sys
import types

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from tests.data import bucket_shards
from tests.data.bucket_shards import write_shards
from tests.helpers import processes
from uni_moe_jax.data.shards import record_files as shards_lib
from uni_moe_jax.data.shards.file_dataset import CorruptExample, FileDataset
from uni_moe_jax.data.shards.record_files import Shards
from uni_moe_jax.utils.errors import RunError

_FILES, _THREADS = 200, 8


@pytest.fixture(scope='module')
def instructions(tmp_path_factory):
  """Of 200 files with three records each; record i is the string of i."""
  root = tmp_path_factory.mktemp('shards')
  for i in range(_FILES):
    writer = ArrayRecordWriter(str(root / f'{i}'), 'group_size:1')
    for k in range(3):
      writer.write(f'{3 * i + k}'.encode())
    writer.close()
  return [types.SimpleNamespace(filename=str(root / f'{i}'), skip=0, take=3) for i in range(_FILES)]


def _num_open(instructions) -> int:
  """Files of the dataset that this process has open."""
  folder, count = os.path.dirname(instructions[0].filename), 0
  for name in os.listdir('/proc/self/fd'):
    with contextlib.suppress(FileNotFoundError):  # another thread has closed it
      count += os.readlink(f'/proc/self/fd/{name}').startswith(folder)
  return count


def test_many_threads_and_splits_keep_a_bounded_number_of_files_open(instructions, monkeypatch):
  monkeypatch.setattr(shards_lib, '_MAX_IDLE', 128)
  splits, numbers = [Shards('', instructions) for _ in range(2)], []

  def read(i):
    ids = np.random.default_rng(i).integers(0, 3 * _FILES, 300)
    made = splits[i % 2].__getitems__(ids)
    numbers.append(_num_open(instructions))
    return made == [str(k).encode() for k in ids]

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    assert all(pool.map(read, range(100)))
  assert shards_lib._MAX_IDLE - 10 <= max(numbers) <= shards_lib._MAX_IDLE + 2 * _THREADS
  assert Shards._num_idle == sum(map(len, Shards._idle.values())) == shards_lib._MAX_IDLE


def test_files_within_a_quarter_of_the_limit_are_opened_once(instructions):
  script = f"""
import types
from uni_moe_jax.data.shards import record_files as shards
paths, opened, open_reader = {[i.filename for i in instructions]}, [], shards._open_reader
shards._open_reader = lambda path: opened.append(path) or open_reader(path)
split = shards.Shards('', [types.SimpleNamespace(filename=path, skip=0, take=3) for path in paths])
for i in range(600):
  split.__getitems__([i * 77 % 600])
print(len(opened))"""
  command = f'ulimit -n $0; exec {sys.executable} -c "$1"'
  counts = [int(processes.run(['bash', '-c', command, limit, script])) for limit in ('1024', '600')]
  assert counts[0] == _FILES < counts[1]


def test_readers_that_were_used_last_stay_open(instructions, monkeypatch):
  opened, open_reader = [], shards_lib._open_reader
  monkeypatch.setattr(shards_lib, '_open_reader', lambda path: [opened.append(path), open_reader(path)][1])
  monkeypatch.setattr(shards_lib, '_MAX_IDLE', 2)
  shards, read = Shards('', instructions), []
  for shard in (0, 1, 0, 2, 0, 1):
    read += shards.__getitems__([3 * shard])
  assert read == [b'0', b'3', b'0', b'6', b'0', b'3']
  assert [int(os.path.basename(path)) for path in opened] == [0, 1, 2, 1]


def test_too_many_open_files_are_an_error_and_cost_no_example(instructions):
  shards = Shards('', instructions)
  shards.__getitems__([0])
  dataset = FileDataset('x', len(shards), shards.__getitems__, {}, {}, {}, '')
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # no file can be opened
    with pytest.raises(RunError, match=r'/1 cannot be opened \(.*Too many open files.*The limit .* is 3 open files'):
      dataset.read_valid(np.arange(6))
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  assert not any(isinstance(record, CorruptExample) for record in dataset.read_valid(np.arange(6)))


def test_data_that_is_prepared_again_while_a_run_reads_it_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(shards_lib, '_MAX_IDLE', 0)  # each read opens its file
  records, shards = write_shards(tmp_path, 1), Shards(tmp_path, bucket_shards.instructions(tmp_path, 1))
  assert shards.__getitems__([1]) == [records[1]] and shards.__getitems__([2]) == [records[2]]
  shutil.rmtree(tmp_path / 'x')
  write_shards(tmp_path, 1, seed=1)
  with pytest.raises(RunError, match='x.array_record-00000 is another file than this process has read'):
    shards.__getitems__([1])


def test_files_whose_times_alone_change_are_read_on_until_the_data_is_other_data(tmp_path, monkeypatch):
  monkeypatch.setattr(shards_lib, '_MAX_IDLE', 0)
  records, copy = write_shards(tmp_path, 1), tmp_path / 'copy'
  (tmp_path / 'x/prepared.json').write_text('{"fingerprints": 1}')
  shards = Shards(tmp_path, bucket_shards.instructions(tmp_path, 1))
  assert shards.__getitems__([1]) == [records[1]]
  os.utime(tmp_path / bucket_shards.shard_name(0), (1, 1))  # as against a purge of old files
  assert shards.__getitems__([1]) == [records[1]]
  shutil.move(tmp_path / 'x', copy)
  shutil.copytree(copy, tmp_path / 'x', copy_function=shutil.copy)
  assert shards.__getitems__([1]) == [records[1]]
  os.utime(tmp_path / bucket_shards.shard_name(0), (2, 2))
  (tmp_path / 'x/prepared.json').write_text('{"fingerprints": 2}')
  with pytest.raises(RunError, match='is another file than this process has read'):
    shards.__getitems__([1])
  (tmp_path / 'x/prepared.json').write_text('{"fingerprints": 1}')
  os.truncate(tmp_path / bucket_shards.shard_name(0), 9)
  with pytest.raises(RunError, match='is another file than this process has read'):
    shards.__getitems__([1])


def test_a_split_without_files_is_empty():
  assert len(Shards('', [])) == 0


def test_too_many_open_files_beside_a_corrupt_record_are_an_error_too():
  def read(ids):
    if 1 in ids:
      raise ValueError('damaged')
    raise RunError('too many open files')

  with pytest.raises(RunError, match='too many open files'):
    FileDataset('x', 9, read, {}, {}, {}, '').read_valid(np.arange(3))
