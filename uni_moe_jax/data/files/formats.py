"""What people bring, as rows: pictures and clips in folders or named by JSONL, arrays of frames, lines of text.

Nothing is opened here but text: a row names its file, and `prepare.py` looks into it. What is no row is told with its reason.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from uni_moe_jax.utils.errors import MissingFileError, UsageError

PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp')
VIDEOS = ('.mp4', '.webm', '.mkv', '.avi', '.mov', '.gif')
# Names of folders and files that say a split → what it is called here.
SPLITS = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation', 'validation': 'validation',
          'dev': 'validation', 'test': 'test', 'testing': 'test'}
MEDIA = ('image', 'video')
_TEXT = '.txt'
_ABOUT, _NOT_UTF8 = 'text beside folders of classes', 'not UTF-8'
_TEXTS = ('text', 'text_a', 'text_b')
_KNOWN = ('image', 'video', 'caption', 'captions', 'label', 'label_name', 'split', 'key', 'group', *_TEXTS)
_NAME = re.compile(r'\w[\w .:-]{0,49}')  # of fields: files are called so
_ONE = ('image', 'video', 'caption', 'label_name', 'split', *_TEXTS)
WHERE = 'where'  # the column that says which file or line a row came from


@dataclasses.dataclass(frozen=True)
class Row:
  """One example before its file was looked at.

  Attributes:
    where: file and line, or the path, relative to the input.
    split: as told, or ''.
    media: '' | 'image' | 'video'. path: of its file, of an .npz for frames. frame_index: which clip of the .npz.
    texts: field → text, or texts.
    labels: field → a value that may turn out to be a class.
    key: what makes the row one of its kind, where it says so, or ''. group: rows that must share a split, or ''.
    left_out: fields of it, quoted, of which nothing can be made.
  """
  where: str
  split: str = ''
  media: str = ''
  path: pathlib.Path | None = None
  frame_index: int | None = None
  texts: dict[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
  labels: dict[str, str] = dataclasses.field(default_factory=dict)
  key: str = ''
  group: str = ''
  left_out: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Skipped:
  """What is no example. where: file and line. reason: a few words, the same for all of a kind."""
  where: str
  reason: str


def read(root: pathlib.Path, media: str = 'image') -> Iterator[Row | Skipped]:
  """Rows of a JSONL or text file, or of a folder with such files or with a folder of pictures or clips per class.

  Args:
    root: the file or folder.
    media: what a .gif of a folder by class is: 'image' or 'video'.

  Raises:
    MissingFileError: it is not there. UsageError: nothing in it is of a known format.
  """
  if not root.exists():
    raise MissingFileError(f'--input={root} is not there.')
  if root.is_file():
    files, folder = [root], root.parent
  else:
    folder = root
    seen = sorted(p for p in root.iterdir() if not p.name.startswith('.'))  # some systems leave '._data.jsonl' beside a file
    files = [p for p in seen if p.suffix.lower() == '.jsonl']
    files = files or [p for p in seen if p.suffix.lower() == _TEXT and not _has_classes(root)]
  told = {f: SPLITS.get(f.stem.lower(), '') for f in files}
  if files and all(f.suffix.lower() == '.jsonl' for f in files):
    for file in files:
      yield from _jsonl(file, folder, told[file])
  elif files and all(f.suffix.lower() == _TEXT for f in files):
    for file in files:
      yield from _lines(file, folder, told[file])
  elif root.is_dir():
    found = False
    for row in _by_class(root, media):
      found = True
      yield row
    if not found:
      raise UsageError(f'--input={root} has no .jsonl file, no .txt file and no folder of pictures or clips per class '
                       f'({", ".join(sorted({*PICTURES, *VIDEOS}))}).')
  else:
    raise UsageError(f'--input={root}: a file must end in .jsonl or .txt.')


def _has_classes(root: pathlib.Path) -> bool:
  """Whether a folder holds folders of pictures or clips: then its texts are about them, and no data."""
  endings = {*PICTURES, *VIDEOS}
  return any(p.suffix.lower() in endings for pattern in ('*/*', '*/*/*') for p in root.glob(pattern) if not p.name.startswith('.'))


def _by_class(root: pathlib.Path, media: str) -> Iterator[Row | Skipped]:
  """[split/]class/file; upper-case endings count, and hidden files do not."""
  pictures, videos = set(PICTURES), set(VIDEOS)
  (videos if media == 'image' else pictures).discard('.gif')
  for path in sorted(p for p in root.rglob('*') if p.is_file()):
    name = path.relative_to(root)
    if any(part.startswith('.') for part in name.parts):
      continue
    where, (*folders, _) = _shown(str(name)), name.parts
    suffix, kind = path.suffix.lower(), ''
    if suffix in pictures or suffix in videos:
      kind = 'image' if suffix in pictures else 'video'
    if not kind or len(folders) not in (1, 2):
      about = suffix == _TEXT and not folders
      yield Skipped(where, 'not in a folder [split/]class' if kind else _ABOUT if about else 'not a picture or clip')
      continue
    split = SPLITS.get(folders[0].lower(), '') if len(folders) == 2 else ''
    if len(folders) == 2 and not split:
      yield Skipped(where, 'split folder is not train, validation or test')
    elif not _encodes(folders[-1]):
      yield Skipped(where, _NOT_UTF8)
    elif label := _spaced(folders[-1]):
      yield Row(where, split, kind, path, labels={'label': label})
    else:
      yield Skipped(where, 'empty label')


def _lines(file: pathlib.Path, folder: pathlib.Path, split: str) -> Iterator[Row | Skipped]:
  """One text a line. Lines between empty lines are one document, which stays in one split."""
  document = 0
  with file.open(encoding='utf-8-sig', errors='replace') as lines:
    for number, line in enumerate(lines, 1):
      text = _spaced(line)
      if not text:
        document += 1
        continue
      yield Row(_shown(f'{file.relative_to(folder)}:{number}'), split, texts={'text': text},
                key=f'{file.name}:{number}', group=f'{_shown(file.stem)}/{document}')  # a book may say a thing twice


def _jsonl(file: pathlib.Path, folder: pathlib.Path, split: str) -> Iterator[Row | Skipped]:
  frames = file.with_suffix('.npz')
  with file.open('rb') as lines:  # each is decoded alone, so that a byte of another encoding costs one line
    for number, line in enumerate(lines, 1):
      if line.strip():
        where = _shown(f'{file.relative_to(folder)}:{number}')
        try:
          value = json.loads(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
          encodes = _encodes(json.dumps(value, ensure_ascii=False))
        except UnicodeDecodeError:
          yield Skipped(where, _NOT_UTF8)
        except (ValueError, RecursionError):
          yield Skipped(where, 'not JSON')
        else:
          yield (_row(value, where, folder, split, frames if frames.is_file() else None, number - 1) if encodes
                 else Skipped(where, _NOT_UTF8))


def is_text(name: str) -> bool:
  """Whether a field is an example's own text, without which it is none."""
  return name in _TEXTS


