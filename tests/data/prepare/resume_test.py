"""A preparation gives the same files for any number of workers, and wherever it was interrupted."""

import contextlib
import json
import pathlib
import shutil

import pytest

from tests.data import own_files
from tests.stress import preparation
from uni_moe_jax.data.formats import input_shards
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.prepare.scan import Scan
from uni_moe_jax.data.prepare.write import Write
from uni_moe_jax.data.shards.mirror import Mirror
from uni_moe_jax.io import locks
from uni_moe_jax.utils import workers
from uni_moe_jax.utils.errors import MissingFileError, UsageError


class _Killed(Exception):
  pass


@pytest.fixture(name='source')
def _source(tmp_path, monkeypatch):
  """Images in seven shards, several files of records, and duplicates in other shards."""
  monkeypatch.setattr(input_shards, '_NUM_ROWS', 5)
  monkeypatch.setattr(prepare, '_FILE_ROWS', 8)
  root = own_files.write_captioned_images(tmp_path / 'in')
  rows = own_files.read_jsonl(root / 'data.jsonl')
  own_files.write_jsonl(root / 'data.jsonl', [*rows, rows[3], {**rows[4], 'captions': ['other']}])
  return root


def _run(source, data, monkeypatch, num_tasks=10**6, **options):
  """Prepares until so many tasks are done, in the last of which it is killed; returns their types."""
  started = []

  def run(tasks, *_, **__):
    for task in tasks:
      started.append(type(task))
      if len(started) > num_tasks:
        raise _Killed
      task()

  monkeypatch.setattr(workers, 'run', run)
  prepare.prepare(source, data, 'x', **options)
  return started


def test_what_is_done_is_not_done_again(source, tmp_path, monkeypatch):
  tasks = _run(source, tmp_path / 'whole', monkeypatch)
  assert tasks == [Scan] * 7 + [Write] * 4
  expected = preparation.content(tmp_path / 'whole/own/x')
  for num_done in range(len(tasks)):
    data = tmp_path / f'{num_done}'
    with pytest.raises(_Killed):
      _run(source, data, monkeypatch, num_done)
    (data / 'own/x/.1.0.0.unfinished/shards/.half').mkdir()  # as a process leaves it that is killed
    assert _run(source, data, monkeypatch) == tasks[num_done:]
    assert preparation.content(data / 'own/x') == expected


@pytest.mark.parametrize('directory', ['folder', 'bucket'])
def test_one_that_was_killed_at_its_end_is_complete_for_the_same_input_and_options(
    source, tmp_path, monkeypatch, request, directory):
  address = request.getfixturevalue('gcs').address + '/killed' if directory == 'bucket' else ''
  open_data = lambda: Mirror(address, tmp_path / 'cache') if address else tmp_path / 'data'
  other, data = own_files.write_captioned_images(tmp_path / 'other', 9), pathlib.Path(open_data())
  _run(source, open_data(), monkeypatch)
  work, summary = data / 'own/x/.1.0.0.unfinished', data / 'own/x/1.0.0/prepared.json'
  expected = json.loads(summary.read_text())
  for changed in (dict(source=other), dict(test_fraction=0.2), dict(gif='video')):
    (work / 'shards/a').mkdir(parents=True)
    (work / 'shards/a/manifest.json').touch()
    with pytest.raises(UsageError, match='own/x/1.0.0 already exists; give another --version or --name, or remove it'):
      prepare.prepare(**{'source': source, 'data_dir': open_data(), 'name': 'x', **changed})
    assert (work / 'shards/a/manifest.json').exists()
    with contextlib.ExitStack() as stack:
      assert not locks.lock(work, stack)
      with pytest.raises(UsageError, match='is locked by another process, which prepares the same dataset'):
        prepare.prepare(source, open_data(), 'x')
    assert work.exists()
    if address:  # as if it had been killed before the folder had its name in the cache
      shutil.rmtree(summary.parent)
    assert prepare.prepare(source, open_data(), 'x') == expected
    assert not work.exists()
  with pytest.raises(UsageError, match='already exists'):  # it was not killed
    prepare.prepare(source, open_data(), 'x')


