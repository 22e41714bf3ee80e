"""The input in shards: parts that are read independently of each other, in the order of their rows.

  folder        images or videos [split/]class/file
  file.jsonl    an object per line, or a folder of such files
  file.csv      also .tsv: the columns that its first line names, with the fields of .jsonl
  file.parquet  the same as columns, images also as bytes; or a folder of such files
  file.tar      of WebDataset, or a folder of them, or a range of names: {00000..01242}.tar
  file.txt      a text per line, empty lines between documents; or a folder of such files

Tar and Parquet files may be in a bucket: whoever reads a shard opens them there.
"""

import codecs
import collections
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from uni_moe_jax.data.formats import archives
from uni_moe_jax.data.formats import rows as formats
from uni_moe_jax.data.formats.rows import MEDIA_SUFFIXES, SPLIT_NAMES, Row, one_line, printable
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import files_below
from uni_moe_jax.utils.errors import MissingFileError, UsageError, first_few

_NUM_ROWS = 2_000  # of a shard, where a file can be divided
_VIDEO_ROWS = 32  # as many rows take the time of a video, all of whose frames are decoded
_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
_ARCHIVES = ('.tar', '.parquet')
_TABLES = {'.csv': ',', '.tsv': '\t'}  # suffix → delimiter
_FILES = (('.jsonl',), *((suffix,) for suffix in _ARCHIVES), tuple(_TABLES), ('.txt',))  # the first ones scanned count
# Of a table, where a quote may lack the second one: characters of a field, and lines of a record.
_MAX_FIELD, _MAX_LINES = 2**24, 10_000
# Delimiter → number of lines from which on it is no coincidence that each of them could be a record.
_MIN_RECORDS = {',': 10, '\t': 2}
_SPLIT_PREFIX = re.compile('[A-Za-z]+(?=-|$)')  # of 'train-00000-of-00004'


@dataclasses.dataclass(frozen=True)
class InputShard:
  """A part of the input.

  Attributes:
    reader: key of `_READERS`.
    root: folder that locations and paths are relative to.
    file: its address. state: size and time of change, so that another content is another shard.
    start, stop: bytes of a file of lines; start of Parquet: the row group.
    line: number of the first line or row. document: number of documents before it.
    split: of rows that name none.
    columns: of a table. paths: below `root`, of a folder by class.
  """
  reader: str
  root: str
  file: str = ''
  state: tuple[float, ...] = ()
  start: int = 0
  stop: int = 0
  line: int = 1
  document: int = 0
  split: str = ''
  columns: tuple[str, ...] = ()
  paths: tuple[str, ...] = ()

  def name(self, *options: object) -> str:
    """Identifies the shard and the options that its rows depend on."""
    return hashlib.sha256(repr((self, options)).encode(errors='backslashreplace')).hexdigest()[:20]

  def location(self, what: object) -> str:
    """'file:what', relative to the input."""
    return printable(f'{os.path.basename(self.file)}:{what}')


def archives_of(source: storage.Path) -> list[storage.Path]:
  """Return the tar and Parquet files of an input, which are read where they are, also in a bucket."""
  return [file for file in _row_files(source) if file.suffix.lower() in _ARCHIVES]


def folder_of(source: storage.Path) -> storage.Path:
  """Return what exists of an address: a range of names stands for files of its folder."""
  return source.parent if _RANGE.search(source.name) else source


def plan(source: storage.Path) -> Iterator[InputShard]:
  """Yields the shards of an input, in order.

  Raises:
    MissingFileError: it does not exist. UsageError: it contains no known format.
  """
  files = _row_files(source)
  empty = True
  if files:
    shards = itertools.chain.from_iterable(map(_divide, files))
  elif storage.is_remote(source) or source.is_file():
    raise UsageError(f'--input={source}: a file must end in {", ".join(itertools.chain(*_FILES))}.')
  else:
    shards = _class_folders(source)
  for shard in shards:
    empty = False
    yield shard
  if empty and not files:
    raise UsageError(f'--input={source} has no file of rows ({", ".join(itertools.chain(*_FILES))}) and no folder of '
                     f'images or videos per class ({", ".join(sorted(MEDIA_SUFFIXES))}).')


