"""Preparation of a user's own data: read, check, split, write as a TFDS dataset of array records.

  data_dir/own/NAME/VERSION/      features and shards as TFDS lays them out; tfds.builder_from_directory(…) reads them
                    prepared.json splits, columns, classes, statistics, skipped rows (first locations), fingerprints
                    labels.npz    {split}/{column}: class indices int32 [N], -1 for none; of texts bool [N], whether
                    present

Images and videos keep the bytes of their files, except the few that `media.py` must rewrite.
"""

import collections
import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

import numpy as np
from absl import logging

from uni_moe_jax.data import mirror
from uni_moe_jax.data.files.check import open_media, read_checked_rows
from uni_moe_jax.data.files.formats import LOCATION, MEDIA_TYPES, Row
from uni_moe_jax.data.files.npz_videos import NpzReader
from uni_moe_jax.data.files.prepare_summary import summarize
from uni_moe_jax.data.files.splits import Splits, group_of, split_rows
from uni_moe_jax.data.pipeline import npz_records
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.files import check_renames_folders

FOLDER, SUMMARY, LABELS = 'own', 'prepared.json', 'labels.npz'
FORMAT = 2  # of prepared data; data of another format must be prepared again
VERSION = '1.0.0'  # of a dataset, by default
_MAX_CLASSES = 10_000  # of a field; a field of more values is text

Classes = dict[str, tuple[str, ...]]  # class column → names in order


def prepare(
    source: pathlib.Path, data_dir: str | os.PathLike[str], name: str, version: str = VERSION, gif: str = 'image',
    test_fraction: float = 0.1, max_corrupt_fraction: float = 0.1, allow_outside: bool = False) -> dict:
  """Prepares a file or folder as dataset `name` in a folder of prepared data; returns the content of prepared.json.

  Args:
    source, gif, allow_outside: see `formats.read_rows`.
    max_corrupt_fraction: the largest fraction of skipped rows.
    test_fraction: fraction of the groups that becomes the split 'test' if the data names no splits.

  Raises:
    UsageError: nothing to read, an invalid name, an existing version, or too many skipped rows.
  """
  if not re.fullmatch('[a-z][a-z0-9_]*', name):
    raise UsageError(f'--name={name!r} must consist of lower-case letters, digits and underscores, a letter first.')
  if not re.fullmatch(r'\d+\.\d+\.\d+', version):
    raise UsageError(f'--version={version!r} must look like {VERSION}.')
  folder = pathlib.Path(data_dir) / FOLDER / name / version
  if mirror.has_dataset(data_dir, folder):
    raise UsageError(f'{folder} already exists; give another --version or --name, or remove it.')
  check_renames_folders(pathlib.Path(data_dir), '--data_dir')
  rows, skipped = read_checked_rows(source, gif, max_corrupt_fraction, allow_outside)
  root = source if source.is_dir() else source.parent
  splits = split_rows(rows, test_fraction, root)
  columns, classes = _find_columns(rows)
  arrays = _label_arrays(splits, columns, classes)
  num_splits = collections.Counter(g for members in splits.values() for g in {group_of(row, root) for row in members})
  with npz_records.atomic_folder(folder) as unfinished:
    fingerprints = _write_shards(unfinished, name, version, splits, columns, classes)
    summary = {'format': FORMAT, 'name': name, 'version': version, 'fingerprints': fingerprints,
               'groups_in_several_splits': sum(n > 1 for n in num_splits.values()),
               **summarize(splits, columns, classes, arrays, skipped, test_fraction)}
    np.savez_compressed(unfinished / LABELS, **arrays)
    (unfinished / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False))
  mirror.publish(data_dir, folder)
  return summary


