"""The folder of a host with files of a bucket: its bound, what is fetched first, and several threads and processes."""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
from array_record.python import array_record_module

from tests.data import own_files
from tests.data.bucket_shards import object_in, open_shards, shard_name, upload_shards
from tests.helpers import processes, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.shards import cache_files, mirror, writer
from uni_moe_jax.data.shards.mirror import Mirror
from uni_moe_jax.io import storage
from uni_moe_jax.train.loop import train
from uni_moe_jax.utils.errors import RunError, UsageError


def test_the_cache_keeps_its_bound_and_what_was_used_last(bucket, tmp_path):
  records = upload_shards(bucket, tmp_path / 'sender', 6)
  size = object_in(bucket, shard_name(0)).stat().length
  data = Mirror(bucket, tmp_path / 'receiver', max_bytes=int(3.5 * size))
  shards = open_shards(data, 6)
  present = lambda: {p.name[-1] for p in (data.root / 'x').glob('x.array_record-*')}
  for shard in (0, 1, 2, 0, 3):
    assert shards.__getitems__([5 * shard]) == [records[5 * shard]]
  assert present() == {'0', '2', '3'}
  ids = np.random.default_rng(0).permutation(30)
  assert shards.__getitems__(ids) == [records[i] for i in ids]
  assert len(present()) == 3

  def removed_open_files():
    names = []
    for path in pathlib.Path('/proc/self/fd').iterdir():
      with contextlib.suppress(FileNotFoundError):  # closed meanwhile
        names.append(os.readlink(path))
    return [name for name in names if str(data.root) in name and name.endswith('(deleted)')]

  assert not removed_open_files()  # they would keep their place on the disk
  other = Mirror(bucket, tmp_path / 'receiver')  # as of another process
  other.sync('x')
  shards.__getitems__([15])
  (data.root / shard_name(3)).unlink()
  other.fetch(shard_name(3))
  assert removed_open_files()
  assert shards.__getitems__([15]) == [records[15]] and not removed_open_files()
  shards.prefetch(ids)  # it would only remove what is needed first
  assert len(present()) == 3
  with pytest.raises(UsageError, match=r'config\.data\.cache_gb=1e-05 is less than the largest file of .*/x'):
    Mirror(bucket, tmp_path / 'small', max_bytes=10_000).sync('x')


def test_another_dataset_that_another_process_has_fetched_is_an_error(bucket, tmp_path):
  upload_shards(bucket, tmp_path / 'sender', 1)
  shards = open_shards(Mirror(bucket, tmp_path / 'receiver'), 1)
  shards.__getitems__([0])
  records = upload_shards(bucket, tmp_path / 'later', 1, seed=1)
  assert open_shards(Mirror(bucket, tmp_path / 'receiver'), 1).__getitems__([0]) == records[:1]
  with pytest.raises(RunError, match='x.array_record-00000 is another file than this process has read'):
    shards.__getitems__([0])


def test_the_bound_removes_only_what_can_be_fetched_again(bucket, tmp_path):
  upload_shards(f'{bucket}/.hidden', tmp_path / 'sender', 2)
  size = object_in(bucket, f'.hidden/{shard_name(0)}').stat().length
  cache, data = tmp_path / 'cache', Mirror(f'{bucket}/.hidden', tmp_path / 'cache', max_bytes=int(1.5 * size))
  data.sync('x')
  data.fetch(shard_name(0))
  made = [*(data.root / 'own/pets' / name for name in (
      '.1.0.0.unfinished/shards/a/rows.npy', '.1.0.0.unfinished/final-a/pets-train.array_record-00000-of-00001',
      '.1.0.0.unfinished/written-a/b/caption.texts', '2.0.0/pets-train.array_record-00000-of-00001')),
          data.root / 'tfds/d/1.0.0.incompleteA/d-train.array_record-00000-of-00001', data.root / 'tokens/a/tokens.npy',
          data.root / '.glyphs-1.a/train.npz', *(cache / '.input-a/videos' / name for name in ('x.npz', 'files.json'))]
  for path in made:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(2 * size))
    os.utime(path, (0, 0))  # not used for longer than what was fetched
  data.fetch(shard_name(1))  # they do not count, either: there is enough space
  assert [path for path in made if not path.exists()] == []
  assert [path.name[-1] for path in (data.root / 'x').glob('x.array_record-*')] == ['1']  # the other one was removed