def read(shard: InputShard, gif: str = 'image', allow_outside: bool = False) -> Iterator[Row]:
  """Yields the rows of a shard.

  Args:
    gif: media type of .gif files in a folder by class: 'image' (the first frame) or 'video'.
    allow_outside: whether a row may name a file that is not below its folder, also through a link.
  """
  if shard.reader == 'folder':
    root = pathlib.Path(shard.root)
    return (formats.class_folder_row(root, pathlib.PurePath(path), gif) for path in shard.paths)
  return _READERS[shard.reader](shard, allow_outside)


def _row_files(source: storage.Path) -> list[storage.Path]:
  """The files with rows, in order; [] for a folder by class, in which text files are notes."""
  if match := _RANGE.search(source.name):
    return _named_range(source, match)
  if remote := storage.is_remote(source):
    paths = [source] if source.suffix.lower() in _ARCHIVES else [
        source / name for name in storage.files_in(source) if '/' not in name]
  elif not source.exists():
    raise MissingFileError(f'--input={source} does not exist.')
  else:
    # Some systems leave '._data.jsonl' beside a file.
    paths = [source] if source.is_file() else sorted(p for p in source.iterdir() if not p.name.startswith('.'))
  for suffixes in _FILES[:3] if remote else _FILES:
    files = [p for p in paths if p.suffix.lower() in suffixes]
    if suffixes == tuple(_TABLES) and files != [source]:  # others are notes
      files = [p for p in files if _has_fields(p, _columns(p))]
    if suffixes == ('.txt',) and files != [source] and _has_media(source):
      files = []
    if files:
      return files
  return []


def _named_range(source: storage.Path, match: re.Match) -> list[storage.Path]:
  """The files of a name with a range, such as {00000..01242}.tar."""
  first, last = match.groups()
  names = [f'{source.name[:match.start()]}{i:0{len(first)}}{source.name[match.end():]}'
           for i in range(int(first), int(last) + 1)]
  existing = ({name for name in storage.files_in(source.parent)} if storage.is_remote(source) else
              {name for name in names if (source.parent / name).is_file()})
  if missing := [name for name in names if name not in existing] or ([] if names else [source.name]):
    raise MissingFileError(f'--input={source}: {first_few(missing)} of {len(names)} files do not exist.')
  return [source.parent / name for name in names]


def _has_media(source: pathlib.Path) -> bool:
  return any(p.suffix.lower() in MEDIA_SUFFIXES and not p.name.startswith('.')
             for pattern in ('*/*', '*/*/*') for p in source.glob(pattern))


def _class_folders(root: pathlib.Path) -> Iterator[InputShard]:
  paths = files_below(str(root), '', (os.path.realpath(root),))
  for part in _parts((path, formats.names_video(path)) for path in paths):
    yield InputShard('folder', str(root), paths=tuple(path for path, _ in part))


def _divide(file: storage.Path) -> Iterator[InputShard]:
  """The shards of a file with rows."""
  suffix, stem = file.suffix.lower(), file.stem.lower()
  prefix = stem if suffix in ('.jsonl', '.txt') else ''.join(_SPLIT_PREFIX.findall(stem)[:1])
  status = file.stat()
  shard = functools.partial(InputShard, suffix[1:], str(file.parent), str(file),
                            (status.length, status.mtime) if storage.is_remote(file) else
                            (status.st_size, status.st_mtime_ns), split=SPLIT_NAMES.get(prefix, ''))
  if suffix == '.tar':
    yield shard()
  elif suffix == '.parquet':
    for i, row in enumerate(archives.row_groups(str(file))):
      yield shard(start=i, line=row)
  elif suffix == '.jsonl' and file.with_suffix('.npz').exists():  # what its lines say would be read without the videos
    raise UsageError(f'--input={file}: videos in an array, {file.stem}.npz, are not read. Write each as a video file, '
                     "name it in the field 'video' of its line, and move the array elsewhere.")
  else:
    with archives.open_binary(str(file)) as lines:
      start, first_line = 0, 1
      if suffix in _TABLES:
        columns, num_lines, start = _header(lines, _TABLES[suffix])
        if not _has_fields(file, columns):
          raise UsageError(
              f'--input={file}: the first line of a table must name fields such as text, caption, image or label, '
              f'separated by {"tabs" if suffix == ".tsv" else "commas"}, in UTF-8 and with a line feed at its end; it '
              f'names {first_few([formats.shorten(name) for name in columns]) or "none"}.')
        lines.seek(start)
        shard, first_line = functools.partial(shard, columns=columns), 1 + num_lines
        steps = ((size, count, 0, 'video' in columns or formats.names_video(' '.join(fields or ())))
                 for count, size, fields in _records(lines, _TABLES[suffix], len(columns)))
      elif suffix == '.txt':
        _check_encoding(file, lines)
        texts = ((line, _texts(line, i == 0)) for i, line in enumerate(lines))
        steps = ((len(line), len(t), sum(not one_line(text) for text in t), False) for line, t in texts)
      else:
        steps = ((len(line), 1, 0, formats.names_video(line.decode('latin-1'))) for line in lines)
      yield from _cut(steps, shard, start, first_line)


