"""The gallery: images and videos that texts search, encoded when the service starts."""

import asyncio
import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.data.formats.rows import MEDIA_SUFFIXES, media_type_of
from uni_moe_jax.io import storage
from uni_moe_jax.serve.batching import Batcher
from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.worker import Facts, Item, media_of
from uni_moe_jax.utils.errors import UsageError

_MAX_FILES = 5000
_MAX_ENDED = 3  # workers that end with a file before it is refused
_PAUSE = 1.0  # seconds before a file is sent again


@dataclasses.dataclass
class GalleryItem:
  """An image or video. text: what its file name, or the model at export, calls it; features: by task."""
  index: int
  name: str
  text: str
  png: bytes = b''
  features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def files_of(folder: str) -> list[pathlib.Path]:
  """Images and videos in a folder, sorted. Raises UsageError: there are none, or too many."""
  files = sorted(p for p in storage.path(folder).rglob('*') if p.suffix.lower() in MEDIA_SUFFIXES and p.is_file())
  if not files:
    raise UsageError(f'--gallery={folder} has no file ending in any of {", ".join(MEDIA_SUFFIXES)}; give a folder '
                     'of images or videos.')
  if len(files) > _MAX_FILES:
    raise UsageError(f'--gallery={folder} has {len(files):,} images and videos, but at most {_MAX_FILES:,} are '
                     'searched; give a smaller folder.')
  return files


class Gallery:
  """Encoded images and videos.

  Args:
    sources: files; none: the model's examples.
    cache: .npz file of features and thumbnails by content, rewritten at the end.
  """

  def __init__(self, facts: Facts, sources: Sequence[pathlib.Path], cache: pathlib.Path):
    self._facts, self._tasks, self._cache = facts, facts.manifest['tasks'], cache
    searched = {self._tasks[task]['num_frames'] for task in self.searchers()}
    self._sources = list(sources) or [
        Item(example=i, thumbnail=True) for i, e in enumerate(facts.examples) if e['num_frames'] in searched]
    self._slots: list[GalleryItem | None] = [None] * len(self._sources)
    self._num_refused = 0
    self._stored: dict[str, np.ndarray] = {}  # by content; empty after `encode`
    self._used: set[str] = set()  # keys of `_stored`

  @property
  def items(self) -> list[GalleryItem]:
    """Those encoded so far."""
    return [item for item in self._slots if item]

  @property
  def size(self) -> int:
    """Files or examples, whether encoded yet or not, without files that are not accepted."""
    return len(self._slots) - self._num_refused

  def item(self, index: int) -> GalleryItem | None:
    """An item by its index; None: there is none, or it is not encoded yet."""
    return self._slots[index] if 0 <= index < len(self._slots) else None

  def searchers(self) -> list[str]:
    """Tasks that search: those of retrieval, or others where there is none for images, or for videos."""
    names = [name for name, entry in self._tasks.items() if is_searcher(entry)]
    reads = {name: (media_of(self._tasks[name]), self._tasks[name]['num_frames']) for name in names}
    pairs = {reads[name] for name in names if self._tasks[name]['target'] == 'pair'}
    return [name for name in names if self._tasks[name]['target'] == 'pair' or reads[name] not in pairs]

  async def encode(self, batcher: Batcher, limits: Limits, note: Callable[[str], None]) -> None:
    """Encodes everything. note: called with one sentence about each file that is not accepted."""
    await asyncio.to_thread(self._load)
    waiting = asyncio.Semaphore(2 * limits.max_batch)

    async def add(index: int) -> None:
      async with waiting:
        try:
          self._slots[index] = await self._encoded(index, batcher)
        except (Refused, OSError) as e:
          self._num_refused += 1
          note(f'{self._sources[index]}: {e}' if isinstance(e, Refused) else str(e))

    await asyncio.gather(*map(add, range(len(self._sources))))
    await asyncio.to_thread(self._save)
    self._stored, self._used = {}, set()  # the items have their own

  async def _encoded(self, index: int, batcher: Batcher) -> GalleryItem:
    source = self._sources[index]
    if isinstance(source, Item):
      example = self._facts.examples[source.example]
      item, media, fits = source, '', lambda entry: entry['num_frames'] == example['num_frames']
      made, digest = GalleryItem(index, f'example {source.example}', example['answer']), f'example {source.example}'
    else:
      data, suffix = await asyncio.to_thread(source.read_bytes), source.suffix.lower()
      media = 'video' if suffix == '.gif' else media_type_of(suffix)
      item, fits = Item(thumbnail=True, **{media: data}), lambda entry: media_of(entry) == media
      name = source.name.encode(errors='surrogateescape').decode(errors='replace')  # the bytes may be no UTF-8
      made = GalleryItem(index, name, pathlib.PurePath(name).stem.replace('_', ' '))
      digest = hashlib.sha256(data).hexdigest()
    for task in self.searchers():
      if not fits(self._tasks[task]):
        continue
      key, png = f'{task} {digest}', f'png {self._tasks[task]["num_frames"]} {digest}'
      if key not in self._stored or png not in self._stored:
        output = await _output(batcher, task, item)
        self._stored |= {key: output['features'], png: np.frombuffer(output['png'], np.uint8)}
      self._used |= {key, png}
      made.features[task], made.png = self._stored[key], self._stored[png].tobytes()
    if not made.features:  # a file: of the examples only those that a task searches are sources
      raise Refused(422, f'No task of this model searches {media}s; remove the file.')
    return made

  def _load(self) -> None:
    with contextlib.suppress(Exception):  # it is missing or damaged, and will be written again
      with np.load(self._cache, allow_pickle=False) as stored:
        self._stored = dict(stored)

  def _save(self) -> None:
    with contextlib.suppress(OSError):  # the next start encodes again
      self._cache.parent.mkdir(parents=True, exist_ok=True)
      temporary = self._cache.with_suffix('.tmp.npz')
      np.savez(temporary, **{key: self._stored[key] for key in self._used})
      temporary.replace(self._cache)


async def _output(batcher: Batcher, task: str, item: Item) -> dict[str, Any]:
  """Output of `encode`, however long the worker is busy or starts. Raises Refused."""
  while True:
    try:
      return await batcher.submit(task, 'encode', item)
    except Refused as e:
      if e.status != 503:
        raise
      if item.ended >= _MAX_ENDED:  # all but the first with it alone: the next one would end, too
        raise Refused(422, f'{item.ended} workers ended while reading it; remove it, give a smaller file, or raise '
                           '--timeout.') from None
      await asyncio.sleep(_PAUSE)


def is_searcher(entry: dict[str, Any]) -> bool:
  """Whether a task encodes images or videos alone, and texts."""
  programs = entry['programs']
  return {'encode', 'encode_text'} <= set(programs) and set(programs['encode']['inputs']) == {'pixels'}