def test_a_dataset_that_has_lost_a_file_is_not_uploaded(bucket, tmp_path):
  summary = prepare.prepare(own_files.write_text_pairs(tmp_path / 'in'), tmp_path, 'texts')
  [records] = (tmp_path / 'own/texts/1.0.0').glob('*train.array_record*')
  file = writer.RecordFile(records.name, 'train', records.parent, {})
  for i, name in enumerate((records.name, 'train-text_a.npy', 'test-text_b.texts', 'test-label.npy')):
    shutil.copytree(records.parent, source := tmp_path / f'{i}')
    (source / name).unlink()
    data = Mirror(bucket, tmp_path / 'cache')
    with pytest.raises(RunError, match=f'has no {name}: another process removed'):
      mirror.publish(data, data.root / 'own/texts/1.0.0', source, writer.required(summary, [file]))
    assert not storage.files_in(storage.path(bucket))


def test_threads_that_need_more_than_the_bound_read_what_they_need_within_it(bucket, tmp_path, monkeypatch):
  records = upload_shards(bucket, tmp_path / 'sender', 4)
  size = object_in(bucket, shard_name(0)).stat().length
  data = Mirror(bucket, tmp_path / 'receiver', max_bytes=int(1.5 * size))
  shards = open_shards(data, 4)
  files, peaks = storage.filesystem(bucket), []
  fetch = files.get_file

  def measured(remote, local):
    peaks.append(data._total())
    fetch(remote, local)

  monkeypatch.setattr(files, 'get_file', measured)
  orders = [np.random.default_rng(i).permutation(20) for i in range(3)]
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    for ids, read in zip(orders, pool.map(shards.__getitems__, orders), strict=True):
      assert read == [records[i] for i in ids]
  assert max(peaks) <= 1.5 * size


def test_a_file_that_is_removed_while_it_is_opened_is_read(bucket, tmp_path, monkeypatch):
  records = upload_shards(bucket, tmp_path / 'sender', 1)
  data = Mirror(bucket, tmp_path / 'receiver')
  shards, reader = open_shards(data, 1), array_record_module.ArrayRecordReader

  def removed_before(*args, **kwargs):
    (data.root / shard_name(0)).unlink()
    return reader(*args, **kwargs)

  monkeypatch.setattr(array_record_module, 'ArrayRecordReader', removed_before)
  assert shards.__getitems__(range(5)) == records
  assert data.num_fetched == 1


def test_files_are_fetched_in_the_order_in_which_they_are_needed(bucket, tmp_path, monkeypatch, capsys):
  upload_shards(bucket, tmp_path / 'sender', 5)
  monkeypatch.setattr(mirror, '_NUM_FETCHES', 1)
  files, fetched = storage.filesystem(bucket), []
  fetch = files.get_file
  monkeypatch.setattr(files, 'get_file', lambda remote, local, **o: (fetched.append(remote[-1]), fetch(remote, local)))
  data = Mirror(bucket, tmp_path / 'receiver')
  open_shards(data, 5).prefetch(np.array([17, 2, 15, 11, 3]))
  while data._num_lanes:
    time.sleep(.01)
  data._later.shutdown()
  assert fetched == ['3', '0', '2', '1', '4']
  assert f'data: fetched 5 files, 0.7 MB of {bucket} in' in capsys.readouterr().out


def test_a_process_ends_without_the_files_that_may_wait(bucket, tmp_path):
  upload_shards(bucket, tmp_path / 'sender', 6)
  script = f'''
import time
from uni_moe_jax.data.shards import mirror
from uni_moe_jax.data.shards import cache_files
from uni_moe_jax.io import storage
mirror._NUM_FETCHES = 1
data = mirror.Mirror({bucket!r}, {str(tmp_path / "receiver")!r})
data.sync('x')
files = storage.filesystem({bucket!r})
fetch = files.get_file
files.get_file = lambda *x: (print('fetch', flush=True), time.sleep(.3), fetch(*x))
data.prefetch(sorted(n for n in data._files if 'array_record' in n))
time.sleep(.1)'''
  done = processes.python('-c', script)
  assert done.returncode == 0 and done.stdout.count('fetch\n') == 1 and not done.stderr, done
  assert len(list((tmp_path / 'receiver').rglob('x.array_record-*'))) == 1  # the one that had begun


