"""Preparation of a user's own data: read, check, split, write as a TFDS dataset of array records.

Its folder is described in `shards/record_format.py`. `own/NAME/.VERSION.unfinished/` has what is done of it; the same
command continues.

Images and videos keep the bytes of their files, except the few that `media.py` must rewrite.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

from uni_moe_jax.data.formats import input_shards
from uni_moe_jax.data.prepare.merge import Merge, Merged, TooManySkippedError
from uni_moe_jax.data.prepare.scan import MANIFEST, SPLITS, Scan, ScannedShard
from uni_moe_jax.data.prepare.summary import summarize
from uni_moe_jax.data.prepare.write import Write
from uni_moe_jax.data.shards import mirror, writer
from uni_moe_jax.data.shards.record_format import FORMAT, OWN_FOLDER, SUMMARY, VERSIONS
from uni_moe_jax.data.shards.writer import RecordFile
from uni_moe_jax.io import locks, storage
from uni_moe_jax.io.files import check_renames_folders, read_json, write_json
from uni_moe_jax.utils import workers
from uni_moe_jax.utils.errors import UsageError

VERSION = '1.0.0'  # of a dataset, by default
_FILE_BYTES, _FILE_ROWS = 2**28, 2**20  # after which another file of records begins

Run = Callable[[Iterable[workers.Task], int, str], None]  # tasks, their number, what they do


def prepare(
    source: storage.Path, data_dir: str | os.PathLike[str], name: str, version: str = VERSION, gif: str = 'image',
    test_fraction: float = 0.1, max_corrupt_fraction: float = 0.1, allow_outside: bool = False,
    num_workers: int = 1) -> dict:
  """Prepares a file or folder as dataset `name` in a folder of prepared data; returns the content of prepared.json.

  A preparation that was killed continues: parts of the input that are done are not read again.

  Args:
    source: see `input_shards`. gif, allow_outside: see `input_shards.read`.
    max_corrupt_fraction: the largest fraction of skipped rows.
    test_fraction: fraction of the groups that becomes the split 'test' if the data names no splits.
    num_workers: processes. The result does not depend on their number.

  Raises:
    UsageError: nothing to read, an invalid name, an existing version, or too many skipped rows.
  """
  if not re.fullmatch('[a-z][a-z0-9_]*', name):
    raise UsageError(f'--name={name!r} must consist of lower-case letters, digits and underscores, a letter first.')
  if not VERSIONS.fullmatch(version):
    raise UsageError(f'--version={version!r} must look like {VERSION}.')
  folder = pathlib.Path(data_dir) / OWN_FOLDER / name / version
  work = folder.with_name(f'.{version}.unfinished')
  existing = UsageError(f'{folder} already exists; give another --version or --name, or remove it.')
  if not mirror.has_dataset(data_dir, folder):
    check_renames_folders(pathlib.Path(data_dir), '--data_dir')
  elif not work.is_dir():
    raise existing
  with contextlib.ExitStack() as stack:
    storage.make_folder(work)
    after_lock = stack.enter_context(contextlib.ExitStack())  # the lock is in the folder
    if owner := locks.lock(work, stack):
      raise UsageError(f'{work} is locked by {owner}, which prepares the same dataset; wait until it has ended.')
    _remove_temporary(work)
    scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='.scratch-', dir=work)))
    run = functools.partial(workers.run, num_workers=num_workers)
    shards, refused = None, work / 'refused.json'
    if max_corrupt_fraction <= read_json(refused, -1):  # files were changed, perhaps some that no part is named by
      storage.remove_folder(work / 'shards')
      refused.unlink()
    try:
      if mirror.has_dataset(data_dir, folder):  # another process has ended meanwhile, or was killed when all was done
        names = [Scan(shard, '', gif, allow_outside).name for shard in input_shards.plan(source)]
        summary = _read_summary(data_dir, folder)
        if summary.get('identity') != _identity(test_fraction, names):
          raise existing
        after_lock.callback(storage.remove_folder, work)
        return summary
      shards = _scan(source, work / 'shards', scratch, run, gif, allow_outside)
      merged = Merge([ScannedShard(shard) for shard in shards], scratch)(test_fraction, max_corrupt_fraction, source)
    except TooManySkippedError:
      write_json(refused, max_corrupt_fraction)
      raise
    except UsageError:
      if shards is not None or not _names_in(work / 'shards'):  # the user will change the files; or nothing is done
        after_lock.callback(storage.remove_folder, work)
      raise
    identity = _identity(test_fraction, [shard.name for shard in shards])
    target = work / f'final-{identity}'
    files = _write(merged, shards, target, work / f'written-{identity}', name, run)
    layout = writer.Layout(merged.columns, merged.classes)
    summary = writer.describe(
        target, name, version, layout, files, identity=identity, **summarize(merged, test_fraction))
    # Until a bucket has all of it, it has a hidden name: who reads the mirror meanwhile takes no part of it.
    mirror.publish(data_dir, folder, target, writer.required(summary, files))
  storage.remove_folder(work)
  return summary


def _identity(test_fraction: float, names: list[str]) -> str:
  """Is equal for the same input and options. names: of the shards, with what they depend on."""
  return hashlib.sha256(repr((FORMAT, test_fraction, names)).encode()).hexdigest()[:20]


def _read_summary(data_dir: str | os.PathLike[str], folder: pathlib.Path) -> dict:
  """The content of prepared.json of a dataset that is there; {} if it has none."""
  mirror.sync(data_dir, f'{OWN_FOLDER}/{folder.parent.name}')
  return read_json(mirror.local(data_dir, folder / SUMMARY), {})


def _remove_temporary(work: pathlib.Path) -> None:
  """Removes what processes that were killed had begun to write."""
  for path in (*work.glob('.*'), *work.glob('*/.*')):
    if path.is_dir():
      shutil.rmtree(path)


def _names_in(folder: storage.Path) -> set[str]:
  """The complete folders in a folder."""
  return {name.split('/')[0] for name in storage.files_in(folder) if name.endswith(f'/{MANIFEST}')}


def _scan(source: storage.Path, folder: storage.Path, scratch: pathlib.Path, run: Run, gif: str,
          allow_outside: bool) -> list[storage.Path]:
  """Reads all shards of the input, but those that are done; returns their folders in order."""
  storage.make_folder(folder)
  done, names, num_tasks = _names_in(folder), [], 0
  with open(scratch / 'plan', 'w+b') as file:  # the names of all files may not fit into memory
    for shard in input_shards.plan(source):
      names.append((task := Scan(shard, str(folder), gif, allow_outside)).name)
      if names[-1] not in done:
        pickle.dump(task, file)
        num_tasks += 1
    file.seek(0)
    run((pickle.load(file) for _ in range(num_tasks)), num_tasks, 'read')
  return [folder / name for name in names]


def _write(merged: Merged, shards: Sequence[storage.Path], target: storage.Path, done: storage.Path, name: str,
           run: Run) -> list[RecordFile]:
  """Writes the files of all splits, but those that are done."""
  for folder in (target, done):
    storage.make_folder(folder)
  cuts = _cut(merged, len(shards))
  totals = collections.Counter(split for split, *_ in cuts)
  numbers = {split: itertools.count() for split in totals}
  names = [writer.file_name(name, split, next(numbers[split]), totals[split]) for split, *_ in cuts]
  # Not those whose file is gone: what is published has all that was written.
  finished = _names_in(done) & storage.files_in(target).keys()

  def tasks() -> Iterator[Write]:
    for file, (split, start, first, last) in zip(names, cuts):
      if file not in finished:
        rows = slice(merged.bounds[first], merged.bounds[last])
        yield Write(
            str(target), file, str(done), SPLITS.index(split), start, tuple(map(str, shards[first:last])),
            merged.splits[rows], merged.columns, merged.classes)

  run(tasks(), len(set(names) - finished), 'written')
  return [RecordFile(file, split, done / file, json.loads((done / file / MANIFEST).read_text()))
          for file, (split, *_) in zip(names, cuts)]


def _cut(merged: Merged, num_shards: int) -> list[tuple[str, int, int, int]]:
  """(split, number of its examples before, first shard, shard after the last one) of each file."""
  cuts = []
  numbers = {split: [0, 0, 0, 0] for split in merged.split_sizes}  # examples before, first shard, rows, bytes
  for i in range(num_shards):
    rows = slice(*merged.bounds[i:i + 2])
    sizes, splits = merged.rows[rows]['bytes'], merged.splits[rows]
    for split, state in numbers.items():
      selected = splits == SPLITS.index(split)
      state[2] += int(selected.sum())
      state[3] += int(sizes[selected].sum())
      if state[2] and (state[3] >= _FILE_BYTES or state[2] >= _FILE_ROWS or i == num_shards - 1):
        cuts.append((split, state[0], state[1], i + 1))
        state[:] = state[0] + state[2], i + 1, 0, 0
  return sorted(cuts, key=lambda cut: (SPLITS.index(cut[0]), cut[1]))
