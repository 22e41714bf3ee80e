"""Datasets in files, read record by record: the embedded data, a user's own prepared data, and TFDS datasets.

A source is named as one of `EMBEDDED`, 'own:NAME' (`uni-moe prepare-data --name=NAME`; the newest version, or
'own:NAME/1.0.0') or 'tfds:NAME[/CONFIG][:VERSION]' (`uni-moe prepare-data --tfds=…`). The columns of a TFDS dataset are
its features: images, strings, lists of strings and class labels, nested names joined by '/'; a split is any that TFDS
can read by index, such as 'train+restval'.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.data.formats.rows import LOCATION
from uni_moe_jax.data.shards import mirror, writer
from uni_moe_jax.data.shards.record_files import Shards
from uni_moe_jax.data.shards.record_format import (
  EMBEDDED,
  EMBEDDED_FOLDER,
  FORMAT,
  OWN_FOLDER,
  PIXEL_TYPES,
  SUMMARY,
  TEXT_TYPES,
  TEXTS,
  VERSIONS,
  CorruptExample,
  Record,
  example_parser,
  serialize,
)
from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import MissingFileError, RunError, UsageError
from uni_moe_jax.utils.suggest import nearest

OWN, TFDS = 'own:', 'tfds:'
_COMMAND = 'uni-moe prepare-data --data_dir='
_PREPARE_AGAIN = ('prepare the data again: uni-moe prepare-data, for your own data with --input=… --name=… '
                  '--version=…; remove the folder before if it has embedded data')
_NUM_PROBES = 8  # records that are tried before a source counts as unreachable
_MAX_KEPT = 2**28  # bytes of a split whose records stay in memory
_CHUNK = 256  # records in memory at once while the texts of a whole split are read

@dataclasses.dataclass(frozen=True)
class FileDataset:
  """Records of one split, read by index.

  The value of a column is the bytes of an image or video, an array uint8 [T, H, W, C], a string, a tuple of strings, or
  the name of a class, '' for none. Of TFDS datasets, labels and the number of texts are not known before a record is
  read.
  """
  name: str  # of the source
  size: int  # N
  read: Callable[[np.ndarray], list[Record]]  # ids int [n] → n records
  columns: dict[str, str]  # name → type, see `record_format`
  classes: dict[str, tuple[str, ...]]  # class column → names in order
  labels: dict[str, np.ndarray]  # class column → int32 [N], -1 for none
  fingerprint: str  # hex sha256 of the content
  shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # array column → (T, H, W, C)
  num_texts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # column of texts → int32 [N]
  files: Sequence[str] = ()  # of the records, in a mirror
  prefetch: Callable[[np.ndarray], None] | None = None  # ids in the order in which they will be read
  read_examples: Callable[[np.ndarray], list[bytes]] | None = None  # as `read`: serialized tf.train.Examples
  text_file: Callable[[str], pathlib.Path] | None = None  # column → file with the texts of all records, a line each
  cache: pathlib.Path | None = None  # folder for what is made of the data

  def media_column(self) -> str | None:
    """The column of images, videos or arrays."""
    return next((c for c, column_type in self.columns.items() if column_type in PIXEL_TYPES), None)

  @property
  def media_type(self) -> str:
    """'image', 'video', or '' for neither; an array of several frames is a video."""
    column = self.media_column() or ''
    column_type = self.columns.get(column, '')
    return column_type if column_type != 'array' else 'image' if self.shapes[column][0] == 1 else 'video'

  def read_valid(
      self, ids: np.ndarray, read: Callable[[np.ndarray], list[Any]] | None = None) -> list[Any | CorruptExample]:
    """Reads records; one that cannot be read is the reason. Raises RunError if no record of the source can be read.

    read: `read` (the default) or `read_examples`.
    """
    read = read or self.read
    try:
      return read(ids)
    except RunError:
      raise
    except Exception as e:  # array_record and protobuf document no closed set of errors for damaged files
      records = [self._read_one(i, read) for i in ids]
      probes = (self._read_one(i) for i in _evenly_spaced(self.size, _NUM_PROBES))
      if all(isinstance(record, CorruptExample) for record in itertools.chain(records, probes)):
        raise RunError(
            f'source {self.name!r} cannot be read ({e}). Check that its data directory exists and that its disk '
            'can be reached; then run the same command to continue.') from e
      return records

  def map(self, function: Callable[[Record], Any], ids: np.ndarray) -> list[Any]:
    """Applies a function to records. Raises RunError with the first one that cannot be read."""
    results = []
    for i, record in self.read_chunks(ids):
      if isinstance(record, CorruptExample):
        raise RunError(f'{self.location(int(i))}: {record}. Prepare source {self.name!r} again.')
      results.append(function(record))
    return results

  def read_chunks(self, ids: np.ndarray) -> Iterator[tuple[int, Record | CorruptExample]]:
    """Yields ids and records chunk by chunk: the images of a whole split do not fit into memory."""
    for start in range(0, len(ids), _CHUNK):
      chunk = ids[start:start + _CHUNK]
      yield from zip(chunk, self.read_valid(chunk), strict=True)

  def _read_one(self, index: int, read: Callable[[np.ndarray], list[Any]] | None = None) -> Any | CorruptExample:
    try:
      return (read or self.read)(np.array([index]))[0]
    except CorruptExample as e:
      return e
    except RunError:
      raise
    except Exception as e:
      return CorruptExample(f'a record that cannot be read ({e})')

  def location(self, index: int) -> str:
    """The file or line that a record was prepared from, or its index, for messages."""
    record = None
    if LOCATION in self.columns:
      with contextlib.suppress(RunError):
        record = self._read_one(index)
    return record[LOCATION] if isinstance(record, dict) else f'{self.name}, record {index}'

  def sample_texts(self, columns: Iterable[str], max_records: int) -> list[str]:
    """Class names of some columns, and their texts in up to `max_records` evenly spaced records."""
    columns, ids = set(columns) & self.columns.keys() - {LOCATION}, _evenly_spaced(self.size, max_records)
    texts = [name for column in columns for name in self.classes.get(column, ())]
    columns = [column for column in columns if self.columns[column] in TEXT_TYPES]
    if self.text_file and self.media_column():  # a record may have a video
      is_sampled = np.zeros(self.size, bool)
      is_sampled[ids] = True
      for column in columns:
        with open(self.text_file(column), encoding='utf-8', newline='\n') as file:
          lines = itertools.compress(file, np.repeat(is_sampled, self.num_texts[column]))
          texts += [line.removesuffix('\n') for line in lines]
    elif columns:
      for _, record in self.read_chunks(ids):
        for column in columns if not isinstance(record, CorruptExample) else ():
          texts += [record[column]] if self.columns[column] == 'text' else record[column]
    return texts


def _evenly_spaced(size: int, number: int) -> np.ndarray:
  return np.unique(np.linspace(0, size - 1, min(number, size)).astype(np.int64))


def load(source: str, directory: str | os.PathLike[str], split: str) -> FileDataset:
  """Opens one split of a source in a data directory.

  Raises:
    MissingFileError: the source is not prepared; gives the command. UsageError: it is unknown, has no such split, or is
      damaged.
  """
  if source.startswith(TFDS):
    return _load_tfds(source, directory, split)
  if source.startswith(OWN):
    mirror.sync(directory, f'{OWN_FOLDER}/{source.removeprefix(OWN).partition("/")[0]}')
    return _load_prepared(source, own_folder(source.removeprefix(OWN), directory), directory, split)
  if source not in EMBEDDED:
    raise UsageError(f"source {source!r} is unknown; {nearest(source, EMBEDDED)}. Your own prepared data is "
                     f"'{OWN}NAME', a TFDS dataset '{TFDS}NAME'.")
  mirror.sync(directory, f'{EMBEDDED_FOLDER}/{source}')
  folder = storage.path(directory) / embedded_folder(source)
  if not folder.is_dir():
    raise MissingFileError(f'No prepared data {source!r} in {directory}. Run: {_COMMAND}{directory}')
  return _load_prepared(source, folder, directory, split)


def in_memory(name: str, columns: writer.Columns, classes: Mapping[str, tuple[str, ...]]) -> FileDataset:
  """A dataset of columns in memory, see `writer.layout_of`."""
  layout = writer.layout_of(columns, classes)
  rows = list(writer.rows(columns, layout))
  examples = list(map(serialize, rows))
  read = lambda ids: [examples[i] for i in np.asarray(ids).tolist()]
  of_type = lambda *types: [c for c, column_type in layout.columns.items() if column_type in types]
  return FileDataset(
      name, len(rows), _record_reader(read, layout.columns, layout.classes, layout.shapes), layout.columns,
      layout.classes, {c: np.array([row[c] for row in rows], np.int32) for c in of_type('class')}, 'in memory',
      layout.shapes, {c: (columns[c] != '').astype(np.int32) for c in of_type('text')}, read_examples=read)


def embedded_folder(name: str) -> str:
  """The folder of an embedded dataset, relative to the data directory."""
  return f'{EMBEDDED_FOLDER}/{name}/{EMBEDDED[name]}'


def check_directory(directory: str | os.PathLike[str]) -> None:
  """Raises MissingFileError unless the data directory exists, or is in a bucket."""
  if not storage.is_remote(directory) and not storage.path(directory).is_dir():
    raise MissingFileError(f'Data directory {directory} does not exist. Run: {_COMMAND}{directory}')


def own_folder(name: str, directory: str | os.PathLike[str]) -> storage.Path:
  """The folder of the newest version of own data, or of the named one ('pets/1.0.0'). Raises MissingFileError."""
  root, (base, _, version) = storage.path(directory) / OWN_FOLDER, name.partition('/')
  folders = (p.parent for p in (root / base).glob(f'*/{SUMMARY}'))
  folders = sorted((p for p in folders if VERSIONS.fullmatch(p.name)),  # others are copies of a user, say
                   key=lambda p: tuple(map(int, p.name.split('.'))))
  matches = [p for p in folders if not version or p.name == version]
  if not matches:
    choices = [f'{base}/{p.name}' for p in folders] or [p.name for p in root.glob('*')]
    raise MissingFileError(
        f'source {OWN}{name} is not in {root}; {nearest(name, choices)}. '
        f'Prepare it: uni-moe prepare-data --input=FOLDER --name={base} --data_dir={directory}')
  return matches[-1]


def read_summary(folder: storage.Path) -> dict[str, Any]:
  """The content of prepared.json in an `own_folder`. Raises UsageError if it is damaged or of another format."""
  path = folder / SUMMARY
  try:
    summary = json.loads(path.read_text())
  except (ValueError, RecursionError) as e:
    raise UsageError(f'{path} is damaged ({e}); {_PREPARE_AGAIN}') from None
  if summary.get('format') != FORMAT:
    raise UsageError(f'{path} has format {summary.get("format")}, not {FORMAT}; {_PREPARE_AGAIN}')
  return summary


def _load_prepared(source: str, folder: storage.Path, directory: str | os.PathLike[str], split: str) -> FileDataset:
  summary = read_summary(folder)
  if split not in summary['splits']:
    raise UsageError(f'split {split!r} is not in source {source!r}; {nearest(split, summary["splits"])}.')
  classes = {column: tuple(c['names']) for column, c in summary['classes'].items()}
  shapes = {column: tuple(shape) for column, shape in summary.get('shapes', {}).items()}
  arrays = {c: _load_array(mirror.local(directory, folder / f'{split}-{c}.npy'))
            for c, t in summary['columns'].items() if t not in PIXEL_TYPES}
  labels, num_texts = ({c: a for c, a in arrays.items() if (c in classes) == is_class} for is_class in (True, False))
  text_file = lambda column: mirror.local(directory, folder / f'{split}-{column}{TEXTS}')
  columns = {**summary['columns'], LOCATION: 'text'}
  shards, read = _open(_builder(str(folder)), directory, split)
  return FileDataset(source, summary['splits'][split], _record_reader(read, columns, classes, shapes), columns, classes,
                     labels, summary['fingerprints'][split], shapes, num_texts, shards.names,
                     shards.prefetch if shards.names else None, read, text_file,
                     pathlib.Path(os.path.expanduser(directory)))


def _load_array(path: storage.Path) -> np.ndarray:
  """An array that stays in its file."""
  try:
    return np.load(path, mmap_mode='r')
  except (OSError, ValueError, EOFError) as e:
    raise UsageError(f'{path} cannot be read ({e}); {_PREPARE_AGAIN}') from e


@functools.lru_cache(maxsize=64)
def _builder(folder: str):
  import tensorflow_datasets as tfds
  return tfds.builder_from_directory(folder)


def tfds_builder(source: str, directory: str | os.PathLike[str]):
  """The TFDS builder of 'tfds:…', for array records in `directory`/tfds. Raises UsageError."""
  import tensorflow_datasets as tfds
  name = source.removeprefix(TFDS)
  with contextlib.suppress(MissingFileError):  # which is reported with the name of the source, if it must be there
    mirror.sync(directory, f'tfds/{re.match("[^/:]*", name)[0]}')
  # Of data that is not prepared it looks for splits elsewhere, and leaves a temporary folder; there is no option.
  tfds.core.DatasetInfo.initialize_from_bucket = lambda _: None
  try:
    return tfds.builder(name, data_dir=os.path.join(os.path.expanduser(directory), 'tfds'), file_format='array_record')
  except tfds.core.registered.DatasetNotFoundError:
    raise UsageError(f'source {source!r}: {nearest(name, tfds.list_builders())}.') from None


def _load_tfds(source: str, directory: str | os.PathLike[str], split: str) -> FileDataset:
  builder = tfds_builder(source, directory)
  _check_prepared(builder, source, directory, split)
  columns, classes = tfds_columns(builder.info.features)
  shards, read = _open(builder, directory, split)
  # Name and version of a TFDS dataset identify its content.
  fingerprint = hashlib.sha256(f'{builder.info.full_name} {split} {len(shards)}'.encode()).hexdigest()
  return FileDataset(source, len(shards), _record_reader(read, columns, classes, {}), columns, classes, {}, fingerprint,
                     files=shards.names, prefetch=shards.prefetch if shards.names else None, read_examples=read)


def _check_prepared(builder, source: str, directory: str | os.PathLike[str], split: str) -> None:
  if not builder.info.splits:
    raise MissingFileError(f'source {source!r} is not in {builder.data_dir}; prepare it: uni-moe prepare-data '
                           f'--tfds={source.removeprefix(TFDS)} --data_dir={directory}')
  if missing := [part for part in split.split('+') if part.partition('[')[0] not in builder.info.splits]:
    raise UsageError(f'split {split!r} of source {source!r}: {nearest(missing[0], builder.info.splits)}.')


def tfds_columns(features: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
  """(column → type of every usable column, class column → names) of a TFDS dataset's features."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.utils import dtype_utils
  f, columns, classes = tfds.features, {}, {}

  def add(name, feature, in_sequence):
    if isinstance(feature, f.Image) and not in_sequence:
      columns[name] = 'image'
    elif isinstance(feature, f.ClassLabel) and not in_sequence:
      columns[name], classes[name] = 'class', tuple(feature.names or map(str, range(feature.num_classes)))
    elif isinstance(feature, f.Tensor) and feature.shape == () and dtype_utils.is_string(feature.np_dtype):
      columns[name] = 'texts' if in_sequence else 'text'
    elif isinstance(feature, f.Sequence) and not in_sequence:
      add(name, feature.feature, True)
    elif isinstance(feature, f.FeaturesDict):
      for key, sub_feature in feature.items():
        add(f'{name}/{key}' if name else key, sub_feature, in_sequence)

  add('', features, False)
  return columns, classes


