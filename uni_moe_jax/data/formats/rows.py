"""Rows of a user's own data: what a JSON object, or a file in a folder per class, says about an example.

Whatever is not an example has the reason to skip it. No image or video is opened.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from typing import Any

_SUFFIXES = {'image': ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp'),
             'video': ('.mp4', '.webm', '.mkv', '.avi', '.mov', '.gif')}
_VIDEO_NAME = re.compile(r'\.(mp4|webm|mkv|avi|mov)\b', re.IGNORECASE)
MEDIA_SUFFIXES = tuple(dict.fromkeys(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes))
MEDIA_TYPES = tuple(_SUFFIXES)
# Names of folders and files that stand for a split.
SPLIT_NAMES = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation',
               'validation': 'validation', 'dev': 'validation', 'test': 'test', 'testing': 'test'}
LOCATION = 'source_location'  # column of the file or line that a row was read from
NO_CONTENT = 'no image, video or text'
NOT_UTF8 = 'not UTF-8'
# The text of an example itself; a row must not lack it where most rows have it.
TEXT_FIELDS = ('text', 'text_a', 'text_b')
_STRING_FIELDS = (*MEDIA_TYPES, 'caption', 'label_name', 'split', *TEXT_FIELDS)
# Fields that the documented format defines. Others are extra, and a wrong one costs no row.
RESERVED_FIELDS = (*_STRING_FIELDS, 'captions', 'label', 'key', 'group')
METADATA, FILE_NAME = 'metadata', 'file_name'  # see `of_image_folder`
# What img2dataset writes about each download, beside the caption and its user's columns. The first mark such a row.
_DOWNLOAD_FIELDS = ('url', 'status', 'error_message', 'original_width', 'original_height', 'width', 'height', 'exif',
                    'md5', 'sha256', 'sha512')
_URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+://')
_FIELD_NAME = re.compile(r'\w[\w .:-]{0,49}')  # files are named after fields


@dataclasses.dataclass(frozen=True)
class Row:
  """One example, or input that is not an example."""
  location: str  # file and line, or path, relative to the input
  split: str = ''  # 'train', 'validation' or 'test', as the data names it
  media_type: str = ''  # 'image' or 'video'
  path: pathlib.Path | None = None  # of the image or video
  data: bytes | None = None  # of the image or video, if an archive has it
  texts: dict[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)  # by field
  labels: dict[str, str] = dataclasses.field(default_factory=dict)  # field → value that may become a class
  key: str = ''  # two rows of one key are duplicates; '': file, texts and labels identify the row
  group: str = ''  # rows of one group belong to the same split
  dropped_fields: tuple[str, ...] = ()  # quoted names of fields that cannot be a column
  skipped: str = ''  # why it is not an example, in a few words, the same for equal causes


class Skip(Exception):
  """The reason to skip a row."""


def class_folder_row(root: pathlib.Path, name: pathlib.PurePath, gif: str) -> Row:
  """The row of a file [split/]class/file below `root`. Suffixes may be upper case."""
  suffix, folders = name.suffix.lower(), name.parts[:-1]
  media_type = gif if suffix == '.gif' else media_type_of(suffix)
  split = SPLIT_NAMES.get(folders[0].lower(), '') if len(folders) == 2 else ''
  folder = folders[-1] if folders else ''
  label = one_line(folder)
  reasons = {'missing file': not media_type and not (root / name).exists(),  # a link to a folder that is gone
             'text beside folders of classes': suffix == '.txt' and not folders,
             'not an image or video': not media_type,
             'not in a folder [split/]class': len(folders) not in (1, 2),
             'split folder is not train, validation or test': len(folders) == 2 and not split,
             NOT_UTF8: printable(folder) != folder,
             'empty label': not label}
  skipped = next((reason for reason, applies in reasons.items() if applies), '')
  return Row(printable(str(name)), split, media_type, root / name, labels={'label': label}, skipped=skipped)


def media_type_of(suffix: str) -> str:
  """'image' or 'video' by the suffix of a file name, with its dot; '' for another one."""
  return next((m for m, suffixes in _SUFFIXES.items() if suffix.lower() in suffixes), '')


def names_video(row: str) -> bool:
  """Whether the text of a row, or a path, names a video."""
  return '"video"' in row or bool(_VIDEO_NAME.search(row))


def decode_json(line: bytes, encoding: str = 'utf-8') -> Any:
  """A JSON value. Raises Skip."""
  try:
    value = json.loads(line.decode(encoding))
    if b'\\u' in line:
      json.dumps(value, ensure_ascii=False).encode()  # fails for an unpaired surrogate
    return value
  except UnicodeError:
    raise Skip(NOT_UTF8) from None
  except (ValueError, RecursionError):
    raise Skip('not JSON') from None


def decode_text(data: bytes) -> str:
  """Text in UTF-8. Raises Skip."""
  try:
    return data.decode('utf-8-sig')
  except UnicodeError:
    raise Skip(NOT_UTF8) from None


def of_image_folder(value: Any, file: str) -> Any:
  """A row of the metadata.jsonl or .csv of an image folder of Hugging Face, in the names of this format.

  There `file_name` is an image or a video, and `text` its caption.
  """
  is_row = pathlib.PurePath(file).stem == METADATA and isinstance(value, dict) and not any(
      m in value for m in MEDIA_TYPES)
  name = value.get(FILE_NAME) if is_row else None
  media_type = media_type_of(pathlib.PurePath(name).suffix) if isinstance(name, str) else ''
  if not media_type:
    return value
  value = {media_type: name, **{k: v for k, v in value.items() if k != FILE_NAME}}
  if isinstance(value.get('text'), str) and not value.keys() & {'caption', 'captions'}:
    value['caption'] = value.pop('text')
  return value


def parse(value: Any, location: str, folder: pathlib.Path, split: str, allow_outside: bool,
          data: tuple[str, bytes] | None = None) -> Row:
  """The row of a JSON value.

  Args:
    value, location: the object, and where it was read.
    folder: of the files that it names; with `allow_outside` they may be elsewhere.
    split: unless the value has one.
    data: its media type and the bytes, if an archive has them.

  Raises:
    Skip: it is not an example.
  """
  if not isinstance(value, dict):
    raise Skip('not an object')
  if value.keys() >= {'key', *_DOWNLOAD_FIELDS[:5]}:
    # Its key is a running number, which begins at 0 in each download.
    value = {k: v for k, v in value.items() if k not in ('key', *_DOWNLOAD_FIELDS)}
  # NaN is what pandas writes for a missing value.
  value = {k: v for k, v in value.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}
  dropped = [name for name, v in value.items() if not _can_be_column(name, v)]
  if wrong := next((name for name in dropped if name in RESERVED_FIELDS), ''):
    raise Skip(f'wrong type of {shorten(wrong)}')
  value = {k: v for k, v in value.items() if k not in dropped}
  media_type, *others = [m for m in MEDIA_TYPES if m in value] or ['']
  if others:
    raise Skip('both an image and a video')
  path, content = None, None
  if media_type:
    path = folder / (name := value.pop(media_type))
    if _URL.match(name):
      raise Skip('a URL, which is not fetched (img2dataset downloads images)')
  elif data is not None:
    media_type, content = data
  if 'caption' in value:
    value['captions'] = [*value.get('captions', ()), value.pop('caption')]
  split, key, group = (str(value.pop(k, default)) for k, default in (('split', split), ('key', ''), ('group', '')))
  if split and split.lower() not in SPLIT_NAMES:
    raise Skip(f'split {shorten(split)} is not train, validation or test')
  if 'label_name' in value:
    value['label'] = value.pop('label_name')
  texts, labels = _texts_and_labels(value)
  if not media_type and not texts:
    raise Skip(NO_CONTENT)
  if path and not allow_outside and _is_outside(path, folder):
    raise Skip('a file outside of the input folder (--allow_outside packs it)')
  return Row(location, SPLIT_NAMES.get(split.lower(), ''), media_type, path, content, texts, labels, key,
             group, tuple(map(shorten, dropped)))


_real_path = functools.lru_cache(2**14)(os.path.realpath)


def _is_outside(path: pathlib.Path, folder: pathlib.Path) -> bool:
  """Whether a path leaves a folder, by its name or by a link: a line could pack any file of the user."""
  try:
    parent, name = os.path.split(path)
    is_link = name == '..' or os.path.islink(path)
    real = os.path.realpath(path) if is_link else f'{_real_path(parent)}/{name}'  # many files have one folder
    return not f'{real}/'.startswith(f'{_real_path(folder).rstrip("/")}/')
  except ValueError:  # a null character: no such file
    return False


def _texts_and_labels(fields: dict[str, Any]) -> tuple[dict[str, str | tuple[str, ...]], dict[str, str]]:
  texts, labels = {}, {}
  for name, value in fields.items():
    if isinstance(value, list):
      texts[name] = tuple(filter(None, map(one_line, value)))
      if name == 'captions' and not texts[name]:
        raise Skip('empty caption')
    elif name in TEXT_FIELDS:
      texts[name] = one_line(value)
      if not texts[name]:
        raise Skip(f'empty {name}')
    elif label := one_line(str(value)):
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


def printable(name: str) -> str:
  """A file name with whatever is not UTF-8 escaped."""
  return name.encode(errors='backslashreplace').decode()


def one_line(text: str) -> str:
  """Joins words by single spaces."""
  return ' '.join(text.split())
