"""Records in files, read at random and never all at once: people's own prepared data, and TFDS data sets.

A source is named 'own:NAME' (`launch/prepare_data.py --name=NAME`; the newest version, or 'own:NAME/1.0.0') or
'tfds:NAME[/CONFIG][:VERSION]' (`launch/prepare_data.py --tfds=…`). Of a TFDS data set the columns are its features: pictures,
texts, lists of texts and class labels, flattened with '/'. A split may be any that TFDS can read at random, 'train+restval' too.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from uni_moe_jax.data.files import prepare
from uni_moe_jax.data.files.formats import WHERE
from uni_moe_jax.utils.errors import MissingFileError, RunError, UsageError
from uni_moe_jax.utils.suggest import nearest

OWN, TFDS = 'own:', 'tfds:'
MEDIA = ('image', 'video')  # kinds of columns whose values are bytes
_AGAIN = 'prepare the data again: python launch/prepare_data.py --input=… --name=… --version=…'
_PROBES = 8  # records that are tried before a source is held to be out of reach
_AT_ONCE = 256  # records that are in memory together where all of a split are asked for their texts


class CorruptExample(Exception):
  """A record that gives no example; says why."""


@dataclasses.dataclass(frozen=True)
class FileDataset:
  """Records of one split.

  Attributes:
    name: of the source. size: N.
    read: ids int [n] → n records: bytes of a picture or clip, str, a tuple of str, or the name of a class ('' for none).
    columns: name → 'image' | 'video' | 'text' | 'texts' | 'class'.
    classes: class column → its names in order.
    labels: class column → int32 [N], -1 for none; only of own data: elsewhere a label is known when its record is read.
    fingerprint: hex sha256 of what the records are.
    present: column of texts → bool [N], whether a record has one; of own data, as `labels`.
  """
  name: str
  size: int
  read: Callable[[np.ndarray], list[dict[str, Any]]]
  columns: dict[str, str]
  classes: dict[str, tuple[str, ...]]
  labels: dict[str, np.ndarray]
  fingerprint: str
  present: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def media(self) -> str | None:
    """The column of pictures or clips."""
    return next((c for c, kind in self.columns.items() if kind in MEDIA), None)

  def fetched(self, ids: np.ndarray) -> list[dict[str, Any] | CorruptExample]:
    """As `read`, but in the place of a record that cannot be read stands why.

    Raises:
      RunError: no record can be read, neither these nor others.
    """
    try:
      return self.read(ids)
    except Exception as e:  # array_record and TFDS document no closed set of what they raise of damaged files
      first = e
    found = [self._fetched_alone(i) for i in ids]
    if all(isinstance(row, CorruptExample) for row in found):
      probes = np.linspace(0, self.size - 1, min(_PROBES, self.size)).astype(np.int64)
      if all(isinstance(self._fetched_alone(i), CorruptExample) for i in probes):
        raise RunError(f'source {self.name!r} cannot be read ({first}). Look whether its data directory is there and its '
                               'disk can be reached; then the same command continues.') from first
    return found

  def each(self, ids: np.ndarray, take: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """`take(row)` of every record: with a text comes its picture, and those of a whole split do not fit into memory.

    Raises:
      RunError: names the first record that cannot be read.
    """
    out = []
    for i, row in self._in_parts(ids):
      if isinstance(row, CorruptExample):
        raise RunError(f'{self.where(int(i))}: {row}. Prepare source {self.name!r} again.')
      out.append(take(row))
    return out

  def _in_parts(self, ids: np.ndarray) -> Iterator[tuple[int, dict[str, Any] | CorruptExample]]:
    for start in range(0, len(ids), _AT_ONCE):
      part = ids[start:start + _AT_ONCE]
      yield from zip(part, self.fetched(part))

  def _fetched_alone(self, index: int) -> dict[str, Any] | CorruptExample:
    try:
      return self.read(np.array([index]))[0]
    except Exception as e:
      return CorruptExample(f'a record that cannot be read ({e})')

  def where(self, index: int) -> str:
    """Which record this is, for a person."""
    row = self._fetched_alone(index) if WHERE in self.columns else None
    return row[WHERE] if isinstance(row, dict) else f'{self.name}, record {index}'

  def sample_texts(self, most: int) -> list[str]:
    """Texts of up to `most` records, evenly spread; class names."""
    ids = np.unique(np.linspace(0, self.size - 1, min(most, self.size)).astype(np.int64))
    found = [name for names in self.classes.values() for name in names]
    for _, row in self._in_parts(ids):
      for column, kind in self.columns.items():
        if kind in ('text', 'texts') and column != WHERE and not isinstance(row, CorruptExample):
          found += [row[column]] if kind == 'text' else row[column]
    return found


def is_file_source(source: str) -> bool:
  """Whether a source's name is that of records in files."""
  return source.startswith((OWN, TFDS))