def _parts(items: Iterable[tuple]) -> Iterator[list[tuple]]:
  """Consecutive items, as many as a shard has. The last value of each is whether it names a video."""
  part, num_rows = [], 0
  for item in items:
    part.append(item)
    if (num_rows := num_rows + (_VIDEO_ROWS if item[-1] else 1)) >= _NUM_ROWS:
      yield part
      part, num_rows = [], 0
  yield from [part] if part else ()


def _cut(steps: Iterator[tuple[int, int, int, bool]], shard: Callable[..., InputShard], start: int,
         line: int) -> Iterator[InputShard]:
  """Shards of a file of which each step is some bytes, lines and ends of documents, and whether it names a video.

  start, line: the first byte, and the number of its line.
  """
  document = 0
  for part in _parts(steps):
    size, lines, documents, _ = map(sum, zip(*part))
    yield shard(start=start, stop=start + size, line=line, document=document)
    start, line, document = start + size, line + lines, document + documents


def _lines(shard: InputShard) -> Iterator[bytes]:
  with open(shard.file, 'rb') as file:
    file.seek(shard.start)
    while file.tell() < shard.stop:
      yield file.readline()


def _check_encoding(file: storage.Path, lines: BinaryIO) -> None:
  """Raises UsageError for text in UTF-16, in which every other byte would be a character of its own."""
  if lines.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
    raise UsageError(f'--input={file} is in UTF-16, as some programs of Windows write text; save it in UTF-8, for '
                     f'example: iconv --from-code=UTF-16 --to-code=UTF-8 {shlex.quote(file.name)} > utf8.txt')
  lines.seek(0)


def _texts(data: bytes, is_first: bool) -> list[str]:
  """The lines of a part of a text file, which may end as on any system."""
  text = data.decode('utf-8-sig' if is_first else 'utf-8', 'surrogateescape')
  return io.StringIO(text, newline=None).readlines()


def _read_lines(shard: InputShard, _: bool) -> Iterator[Row]:
  """Yields one text per line. Lines between empty lines are a document, which stays in one split."""
  name, document = os.path.basename(shard.file), shard.document
  stem = printable(pathlib.PurePath(name).stem)
  for number, line in enumerate(_texts(b''.join(_lines(shard)), not shard.start), shard.line):
    location = shard.location(number)
    if not (text := one_line(line)):
      document += 1
    elif printable(text) != text:
      yield Row(location, skipped=formats.NOT_UTF8)
    else:
      yield Row(location, shard.split, texts={'text': text},
                key=f'{name}:{number}',  # equal lines are no duplicates: a book may repeat a sentence
                group=f'{stem}/{document}')


def _read_jsonl(shard: InputShard, allow_outside: bool) -> Iterator[Row]:
  # Decoded line by line, so that a byte of another encoding costs one line.
  for number, line in enumerate(_lines(shard), shard.line):
    if line.strip():
      location = shard.location(number)
      try:
        value = formats.decode_json(line, 'utf-8-sig' if number == 1 else 'utf-8')
        value = formats.of_image_folder(value, shard.file)
        yield formats.parse(value, location, pathlib.Path(shard.root), shard.split, allow_outside)
      except formats.Skip as e:
        yield Row(location, skipped=str(e))


def _columns(file: storage.Path) -> tuple[str, ...]:
  """The names in the first line of a table."""
  with archives.open_binary(str(file)) as lines:
    return _header(lines, _TABLES[file.suffix.lower()])[0]