def _find_columns(rows: list[Row]) -> tuple[dict[str, str], Classes]:
  """(column → 'image', 'video', 'texts', 'text' or 'class', class names).

  Classes are the values of 'label' and of every field whose values occur at least twice on average.
  """
  columns, classes = {row.media_type: row.media_type for row in rows if row.media_type}, {}
  values: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for row in rows:
    columns |= {name: 'texts' if isinstance(v, tuple) else 'text' for name, v in row.texts.items()}
    for name, value in row.labels.items():
      values[name][value] += 1
  for name, counts in values.items():
    columns[name] = 'text'
    if name == 'label' or len(counts) <= min(_MAX_CLASSES, counts.total() / 2):
      is_numeric = all(re.fullmatch(r'-?\d+', v) for v in counts)
      columns[name] = 'class'
      classes[name] = tuple(sorted(counts, key=(lambda v: (int(v), v)) if is_numeric else None))
  return dict(sorted(columns.items())), classes


def _value(row: Row, column: str, column_type: str) -> int | str | list[str]:
  """The value of a class or of texts, as TFDS encodes it; -1 for no class."""
  if column_type == 'class':
    return row.labels.get(column, -1)
  text = row.texts.get(column) or row.labels.get(column)
  return list(text or ()) if column_type == 'texts' else text or ''


def _label_arrays(splits: Splits, columns: dict[str, str], classes: Classes) -> dict[str, np.ndarray]:
  """The content of labels.npz."""
  arrays = {}
  for column, column_type in columns.items():
    index = {name: i for i, name in enumerate(classes.get(column, ()))}
    for split, rows in splits.items() if column_type not in MEDIA_TYPES else ():
      values = [_value(row, column, column_type) for row in rows]
      arrays[f'{split}/{column}'] = (
          np.array([index.get(v, -1) for v in values], np.int32) if column_type == 'class' else
          np.array([bool(v) for v in values]))
  return arrays


def _write_shards(folder: pathlib.Path, name: str, version: str, splits: Splits, columns: dict[str, str],
                  classes: Classes) -> dict[str, str]:
  """Writes shards and metadata; returns a hex sha256 of the content of each split."""
  import tensorflow_datasets as tfds
  tfds.disable_progress_bar()
  features = tfds.features
  make = {'image': features.Image, 'video': lambda: features.Scalar(np.object_), 'text': features.Text,
          'texts': lambda: features.Sequence(features.Text())}
  features_dict = features.FeaturesDict({
      column: features.ClassLabel(names=list(classes[column])) if column_type == 'class' else make[column_type]()
      for column, column_type in {**columns, LOCATION: 'text'}.items()})
  digests = {split: hashlib.sha256() for split in splits}
  with tempfile.TemporaryDirectory(dir=folder) as unfinished:
    with contextlib.ExitStack() as quiet:  # no messages of TFDS about downloads and temporary folders
      quiet.callback(logging.set_verbosity, logging.get_verbosity())
      logging.set_verbosity(logging.ERROR)
      quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
      tfds.dataset_builders.store_as_tfds_dataset(
          name, version, features_dict, {s: _examples(rows, columns, digests[s]) for s, rows in splits.items()},
          data_dir=unfinished, description='Prepared by uni_moe_jax.', file_format='array_record',
          disable_shuffling=True)
    for path in pathlib.Path(unfinished, name, version).iterdir():
      path.rename(folder / path.name)
  return {split: digest.hexdigest() for split, digest in digests.items()}


def _examples(rows: list[Row], columns: dict[str, str], digest) -> Iterator[tuple[int, dict]]:
  """Yields TFDS examples, and updates `digest` with the content of every column."""
  arrays = NpzReader()
  for i, row in enumerate(rows):
    example = {LOCATION: row.location}
    for column, column_type in columns.items():
      if column_type in MEDIA_TYPES:
        is_plain_file = not row.note and row.array_index is None
        content = row.path.read_bytes() if is_plain_file else open_media(row, arrays).data
        example[column] = io.BytesIO(content) if column_type == 'image' else content
      else:
        example[column] = _value(row, column, column_type)
        content = repr(example[column]).encode()
      digest.update(hashlib.sha256(content).digest())
    yield i, example
