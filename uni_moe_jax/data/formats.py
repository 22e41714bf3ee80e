"""What people bring, as rows: pictures and clips in folders or named by JSONL, arrays of frames, lines of text.

Nothing is opened here but text: a row names its file, and `prepare.py` looks into it. What is no row is told with its reason.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp')
VIDEOS = ('.mp4', '.webm', '.mkv', '.avi', '.mov', '.gif')
# Names of folders and files that say a split → what it is called here.
SPLITS = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation', 'validation': 'validation',
          'dev': 'validation', 'test': 'test', 'testing': 'test'}
MEDIA = ('image', 'video')
_LISTS = ('captions',)  # lists of texts; so is any field whose value is one
_ONE = ('image', 'video', 'caption', 'text', 'text_a', 'text_b', 'label_name', 'split', 'group', 'key')


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
    FileNotFoundError: it is not there. ValueError: nothing in it is of a known format.
  """
  if not root.exists():
    raise FileNotFoundError(f'--input={root} is not there.')
  if root.is_file():
    files, folder = [root], root.parent
  else:
    folder = root
    files = sorted(p for p in root.iterdir() if p.suffix.lower() == '.jsonl')
    files = files or sorted(p for p in root.iterdir() if p.suffix.lower() == '.txt')
  told = {f: SPLITS.get(f.stem.lower(), '') for f in files}
  if files and all(f.suffix.lower() == '.jsonl' for f in files):
    for file in files:
      yield from _jsonl(file, folder, told[file])
  elif files and all(f.suffix.lower() == '.txt' for f in files):
    for file in files:
      yield from _lines(file, folder, told[file])
  elif root.is_dir():
    found = False
    for row in _by_class(root, media):
      found = True
      yield row
    if not found:
      raise ValueError(f'--input={root} has no .jsonl file, no .txt file and no folder of pictures or clips per class '
                       f'({", ".join(sorted({*PICTURES, *VIDEOS}))}).')
  else:
    raise ValueError(f'--input={root}: a file must end in .jsonl or .txt.')


def _by_class(root: pathlib.Path, media: str) -> Iterator[Row | Skipped]:
  """[split/]class/file; upper-case endings count, and hidden files do not."""
  pictures, videos = set(PICTURES), set(VIDEOS)
  (videos if media == 'image' else pictures).discard('.gif')
  for path in sorted(p for p in root.rglob('*') if p.is_file()):
    name = path.relative_to(root)
    if any(part.startswith('.') for part in name.parts):
      continue
    *folders, _ = name.parts
    suffix, kind = path.suffix.lower(), ''
    if suffix in pictures or suffix in videos:
      kind = 'image' if suffix in pictures else 'video'
    if not kind or len(folders) not in (1, 2):
      yield Skipped(str(name), 'not a picture or clip' if not kind else 'not in a folder [split/]class')
      continue
    split = SPLITS.get(folders[0].lower(), '') if len(folders) == 2 else ''
    if len(folders) == 2 and not split:
      yield Skipped(str(name), 'split folder is not train, validation or test')
      continue
    yield Row(str(name), split, kind, path, labels={'label': folders[-1]})


def _lines(file: pathlib.Path, folder: pathlib.Path, split: str) -> Iterator[Row | Skipped]:
  """One text a line. Lines between empty lines are one document, which stays in one split."""
  document = 0
  with file.open(encoding='utf-8-sig', errors='replace') as lines:
    for number, line in enumerate(lines, 1):
      text = ' '.join(line.split())
      if not text:
        document += 1
        continue
      yield Row(f'{file.relative_to(folder)}:{number}', split, texts={'text': text},
                key=f'{file.name}:{number}', group=f'{file.stem}/{document}')  # a book may say a thing twice


def _jsonl(file: pathlib.Path, folder: pathlib.Path, split: str) -> Iterator[Row | Skipped]:
  frames = file.with_suffix('.npz')
  with file.open(encoding='utf-8-sig') as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        where = f'{file.relative_to(folder)}:{number}'
        try:
          value = json.loads(line)
        except ValueError:
          yield Skipped(where, 'not JSON')
          continue
        yield _row(value, where, folder, split, frames if frames.is_file() else None, number - 1)


def _row(
    value: Any, where: str, folder: pathlib.Path, split: str, frames: pathlib.Path | None, index: int) -> Row | Skipped:
  if not isinstance(value, dict):
    return Skipped(where, 'not an object')
  value = {k: v for k, v in value.items() if v is not None}
  for name, v in value.items():
    if not isinstance(v, (str, int, float, list)) or isinstance(v, list) and not all(isinstance(x, str) for x in v):
      return Skipped(where, f'wrong type of {name!r}')
    if name in _ONE and not isinstance(v, str) and name not in ('group', 'key') or name in _LISTS and not isinstance(v, list):
      return Skipped(where, f'wrong type of {name!r}')
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
    return Skipped(where, f'split {split!r} is not train, validation or test')
  key, group = (str(value.pop(k, '')) for k in ('key', 'group'))
  if 'label_name' in value:
    value['label'] = value.pop('label_name')
  for name, v in value.items():
    if isinstance(v, list):
      texts[name] = tuple(t for t in (' '.join(x.split()) for x in v) if t)
      if name == 'captions' and not texts[name]:
        return Skipped(where, 'empty caption')
    elif name.startswith('text'):
      texts[name] = ' '.join(v.split())
      if not texts[name]:
        return Skipped(where, f'empty {name}')
    else:
      labels[name] = str(v)
  if not media and not texts:
    return Skipped(where, 'neither a picture, a clip nor a text')
  return Row(where, SPLITS.get(split.lower(), ''), media, path, frame_index, texts, labels, key, group)