def is_known(name: str) -> bool:
  """Whether a row that has a field of this name means what README.md says of it; others are extra, and cost no row."""
  return name in _KNOWN


def short(text: str) -> str:
  """Quoted, and cut where someone's file holds anything."""
  return repr(text if len(text) <= 40 else f'{text[:40]}…')


def _encodes(text: str) -> bool:
  """Whether a text can be written as UTF-8: one half of a pair of surrogates cannot."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _shown(name: str) -> str:
  """A file's name for a person; what is not UTF-8 in it is escaped."""
  return name.encode(errors='backslashreplace').decode()


def _spaced(text: str) -> str:
  """A text in one line, with one space between words."""
  return ' '.join(text.split())


def _row(
    value: Any, where: str, folder: pathlib.Path, split: str, frames: pathlib.Path | None, index: int) -> Row | Skipped:
  if not isinstance(value, dict):
    return Skipped(where, 'not an object')
  value = {k: v for k, v in value.items() if v is not None}
  unusable = [name for name, v in value.items() if not _usable(name, v)]
  for name in filter(is_known, unusable):
    return Skipped(where, f'wrong type of {short(name)}')
  value = {k: v for k, v in value.items() if k not in unusable}
  named = [m for m in MEDIA if m in value]
  if len(named) > 1:
    return Skipped(where, 'both a picture and a clip')
  media, path, frame_index = '', None, None
  if named:
    media, path = named[0], folder / value.pop(named[0])
  elif frames is not None:
    media, path, frame_index = 'video', frames, index
  if 'caption' in value:
    value['captions'] = [*value.get('captions', ()), value.pop('caption')]
  texts, labels = {}, {}
  split = str(value.pop('split', split))
  if split and split.lower() not in SPLITS:
    return Skipped(where, f'split {short(split)} is not train, validation or test')
  key, group = (str(value.pop(k, '')) for k in ('key', 'group'))
  if 'label_name' in value:
    value['label'] = value.pop('label_name')
  for name, v in value.items():
    if isinstance(v, list):
      texts[name] = tuple(t for t in map(_spaced, v) if t)
      if name == 'captions' and not texts[name]:
        return Skipped(where, 'empty caption')
    elif is_text(name):
      texts[name] = _spaced(v)
      if not texts[name]:
        return Skipped(where, f'empty {name}')
    elif label := _spaced(str(v)):
      labels[name] = label
  if not media and not texts:
    return Skipped(where, 'neither a picture, a clip nor a text')
  return Row(where, SPLITS.get(split.lower(), ''), media, path, frame_index, texts, labels, key, group, tuple(map(short, unusable)))


def _usable(name: str, value: Any) -> bool:
  """Whether a field can be a column: of texts, a list of texts, or values that may be classes."""
  texts = isinstance(value, list) and all(isinstance(x, str) for x in value)
  if name == 'captions':
    return texts
  if name in _ONE:
    return isinstance(value, str)
  return (texts or isinstance(value, (str, int, float))) and bool(_NAME.fullmatch(name)) and name != WHERE
