"""Writes a dataset: files of array records, arrays of labels and texts beside them, and a description of all."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from uni_moe_jax.data.formats.rows import LOCATION
from uni_moe_jax.data.shards import mirror
from uni_moe_jax.data.shards.record_format import FORMAT, PIXEL_TYPES, SUMMARY, TEXT_TYPES, TEXTS, serialize
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import atomic_folder, check_renames_folders
from uni_moe_jax.utils.errors import UsageError

_MODULUS = 2**256  # of fingerprints, which are sums over examples, so that files are hashed independently
FACTS = 'manifest.json'  # beside the arrays of a file of records; written last

Columns = dict[str, np.ndarray]  # uint8 [N, H, W] or [N, T, H, W], in shades of gray; unicode [N]
Split = tuple[str, Columns, Mapping[str, tuple[str, ...]]]  # its name, columns, and class names of label columns


@dataclasses.dataclass(frozen=True)
class Layout:
  """The columns of a dataset: their types, the names of classes in order, and shapes of arrays [T, H, W, C]."""
  columns: Mapping[str, str]
  classes: Mapping[str, tuple[str, ...]]
  shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RecordFile:
  """A file of records that is written. folder: with its arrays. facts: size, bytes and fingerprint."""
  name: str
  split: str
  folder: storage.Path
  facts: Mapping[str, Any]


def file_name(name: str, split: str, number: int, total: int) -> str:
  """The name of one of the `total` record files of a split."""
  return str(_template(name, split).relative_filepath(shard_index=number, num_shards=total))


def _template(name: str, split: str | None = None, folder: str | os.PathLike[str] = '') -> Any:
  """How TFDS names record files."""
  import tensorflow_datasets as tfds
  return tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record')


def write_records(path: str, folder: pathlib.Path, layout: Layout, examples: Iterable[tuple[dict[str, Any], str]],
                  start: int = 0) -> dict[str, Any]:
  """Writes a file of records, and its arrays and facts into a folder; returns the facts.

  Args:
    path: of the new file.
    folder: that exists.
    examples: (value of each column, location). A class is its index, -1 for none; an array its bytes.
    start: number of the split's examples in the files before this one.
  """
  from array_record.python.array_record_module import ArrayRecordWriter
  arrays = {column: [] for column, column_type in layout.columns.items() if column_type not in PIXEL_TYPES}
  number, num_bytes, fingerprint = start, 0, 0
  with contextlib.ExitStack() as stack:
    texts = {column: stack.enter_context((folder / f'{column}{TEXTS}').open('w', encoding='utf-8', newline='\n'))
             for column, column_type in layout.columns.items() if column_type in TEXT_TYPES}
    writer = ArrayRecordWriter(path, 'group_size:1')
    for values, location in examples:
      for column, array in arrays.items():
        array.append(_write_lines(texts[column], values[column]) if column in texts else values[column])
      fingerprint = (fingerprint + _digest(number, values.values())) % _MODULUS
      writer.write(record := serialize({**values, LOCATION: location}))
      number, num_bytes = number + 1, num_bytes + len(record)
    writer.close()
  for column, array in arrays.items():
    with (folder / f'{column}.npy').open('wb') as file:
      _write_array(file, len(array), [array])
  facts = {'size': number - start, 'bytes': num_bytes, 'fingerprint': f'{fingerprint:064x}'}
  (folder / FACTS).write_text(json.dumps(facts))
  return facts


def _write_lines(file: TextIO, texts: str | list[str]) -> int:
  """Writes texts, none of which has a line break; returns their number."""
  lines = texts if isinstance(texts, list) else [texts] if texts else []
  file.writelines(f'{line}\n' for line in lines)
  return len(lines)


def _write_array(file: Any, size: int, parts: Iterable[Any]) -> None:
  """Writes parts of an array int32 [size] as .npy. NumPy itself may lose the end on a full disk, without an error."""
  np.lib.format.write_array_header_1_0(file, {'descr': '<i4', 'fortran_order': False, 'shape': (size,)})
  for part in parts:
    file.write(np.asarray(part, '<i4').tobytes())


def _digest(number: int, values: Iterable[Any]) -> int:
  digest = hashlib.sha256(number.to_bytes(8))
  for value in values:
    digest.update(hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).digest())
  return int.from_bytes(digest.digest())


def describe(folder: pathlib.Path, name: str, version: str, layout: Layout, files: Sequence[RecordFile],
             **statistics: Any) -> dict[str, Any]:
  """Writes the arrays of all splits, TFDS's metadata and prepared.json; returns the content of the latter.

  statistics: further fields of prepared.json. A field of `classes` is {column: {…}}, of which names are added here.
  """
  sizes: dict[str, int] = {}
  for file in files:
    sizes[file.split] = sizes.get(file.split, 0) + file.facts['size']
  for split, size in sizes.items():
    members = [f for f in files if f.split == split]
    for column, column_type in layout.columns.items():
      if column_type not in PIXEL_TYPES:
        with (folder / f'{split}-{column}.npy').open('wb') as out:
          _write_array(out, size, (_load(f.folder / f'{column}.npy') for f in members))
      if column_type in TEXT_TYPES:
        with (folder / f'{split}-{column}{TEXTS}').open('wb') as out:
          for f in members:
            with (f.folder / f'{column}{TEXTS}').open('rb') as part:
              shutil.copyfileobj(part, out)
  _write_metadata(folder, name, version, layout, files, sizes)
  # Of examples, which have indices of classes, and of what columns and classes are called.
  names_of = repr((sorted(layout.columns.items()), sorted(layout.classes.items())))
  sums = {split: sum(int(f.facts['fingerprint'], 16) for f in files if f.split == split) % _MODULUS for split in sizes}
  fingerprints = {split: hashlib.sha256(f'{x:064x}{names_of}'.encode()).hexdigest() for split, x in sums.items()}
  summary = {'format': FORMAT, 'name': name, 'version': version, 'fingerprints': fingerprints,
             'columns': layout.columns, 'splits': sizes, 'shapes': layout.shapes,
             'classes': {column: {'names': names} for column, names in layout.classes.items()}, **statistics}
  (folder / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False))
  return summary


def _load(path: storage.Path) -> np.ndarray:
  with path.open('rb') as file:
    return np.load(file)


def required(summary: Mapping[str, Any], files: Sequence[RecordFile]) -> list[str]:
  """The names of what loading reads."""
  names = [SUMMARY, *(f.name for f in files)]
  for column, column_type in summary['columns'].items():
    suffixes = () if column_type in PIXEL_TYPES else ('.npy', TEXTS) if column_type in TEXT_TYPES else ('.npy',)
    names += [f'{split}-{column}{suffix}' for split in summary['splits'] for suffix in suffixes]
  return names


def _write_metadata(folder: pathlib.Path, name: str, version: str, layout: Layout, files: Sequence[RecordFile],
                    sizes: Mapping[str, int]) -> None:
  """Writes what TFDS needs to read the files."""
  import tensorflow_datasets as tfds
  features = tfds.features
  make = {
      'image': lambda _: features.Image(), 'video': lambda _: features.Scalar(np.object_),
      'array': lambda column: features.Tensor(
          shape=layout.shapes[column], dtype=np.uint8, encoding=features.Encoding.BYTES),
      'text': lambda _: features.Text(), 'texts': lambda _: features.Sequence(features.Text()),
      'class': lambda column: features.ClassLabel(names=list(layout.classes[column]))}
  features_dict = features.FeaturesDict({
      column: make[column_type](column) for column, column_type in {**layout.columns, LOCATION: 'text'}.items()})
  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(name=name, version=tfds.core.Version(version), data_dir=str(folder),
                                        module_name=''),
      features=features_dict, description='Prepared by uni_moe_jax.', disable_shuffling=True)
  info.set_file_format('array_record')
  info.set_splits(tfds.core.splits.SplitDict([tfds.core.SplitInfo(
      name=split, shard_lengths=[f.facts['size'] for f in files if f.split == split],
      num_bytes=sum(f.facts['bytes'] for f in files if f.split == split),
      filename_template=_template(name, folder=folder)) for split in sizes]))
  info.write_to_directory(folder)


def layout_of(columns: Columns, classes: Mapping[str, tuple[str, ...]]) -> Layout:
  """The layout of columns in memory. Raises UsageError for one of another type or shape, or of another length."""
  types, shapes = {}, {}
  for name, column in columns.items():
    if column.dtype == np.uint8 and column.ndim in (3, 4) and not (column.ndim == 4 and column.shape[-1] in (1, 3)):
      types[name], shapes[name] = 'array', (*(1,) * (4 - column.ndim), *column.shape[1:], 1)
    elif column.dtype.kind == 'U' and column.ndim == 1:
      types[name] = 'class' if name in classes else 'text'
    else:
      raise UsageError(
          f'column {name!r} is {column.dtype} {list(column.shape)}; images are gray, uint8 [N, H, W], videos uint8 '
          '[N, T, H, W], and texts and labels unicode [N]. Convert it, or prepare files by `uni-moe prepare-data`.')
  if len(set(sizes := {name: len(column) for name, column in columns.items()}.values())) > 1:
    raise UsageError(f'columns must have the same length, got {dict(zip(columns, sizes))}.')
  return Layout(types, {name: tuple(names) for name, names in classes.items()}, shapes)


def rows(columns: Columns, layout: Layout) -> Iterable[dict[str, Any]]:
  """Values of `write_records` of each record of columns in memory. Raises UsageError for an unknown class."""
  values = []
  for name, column in columns.items():
    if layout.columns[name] == 'class':
      index = {label: i for i, label in enumerate(layout.classes[name])} | {'': -1}
      if unknown := sorted({*column.tolist()} - index.keys()):
        raise UsageError(f'column {name!r} has {unknown[0]!r}, which is none of its classes.')
      values.append([index[label] for label in column.tolist()])
    else:
      values.append(map(np.ndarray.tobytes, column) if layout.columns[name] == 'array' else column.tolist())
  return (dict(zip(columns, row)) for row in zip(*values, strict=True))


def write_dataset(root: str | os.PathLike[str], folder: str, splits: Callable[[], Iterable[Split]]) -> bool:
  """Writes splits, a file of records each, into `folder`, '…/NAME/VERSION', of a data directory.

  Returns whether it was not there; otherwise the splits are not made.
  """
  target = pathlib.Path(root) / folder
  name, version = target.parts[-2:]
  with mirror.preparing(root, target) as is_complete:
    if is_complete:
      return False
    check_renames_folders(pathlib.Path(root), '--data_dir')
    with atomic_folder(target) as temporary, tempfile.TemporaryDirectory(prefix='.', dir=target.parent) as parts:
      files = []
      for split, columns, classes in splits():
        layout = layout_of(columns, classes)
        (part := pathlib.Path(parts, split)).mkdir()
        examples = ((row, f'{name} {split} {i}') for i, row in enumerate(rows(columns, layout)))
        file = file_name(name, split, 0, 1)
        files.append(RecordFile(file, split, part, write_records(str(temporary / file), part, layout, examples)))
      summary = describe(temporary, name, version, layout, files)
    mirror.publish(root, target, target, required(summary, files))
  return True
