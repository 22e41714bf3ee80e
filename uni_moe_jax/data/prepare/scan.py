"""The first half of preparation: one pure function per shard of the input, which reads every file once.

It writes a folder in which each row has a record of fixed size with what decides about it, and its content. What only
other shards can decide (duplicates, splits, classes) is left to `merge`.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from uni_moe_jax.data.formats import input_shards, media
from uni_moe_jax.data.formats import rows as formats
from uni_moe_jax.data.formats.archives import open_binary
from uni_moe_jax.data.formats.input_shards import InputShard
from uni_moe_jax.data.formats.rows import Row
from uni_moe_jax.data.prepare import columns
from uni_moe_jax.data.shards.writer import FACTS as MANIFEST
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import atomic_folder

SPLITS = ('train', 'validation', 'test')
MAX_CLASSES = 10_000  # of a field; a field of more values is text
MAX_LOCATIONS = 5  # per reason
_ROWS, _LABELS, _CONTENT = 'rows.npy', 'labels.npy', 'content'
_RULES = 4  # raised when the same input becomes other rows: scans that an older version left are made again
# Digests of 64 bits: of a billion rows, with a probability of 3 %, two are taken for equal that are not.
RECORD = np.dtype([
    ('key', 'u8'),  # equal for duplicates
    ('content', 'u8'),  # of its image or video, or of its text if it is labeled; 0: is not compared
    ('identity', 'u8'),  # of content, texts and labels
    ('group', 'u8'),  # rows of one group belong to the same split
    ('bytes', 'i8'),  # of what is written about the row
    ('size', 'i4', 3),  # see `media.Media`
    ('captions', 'i4'),  # their number; -1: no field of them
    ('text_bytes', 'i4'),  # of the longest caption, or of the text columns together; -1: neither
    ('signature', 'i4'), ('reason', 'i4'), ('note', 'i4'),  # codes: indices of the words in the manifest
    ('split', 'i1'),  # index, as the data names it; -1: not
    ('has_key', '?')])
WORDS = ('signature', 'reason', 'note')


class Codes(dict):
  """Word → its index, in the order in which they occur."""

  def __missing__(self, word: str) -> int:
    self[word] = len(self)
    return self[word]


def new_words() -> dict[str, Codes]:
  """Codes of `WORDS`; 0 is no reason, and no note."""
  return {name: Codes() if name == 'signature' else Codes({'': 0}) for name in WORDS}


@dataclasses.dataclass(frozen=True)
class Scan:
  """The reading and checking of one shard.

  Attributes:
    folder: that gets a folder `name` for the shard.
    gif, allow_outside: see `input_shards.read`.
  """
  shard: InputShard
  folder: str
  gif: str
  allow_outside: bool

  @property
  def name(self) -> str:
    return self.shard.name(self.gif, self.allow_outside, _RULES)

  def __call__(self) -> int:
    """Returns the number of rows."""
    rows = input_shards.read(self.shard, self.gif, self.allow_outside)
    with atomic_folder(storage.path(self.folder) / self.name) as folder:
      return _scan(rows, self.shard.root, folder)


def _scan(rows: Iterable[Row], root: str, folder: pathlib.Path) -> int:
  records, words = [], new_words()
  values: dict[str, Codes] = collections.defaultdict(Codes)  # of fields
  codes: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)  # field → (row, code)
  skipped: dict[str, list[Any]] = {}  # reason → [count, first locations]
  num_skipped = 0
  with open(folder / _CONTENT, 'wb') as file, warnings.catch_warnings():
    warnings.filterwarnings('ignore', module='PIL')  # damaged images are counted, not printed
    for row in rows:
      if row.skipped:
        count_skipped(skipped, row.skipped, 1, [row.location])
        num_skipped += 1
        continue
      reason, content = '', media.Media(b'', ())
      if row.media_type:
        try:
          content = media.check(row.media_type, media.read_bytes(row.path) if row.data is None else row.data)
        except media.CorruptFile as e:
          reason = str(e)
      for name, value in row.labels.items():
        codes[name].append((len(records), values[name][value]))
      header = {'location': row.location, 'texts': row.texts, 'labels': row.labels}
      size = file.write(json.dumps(header, ensure_ascii=False).encode() + b'\n')
      size += file.write(content.data)
      digest = _compared(row, content)
      records.append((
          _key(row), digest, identity(digest, row.texts, row.labels), digest_of(group_of(row, root)), size,
          (*content.size, 0, 0, 0)[:3], len(row.texts['captions']) if 'captions' in row.texts else -1,
          _text_bytes(row.texts), words['signature'][signature(row)], words['reason'][reason],
          words['note'][content.note], SPLITS.index(row.split) if row.split else -1, bool(row.key)))
  columns.save(folder / _ROWS, np.array(records, RECORD))
  labels = np.full((len(codes), len(records)), -1, np.int32)
  for column, pairs in zip(labels, codes.values()):
    column[[i for i, _ in pairs]] = [code for _, code in pairs]
  columns.save(folder / _LABELS, labels)
  (folder / MANIFEST).write_text(json.dumps({
      **{name: list(words[name]) for name in WORDS}, 'skipped': skipped,
      'labels': {name: list(known) if len(known) <= MAX_CLASSES or name == 'label' else None
                 for name, known in values.items()}}))
  return len(records) + num_skipped


def count_skipped(skipped: dict[str, list[Any]], reason: str, number: int, locations: list[str]) -> None:
  """Adds rows to {reason: [count, first locations]}."""
  entry = skipped.setdefault(reason, [0, []])
  entry[0] += number
  entry[1] += locations[:MAX_LOCATIONS - len(entry[1])]


def digest_of(content: Any) -> int:
  """64 bits of the sha256 of a string; of others, of their representation."""
  text = content if isinstance(content, str) else repr(content)
  return int.from_bytes(hashlib.sha256(text.encode(errors='backslashreplace')).digest()[:8])


def _key(row: Row) -> int:
  """Is equal for duplicates: rows of one key, or without one, of the same file, texts, labels and split."""
  if row.key or row.data is not None:  # what is in an archive is compared by its content only
    return digest_of(('key', row.key) if row.key else row.location)
  # Of several splits, the last one keeps its row (see `merge`), which finds it by its content, if that is compared.
  split = row.split or SPLITS[0] if row.media_type or row.labels else ''
  return digest_of((row.media_type, str(row.path), split, *sorted(row.texts.items()), *sorted(row.labels.items())))


def _compared(row: Row, content: media.Media) -> int:
  if row.media_type:
    return int.from_bytes(content.digest[:8])
  text = [row.texts.get(name) for name in formats.TEXT_FIELDS]
  # Running text may repeat itself.
  return digest_of(text if any(text) else sorted(row.texts.items())) if row.labels else 0


def _text_bytes(texts: Mapping[str, Any]) -> int:
  read = [*texts.get('captions', ()), ''.join(texts[name] for name in formats.TEXT_FIELDS if texts.get(name))]
  return max(len(text.encode()) for text in read) or -1


def identity(content: int, texts: Mapping[str, Any], labels: Mapping[str, str]) -> int:
  """Is equal for rows that differ in the names of their files only."""
  return digest_of((content, sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in texts.items()),
                    sorted(labels.items())))


def group_of(row: Row, root: str) -> str:
  """Name of what must stay in one split: the row's group, else its file, which rows may share, else the row."""
  # The whole path below the input: many folders may contain an 'image.png'. The suffix is part of the hash that
  # chooses a split.
  file = row.path and f'{_relative(str(row.path), root)}#None'
  return row.group or file or row.key or row.location