def _has_fields(file: storage.Path, columns: Iterable[str]) -> bool:
  of_image_folder = [formats.FILE_NAME] if file.stem == formats.METADATA else []
  return not {*formats.RESERVED_FIELDS, *of_image_folder}.isdisjoint(columns)


def _header(lines: Iterable[bytes], delimiter: str) -> tuple[tuple[str, ...], int, int]:
  """(names in the first record of a table, its number of lines, of bytes)."""
  num_lines, size, names = next(_records(lines, delimiter), (0, 0, None))
  return tuple(map(one_line, names or ())), num_lines, size


def _records(lines: Iterable[bytes], delimiter: str,
             num_fields: int | None = None) -> Iterator[tuple[int, int, list[str] | None]]:
  """Yields (number of lines, of bytes, fields) of each record of a table; None for a damaged one, which is one line.

  A quote that has no second one would make a text of all lines after it, or of those up to a quote of another record.
  """
  csv.field_size_limit(_MAX_FIELD)
  source = ((line, line.decode('utf-8-sig' if i == 0 else 'utf-8', 'surrogateescape')) for i, line in enumerate(lines))
  record, ahead = [], collections.deque()  # lines as bytes and as text: those that were read, and are read again

  def texts():
    while line := ahead.popleft() if ahead else next(source, None):
      record.append(line)
      if len(record) > _MAX_LINES:
        raise csv.Error
      yield line[1]

  reader = csv.reader(texts(), delimiter=delimiter, strict=True)
  while True:
    record.clear()
    try:
      fields = next(reader)
    except StopIteration:
      return
    except csv.Error:
      fields = None
    if fields is None or len(record) > 1 and num_fields and (
        len(fields) != num_fields or _are_records([text for _, text in record], delimiter, num_fields)):
      ahead.extendleft(reversed(record[1:]))
      del record[1:]
      fields = _fields_of_line(record[0][1], delimiter, num_fields)
      reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    yield len(record), sum(len(line) for line, _ in record), fields


def _are_records(lines: list[str], delimiter: str, num_fields: int) -> bool:
  """Whether the lines between two quotes are records rather than a text."""
  return num_fields > 1 and len(lines) >= _MIN_RECORDS[delimiter] and all(
      line.count(delimiter) == num_fields - 1 for line in lines)


def _fields_of_line(line: str, delimiter: str, num_fields: int | None) -> list[str] | None:
  """The fields of a line that breaks the rules for quotes: `"yes" he said` is a text; None if that is none either."""
  line = line.rstrip('\r\n')
  try:
    # Many programs write .tsv without any quoting.
    fields = line.split(delimiter) if delimiter == '\t' else next(csv.reader([f'{line}\n'], delimiter=delimiter))
  except csv.Error:
    return None
  return fields if len(fields) == num_fields and not fields[-1].endswith('\n') else None  # the quote is not closed


def _read_table(shard: InputShard, allow_outside: bool) -> Iterator[Row]:
  root, delimiter = pathlib.Path(shard.root), _TABLES[f'.{shard.reader}']
  number = shard.line
  for num_lines, _, record in _records(_lines(shard), delimiter, len(shard.columns)):
    location, number = shard.location(number), number + num_lines
    if record != []:
      try:
        if record is None or len(record) != len(shard.columns):
          raise formats.Skip('another number of fields than in the first line')
        texts = (formats.decode_text(field.encode(errors='surrogateescape')) for field in record)
        value = {name: text for name, text in zip(shard.columns, texts) if text}
        value = formats.of_image_folder(value, shard.file)
        yield formats.parse(value, location, root, shard.split, allow_outside)
      except formats.Skip as e:
        yield Row(location, skipped=str(e))


_READERS: dict[str, Callable[[InputShard, bool], Iterator[Row]]] = {
    'jsonl': _read_jsonl, 'txt': _read_lines, 'csv': _read_table, 'tsv': _read_table,
    'tar': lambda shard, _: archives.read_tar(shard.file, shard.split),
    'parquet': lambda shard, allow_outside: archives.read_parquet(
        shard.file, shard.start, shard.line, pathlib.Path(shard.root), shard.split, allow_outside)}