def test_one_that_was_killed_while_it_was_published_writes_only_files_that_are_gone(source, tmp_path, monkeypatch):
  _run(source, tmp_path / 'whole', monkeypatch)
  for name, num_gone in (('kept', 0), ('removed', 1)):
    data = tmp_path / name
    with monkeypatch.context() as patch, pytest.raises(_Killed):
      patch.setattr(prepare.mirror, 'publish', lambda *_: (_ for _ in ()).throw(_Killed))
      _run(source, data, monkeypatch)
    assert not (data / 'own/x/1.0.0').exists()  # who reads the folder takes no part of it
    [target] = (data / 'own/x/.1.0.0.unfinished').glob('final-*')
    for path in sorted(target.glob('*.array_record*'))[:num_gone]:
      path.unlink()
    assert _run(source, data, monkeypatch) == [Write] * num_gone
    assert preparation.content(data / 'own/x') == preparation.content(tmp_path / 'whole/own/x')


def test_a_wrong_input_leaves_what_is_done(source, tmp_path, monkeypatch):
  with pytest.raises(_Killed):
    _run(source, tmp_path, monkeypatch, 9)
  with pytest.raises(MissingFileError, match='does not exist'):
    prepare.prepare(source.with_name('inn'), tmp_path, 'x')
  assert _run(source, tmp_path, monkeypatch) == [Write] * 2
  with pytest.raises(MissingFileError):
    prepare.prepare(source.with_name('inn'), tmp_path, 'y')
  assert not list((tmp_path / 'own/y').iterdir())  # nothing was done


def test_other_rows_are_not_taken_from_an_interrupted_one(source, tmp_path, monkeypatch):
  with pytest.raises(_Killed):
    _run(source, tmp_path, monkeypatch, 9)
  rows = own_files.read_jsonl(source / 'data.jsonl')
  own_files.write_jsonl(source / 'data.jsonl', [{**row, 'captions': ['new']} for row in rows])
  assert _run(source, tmp_path, monkeypatch) == [Scan] * 7 + [Write] * 4


def test_after_too_many_bad_rows_files_are_read_again(source, tmp_path, monkeypatch):
  image = source / 'images/000.jpg'
  content = image.read_bytes()
  image.unlink()
  with pytest.raises(UsageError, match='cannot be used'):
    prepare.prepare(source, tmp_path, 'x', max_corrupt_fraction=0.05)
  image.write_bytes(content)
  assert prepare.prepare(source, tmp_path, 'x', max_corrupt_fraction=0.05)['splits'] == {'train': 24, 'test': 7}


def test_after_too_many_bad_rows_a_larger_bound_reads_no_file_again(source, tmp_path, monkeypatch):
  (source / 'images/000.jpg').unlink()
  with pytest.raises(UsageError, match='or raise --max_corrupt_fraction=0.01; files are then not read again'):
    prepare.prepare(source, tmp_path, 'x', max_corrupt_fraction=0.01)
  assert _run(source, tmp_path, monkeypatch, max_corrupt_fraction=0.2) == [Write] * 4
  assert [path.name for path in (tmp_path / 'own/x').iterdir()] == ['1.0.0']


def test_workers_are_processes_that_give_the_same_files(source, tmp_path):
  for num_workers in (1, 2):
    prepare.prepare(source, tmp_path / str(num_workers), 'x', num_workers=num_workers)
  one, two = (preparation.content(tmp_path / str(n) / 'own/x') for n in (1, 2))
  assert one == two and len([name for name in one if 'array_record' in name]) == 4


@pytest.mark.nightly
def test_preparations_killed_at_random_moments_end_like_an_undisturbed_one(tmp_path):
  source = preparation.write_rows(tmp_path / 'in', 5_000)
  assert not preparation.kills(tmp_path, source, 4, seed=0)