def _relative(path: str, root: str) -> str:
  is_plain = path.startswith(f'{root}/') and '..' not in path
  return path[len(root) + 1:] if is_plain else os.path.relpath(path, root)


def signature(row: Row) -> str:
  """What is compared with other rows: media type, fields and their types, and fields that cannot be columns."""
  is_list = {name: isinstance(value, tuple) for name, value in {**row.texts, **row.labels}.items()}
  return json.dumps([row.media_type, sorted(is_list.items()), row.dropped_fields])


class ScannedShard:
  """The folder of a shard."""

  def __init__(self, folder: storage.Path):
    self._folder = folder

  def manifest(self) -> dict[str, Any]:
    """Words by code, skipped rows and labels; to be forgotten, since all together they grow with the number of rows."""
    return json.loads((self._folder / MANIFEST).read_text())

  def records(self) -> np.ndarray:
    """`RECORD` [n], one per row that was not skipped."""
    return self._load(_ROWS)

  def labels(self) -> dict[str, tuple[list[str] | None, np.ndarray]]:
    """Field → (values, None for too many; codes int32 [n], -1 for none)."""
    labels = self.manifest()['labels']
    return dict(zip(labels, zip(labels.values(), self._load(_LABELS))))

  def _load(self, name: str) -> np.ndarray:
    with (self._folder / name).open('rb') as file:
      return np.load(file)

  def contents(self, sizes: np.ndarray, indices: np.ndarray) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields (location, texts and labels; stored image or video) of some rows; sizes: `bytes` of all."""
    ends = np.cumsum(sizes)
    with open_binary(str(self._folder / _CONTENT)) as file:
      for i in indices.tolist():
        file.seek(int(ends[i] - sizes[i]))
        header, _, data = file.read(int(sizes[i])).partition(b'\n')
        yield json.loads(header), data