def test_parts_of_files_of_a_dead_process_are_removed_and_those_that_are_being_fetched_are_not(bucket, tmp_path):
  upload_shards(bucket, tmp_path / 'sender', 2)
  size = object_in(bucket, shard_name(0)).stat().length
  data = Mirror(bucket, tmp_path / 'receiver', max_bytes=int(1.5 * size))
  data.sync('x')
  own, other = (data.root / 'x' / f'.{shard_name(i)[2:]}.part' for i in range(2))

  def leave(*parts):
    for part in parts:
      part.touch()
      os.truncate(part, size)

  leave(own, other)
  assert data.fetch(shard_name(0)).exists() and not other.exists()
  (data.root / shard_name(0)).unlink()
  leave(other)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    with cache_files.locked(data.root / shard_name(1).replace('x/', 'x/.')):
      fetched = pool.submit(data.fetch, shard_name(0))
      time.sleep(.3)
      assert other.exists() and not fetched.done()
    assert fetched.result(30).exists() and not other.exists()


def test_two_processes_of_a_host_fetch_a_file_once(bucket, tmp_path):
  upload_shards(bucket, tmp_path / 'sender', 6)
  script = f'''
import hashlib, types, sys
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.shards.mirror import Mirror
from uni_moe_jax.data.shards.record_files import Shards
data = Mirror({bucket!r}, {str(tmp_path / "receiver")!r})
data.sync('x')
names = sorted(n for n in data._files)
shards = Shards(data, [types.SimpleNamespace(filename=str(data.root / n), skip=0, take=5) for n in names])
content = b''.join(shards.__getitems__(range(30)))
print(data.num_fetched, hashlib.sha256(content).hexdigest())'''
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    done = list(pool.map(lambda _: processes.python('-c', script), range(2)))
  assert [p.returncode for p in done] == [0, 0], done
  counts, digests = zip(*(p.stdout.split() for p in done))
  assert sum(map(int, counts)) == 6 and len({*digests}) == 1


def test_records_of_training_that_do_not_fit_are_refused_before_any_is_fetched(bucket, tmp_path, monkeypatch):
  upload_shards(bucket, tmp_path / 'sender', 3)
  size = object_in(bucket, shard_name(0)).stat().length
  names, disk = [shard_name(i) for i in range(3)], shutil.disk_usage(tmp_path)
  bounded = Mirror(bucket, tmp_path / 'receiver', max_bytes=2 * size)
  bounded.sync('x')
  bounded.check_space(names[:2])
  with pytest.raises(UsageError, match='reads all 0.000[0-9]+ GB .*, but config.data.cache_gb=0.000.* is less;'):
    bounded.check_space(names)
  data = Mirror(bucket, tmp_path / 'receiver')
  data.sync('x')
  monkeypatch.setattr(mirror.shutil, 'disk_usage', lambda _: disk._replace(free=2 * size))
  with pytest.raises(UsageError, match='.*/receiver has 0.000.* GB for the missing 0.000.*config.data.cache_dir'):
    data.check_space(names)
  assert not data.num_fetched and not bounded.num_fetched
  data.fetch(names[0])
  data.check_space(names)
  data.check_space(names[1:], names[:2])
  data.check_space(names[:2], names[:1])
  monkeypatch.setattr(mirror.shutil, 'disk_usage', lambda _: disk._replace(free=size))
  bounded.check_space(names[1:])  # the first file is removed for them
  bounded.check_space(names[1:], names[:1])  # so is that of an evaluation
  with pytest.raises(UsageError, match='.*/receiver has'):
    data.check_space(names[:2], names[2:])


@pytest.mark.parametrize('evaluate_every, missing', [(0, '0.000131'), (1, '0.000262')])
def test_training_does_not_start_where_its_records_do_not_fit(bucket, tmp_path, monkeypatch, evaluate_every, missing):
  rows = own_files.write_captioned_images(tmp_path / 'in') / 'data.jsonl'
  rows.write_text(rows.read_text().replace('"test"', '"validation"'))
  prepare.prepare(rows.parent, Mirror(bucket, tmp_path / 'sender'), 'colors')
  c = tiny.config(data_dir=bucket)
  c.data.cache_dir = str(tmp_path / 'receiver')
  c.model.update(channels=3, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)
  c.tokenizer.update(vocab_size=60, allow_smaller_vocab=True)
  c.target_sets.colors = config_lib.target_set('own:colors/color', family='names')
  c.tasks.color = config_lib.task('image_classification', 'own:colors', batch_size=8, target_set='colors',
                                  label_column='color')
  c.evaluators.color = config_lib.evaluator(
      'classification', 'color', split='validation', during_training=True)
  c.train.evaluate_every = evaluate_every
  disk = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(mirror.shutil, 'disk_usage', lambda _: disk._replace(free=9))
  with pytest.raises(UsageError, match=f'has 9e-09 GB for the missing {missing}; attach'):
    train(c, str(tmp_path / 'run'))
