"""Input formats of a user's own data: JSONL, text, arrays of frames, folders per class.

Readers yield one row per example; whatever is not an example gives a row with the reason to skip it. They open only
text files: a row names its image or video, which `check.py` opens.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from uni_moe_jax.utils.errors import MissingFileError, UsageError

_SUFFIXES = {'image': ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp'),
             'video': ('.mp4', '.webm', '.mkv', '.avi', '.mov', '.gif')}
_MEDIA_SUFFIXES = {suffix for suffixes in _SUFFIXES.values() for suffix in suffixes}
MEDIA_TYPES = tuple(_SUFFIXES)
# Names of folders and files that stand for a split.
_SPLIT_NAMES = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation',
                'validation': 'validation', 'dev': 'validation', 'test': 'test', 'testing': 'test'}
LOCATION = 'source_location'  # column of the file or line that a row was read from
NO_CONTENT = 'no image, video or text'
_NOT_UTF8 = 'not UTF-8'
# The text of an example itself; a row must not lack it where most rows have it.
TEXT_FIELDS = ('text', 'text_a', 'text_b')
_STRING_FIELDS = (*MEDIA_TYPES, 'caption', 'label_name', 'split', *TEXT_FIELDS)
# Fields that the documented format defines. Others are extra, and a wrong one costs no row.
RESERVED_FIELDS = (*_STRING_FIELDS, 'captions', 'label', 'key', 'group')
_FIELD_NAME = re.compile(r'\w[\w .:-]{0,49}')  # files are named after fields


@dataclasses.dataclass(frozen=True)
class Row:
  """One example, or input that is not an example."""
  location: str  # file and line, or path, relative to the input
  split: str = ''  # 'train', 'validation' or 'test', as the data names it
  media_type: str = ''  # 'image' or 'video'
  path: pathlib.Path | None = None  # of the image or video, or of the .npz of frames
  array_index: int | None = None  # of the video in the .npz
  texts: dict[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)  # by field
  labels: dict[str, str] = dataclasses.field(default_factory=dict)  # field → value that may become a class
  key: str = ''  # two rows of one key are duplicates; '': file, texts and labels identify the row
  group: str = ''  # rows of one group belong to the same split
  dropped_fields: tuple[str, ...] = ()  # quoted names of fields that cannot be a column
  skipped: str = ''  # why it is not an example, in a few words, the same for equal causes
  size: tuple[int, ...] = ()  # this and the note: see `media.Media`, once the file has been opened
  note: str = ''
  content: bytes = b''  # identifies the bytes of its image or video, or its text if it is labeled; b'': is not compared


class _Skip(Exception):
  """The reason to skip a line."""


def read_rows(root: pathlib.Path, gif: str = 'image', allow_outside: bool = False) -> Iterator[Row]:
  """Yields the rows of a .jsonl or .txt file, a folder of such files, or a folder [split/]class/file.

  Args:
    root: the file or folder.
    gif: media type of .gif files in a folder by class: 'image' (the first frame) or 'video'.
    allow_outside: whether a line of a .jsonl file may name a file that is not below its folder, also through a link.

  Raises:
    MissingFileError: `root` does not exist. UsageError: it contains no known format.
  """
  if not root.exists():
    raise MissingFileError(f'--input={root} does not exist.')
  if files := _row_files(root):
    for file in files:
      folder, split = root if root.is_dir() else root.parent, _SPLIT_NAMES.get(file.stem.lower(), '')
      if file.suffix.lower() == '.jsonl':
        yield from _read_jsonl(file, folder, split, allow_outside)
      else:
        yield from _read_lines(file, folder, split)
  elif root.is_file():
    raise UsageError(f'--input={root}: a file must end in .jsonl or .txt.')
  elif rows := list(_read_class_folders(root, gif)):
    yield from rows
  else:
    raise UsageError(f'--input={root} has no .jsonl file, no .txt file and no folder of images or videos per class '
                     f'({", ".join(sorted(_MEDIA_SUFFIXES))}).')


def _row_files(root: pathlib.Path) -> list[pathlib.Path]:
  """The .jsonl files of a folder, else its .txt files, which are notes beside folders of media; of a file the file."""
  # Some systems leave '._data.jsonl' beside a file.
  paths = [root] if root.is_file() else sorted(p for p in root.iterdir() if not p.name.startswith('.'))
  jsonl, text = ([p for p in paths if p.suffix.lower() == suffix] for suffix in ('.jsonl', '.txt'))
  has_media = lambda: any(p.suffix.lower() in _MEDIA_SUFFIXES and not p.name.startswith('.')
                          for pattern in ('*/*', '*/*/*') for p in root.glob(pattern))
  return jsonl or ([] if text and root.is_dir() and has_media() else text)


def _read_class_folders(root: pathlib.Path, gif: str) -> Iterator[Row]:
  """Yields a row for each [split/]class/file. Suffixes may be upper case; hidden files are ignored."""
  for path in sorted(p for p in root.rglob('*') if p.is_file()):
    name, suffix = path.relative_to(root), path.suffix.lower()
    if any(part.startswith('.') for part in name.parts):
      continue
    folders = name.parts[:-1]
    media_type = gif if suffix == '.gif' else next((m for m, suffixes in _SUFFIXES.items() if suffix in suffixes), '')
    split = _SPLIT_NAMES.get(folders[0].lower(), '') if len(folders) == 2 else ''
    folder = folders[-1] if folders else ''
    label = _one_line(folder)
    reasons = {'text beside folders of classes': suffix == '.txt' and not folders,
               'not an image or video': not media_type,
               'not in a folder [split/]class': len(folders) not in (1, 2),
               'split folder is not train, validation or test': len(folders) == 2 and not split,
               _NOT_UTF8: _printable(folder) != folder,
               'empty label': not label}
    skipped = next((reason for reason, applies in reasons.items() if applies), '')
    yield Row(_printable(str(name)), split, media_type, path, labels={'label': label}, skipped=skipped)


def _read_lines(file: pathlib.Path, folder: pathlib.Path, split: str) -> Iterator[Row]:
  """Yields one text per line. Lines between empty lines are a document, which stays in one split."""
  document = 0
  with file.open(encoding='utf-8-sig', errors='replace') as lines:
    for number, line in enumerate(lines, 1):
      if text := _one_line(line):
        yield Row(_printable(f'{file.relative_to(folder)}:{number}'), split, texts={'text': text},
                  key=f'{file.name}:{number}',  # equal lines are no duplicates: a book may repeat a sentence
                  group=f'{_printable(file.stem)}/{document}')
      else:
        document += 1


def _read_jsonl(file: pathlib.Path, folder: pathlib.Path, split: str, allow_outside: bool) -> Iterator[Row]:
  frames = file.with_suffix('.npz')
  frames, root = frames if frames.is_file() else None, os.path.realpath(folder)
  with file.open('rb') as lines:  # decoded line by line, so that a byte of another encoding costs one line
    for number, line in enumerate(lines, 1):
      if line.strip():
        location = _printable(f'{file.relative_to(folder)}:{number}')
        try:
          value = _decode(line, 'utf-8-sig' if number == 1 else 'utf-8')
          row = _parse(value, location, folder, split, frames, number - 1)
          if not allow_outside and row.path and row.array_index is None and _is_outside(row.path, root):
            raise _Skip('a file outside of the input folder (--allow_outside packs it)')
          yield row
        except _Skip as e:
          yield Row(location, skipped=str(e))


def _is_outside(path: pathlib.Path, root: str) -> bool:
  """Whether a path leaves a folder without links, by its name or by a link: a line could pack any file of the user."""
  try:
    return not pathlib.Path(os.path.realpath(path)).is_relative_to(root)
  except ValueError:  # a null character: no such file
    return False


def _decode(line: bytes, encoding: str) -> Any:
  try:
    value = json.loads(line.decode(encoding))
    json.dumps(value, ensure_ascii=False).encode()  # fails for an unpaired surrogate
    return value
  except UnicodeError:
    raise _Skip(_NOT_UTF8) from None
  except (ValueError, RecursionError):
    raise _Skip('not JSON') from None


def _parse(value: Any, location: str, folder: pathlib.Path, split: str, frames: pathlib.Path | None, index: int) -> Row:
  """The row of a JSON value; `index` is its video in the array file `frames`."""
  if not isinstance(value, dict):
    raise _Skip('not an object')
  value = {k: v for k, v in value.items() if v is not None}
  dropped = [name for name, v in value.items() if not _can_be_column(name, v)]
  if wrong := next((name for name in dropped if name in RESERVED_FIELDS), ''):
    raise _Skip(f'wrong type of {shorten(wrong)}')
  value = {k: v for k, v in value.items() if k not in dropped}
  media_type, *others = [m for m in MEDIA_TYPES if m in value] or ['']
  if others:
    raise _Skip('both an image and a video')
  path, array_index = folder / value.pop(media_type) if media_type else None, None
  if not media_type and frames is not None:
    media_type, path, array_index = 'video', frames, index
  if 'caption' in value:
    value['captions'] = [*value.get('captions', ()), value.pop('caption')]
  split, key, group = (str(value.pop(k, default)) for k, default in (('split', split), ('key', ''), ('group', '')))
  if split and split.lower() not in _SPLIT_NAMES:
    raise _Skip(f'split {shorten(split)} is not train, validation or test')
  if 'label_name' in value:
    value['label'] = value.pop('label_name')
  texts, labels = _texts_and_labels(value)
  if not media_type and not texts:
    raise _Skip(NO_CONTENT)
  return Row(location, _SPLIT_NAMES.get(split.lower(), ''), media_type, path, array_index, texts, labels, key, group,
             tuple(map(shorten, dropped)))


def _texts_and_labels(fields: dict[str, Any]) -> tuple[dict[str, str | tuple[str, ...]], dict[str, str]]:
  texts, labels = {}, {}
  for name, value in fields.items():
    if isinstance(value, list):
      texts[name] = tuple(filter(None, map(_one_line, value)))
      if name == 'captions' and not texts[name]:
        raise _Skip('empty caption')
    elif name in TEXT_FIELDS:
      texts[name] = _one_line(value)
      if not texts[name]:
        raise _Skip(f'empty {name}')
    elif label := _one_line(str(value)):
      labels[name] = label
  return texts, labels


def _can_be_column(name: str, value: Any) -> bool:
  is_string_list = isinstance(value, list) and all(isinstance(x, str) for x in value)
  if name == 'captions':
    return is_string_list
  if name in _STRING_FIELDS:
    return isinstance(value, str)
  is_value = is_string_list or isinstance(value, (str, int, float))
  return is_value and bool(_FIELD_NAME.fullmatch(name)) and name != LOCATION


def shorten(text: str) -> str:
  """Quotes a string of the user's file, cut to 40 characters."""
  return repr(text if len(text) <= 40 else f'{text[:40]}…')


def _printable(name: str) -> str:
  """A file name with whatever is not UTF-8 escaped."""
  return name.encode(errors='backslashreplace').decode()


def _one_line(text: str) -> str:
  """Joins words by single spaces."""
  return ' '.join(text.split())