def _open(builder, directory: str | os.PathLike[str], split: str):
  """(files, `FileDataset.read_examples`) of a split."""
  info = builder.info.splits[split]
  shards = Shards(directory, info.file_instructions)
  # Its size is 0 if it is not known.
  read = keep_records(shards.__getitems__) if 0 < info.num_bytes <= _MAX_KEPT else shards.__getitems__
  return shards, read


def keep_records(read: Callable[[np.ndarray], list[bytes]]) -> Callable[[np.ndarray], list[bytes]]:
  """`FileDataset.read_examples` that reads every record once.

  array_record holds Python's lock for 3 µs a record, of the 20 µs that a small image takes.
  """
  kept: dict[int, bytes] = {}

  def read_kept(ids):
    ids = ids.tolist()
    if missing := [i for i in ids if i not in kept]:
      kept.update(zip(missing, read(np.array(missing)), strict=True))
    return [kept[i] for i in ids]
  return read_kept


def _record_reader(
    read_examples: Callable[[np.ndarray], list[bytes]], columns: dict[str, str], classes: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]]) -> Callable[[np.ndarray], list[Record]]:
  """`FileDataset.read` of serialized examples."""
  parse = example_parser(columns, classes, shapes)
  return lambda ids: list(map(parse, read_examples(ids)))