def load(source: str, directory: str | os.PathLike[str], split: str) -> FileDataset:
  """One split of a source in a data directory.

  Raises:
    MissingFileError: the source is not prepared there; says the command. UsageError: it has no such split.
  """
  if source.startswith(OWN):
    return _own(source, pathlib.Path(os.path.expanduser(directory)), split)
  return _tfds(source, directory, split)


def own_folder(name: str, directory: str | os.PathLike[str]) -> pathlib.Path:
  """The folder of the newest version of own data, or of the named one ('pets/1.0.0').

  Raises:
    MissingFileError: there is none.
  """
  root, (name, _, version) = pathlib.Path(os.path.expanduser(directory)) / prepare.FOLDER, name.partition('/')
  versions = sorted((p.parent for p in (root / name).glob(f'*/{prepare.SUMMARY}')),
                    key=lambda p: tuple(map(int, p.name.split('.'))))
  found = [p for p in versions if not version or p.name == version]
  if not found:
    known = [p.name for p in root.glob('*')] if not versions else [f'{name}/{p.name}' for p in versions]
    raise MissingFileError(f'source {OWN}{name}{"/" * bool(version)}{version} is not in {root}; {nearest(name, known)}. '
                            f'Prepare it: python launch/prepare_data.py --input=FOLDER --name={name} --data_dir={directory}')
  return found[-1]


def summary(name: str, directory: str | os.PathLike[str]) -> dict[str, Any]:
  """What prepared.json of own data says. Raises MissingFileError; UsageError where it is damaged."""
  path = own_folder(name, directory) / prepare.SUMMARY
  try:
    return json.loads(path.read_text())
  except (ValueError, RecursionError) as e:
    raise UsageError(f'{path} is damaged ({e}); {_AGAIN}') from None


@functools.lru_cache(maxsize=64)
def _builder(folder: str):
  import tensorflow_datasets as tfds
  return tfds.builder_from_directory(folder)


def _own(source: str, directory: pathlib.Path, split: str) -> FileDataset:
  name = source.removeprefix(OWN)
  folder, facts = own_folder(name, directory), summary(name, directory)
  if split not in facts['splits']:
    raise UsageError(f'split {split!r} is not in source {source!r}; {nearest(split, facts["splits"])}.')
  classes = {column: tuple(of['names']) for column, of in facts['classes'].items()}
  try:
    with np.load(folder / prepare.LABELS) as stored:
      labels = {column: stored[f'{split}/{column}'] for column in classes}
      present = {c: stored[f'{split}/{c}'] for c, kind in facts['columns'].items()
                 if kind in ('text', 'texts') and f'{split}/{c}' in stored}  # not of data that an earlier version prepared
  except Exception as e:  # numpy, zipfile and zlib document no closed set of what they raise of a damaged file
    raise UsageError(f'{folder / prepare.LABELS} cannot be read ({e}); {_AGAIN}') from e
  columns = {**facts['columns'], WHERE: 'text'}
  rows = functools.partial(_rows, _open(_builder(str(folder)), split, columns), columns, classes)
  return FileDataset(source, facts['splits'][split], rows, columns, classes, labels, facts['fingerprints'][split],
                present)


def tfds_builder(source: str, directory: str | os.PathLike[str]):
  """The TFDS builder of 'tfds:…', whose data lies or will lie in `directory`/tfds as array records. Raises UsageError."""
  import tensorflow_datasets as tfds
  name = source.removeprefix(TFDS)
  try:
    return tfds.builder(name, data_dir=os.path.join(os.path.expanduser(directory), 'tfds'), file_format='array_record')
  except tfds.core.registered.DatasetNotFoundError:
    raise UsageError(f'source {source!r}: {nearest(name, tfds.list_builders())}.') from None


def _tfds(source: str, directory: str | os.PathLike[str], split: str) -> FileDataset:
  builder = tfds_builder(source, directory)
  _check_prepared(builder, source, directory, split)
  columns, classes = tfds_columns(builder.info.features)
  reader = _open(builder, split, columns)
  # A name and version of TFDS stand for one content.
  described = f'{builder.info.full_name} {split} {len(reader)}'
  return FileDataset(source, len(reader), functools.partial(_rows, reader, columns, classes), columns, classes, {},
                hashlib.sha256(described.encode()).hexdigest())


def _check_prepared(builder, source: str, directory: str | os.PathLike[str], split: str) -> None:
  if not builder.info.splits:
    raise MissingFileError(f'source {source!r} is not in {builder.data_dir}; prepare it: python launch/prepare_data.py '
                            f'--tfds={source.removeprefix(TFDS)} --data_dir={directory}')
  if missing := [part for part in split.split('+') if part.partition('[')[0] not in builder.info.splits]:
    raise UsageError(f'split {split!r} of source {source!r}: {nearest(missing[0], builder.info.splits)}.')


def tfds_columns(features: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
  """(kind of every usable column, names of the class columns) of a TFDS data set's features."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.utils import dtype_utils
  f, columns, classes = tfds.features, {}, {}

  def put(name, feature, inside):
    if isinstance(feature, f.Image) and not inside:
      columns[name] = 'image'
    elif isinstance(feature, f.ClassLabel) and not inside:
      columns[name], classes[name] = 'class', tuple(feature.names or map(str, range(feature.num_classes)))
    elif isinstance(feature, f.Tensor) and feature.shape == () and dtype_utils.is_string(feature.np_dtype):
      columns[name] = 'texts' if inside else 'text'
    elif isinstance(feature, f.Sequence) and not inside:
      put(name, feature.feature, True)
    elif isinstance(feature, f.FeaturesDict):
      for key, sub in feature.items():
        put(f'{name}/{key}' if name else key, sub, inside)

  put('', features, False)
  return columns, classes


def _open(builder, split: str, columns: dict[str, str]):
  """Random access to examples whose pictures stay encoded."""
  import tensorflow_datasets as tfds
  raw = {c: tfds.decode.SkipDecoding() for c, kind in columns.items() if kind == 'image'}
  return builder.as_data_source(split, decoders=raw or None)


def _rows(reader, columns: dict[str, str], classes: dict[str, tuple[str, ...]], ids: np.ndarray) -> list[dict[str, Any]]:
  return [{c: _value(_get(example, c), kind, classes.get(c)) for c, kind in columns.items()}
          for example in reader.__getitems__(np.asarray(ids).tolist())]


def _get(example: Mapping[str, Any], column: str) -> Any:
  if column in example:
    return example[column]
  head, _, rest = column.partition('/')
  return _get(example[head], rest)


def _value(value: Any, kind: str, names: tuple[str, ...] | None) -> Any:
  if kind == 'class':
    return names[int(value)] if value >= 0 else ''
  if kind == 'texts':
    return tuple(_text(v) for v in value)
  return _text(value) if kind == 'text' else value


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
