"""The gallery: images and videos that texts search, encoded when the service starts."""

import asyncio
import dataclasses
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
_PAUSE = 0.1  # seconds before a file is sent again


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
  """Encoded images and videos. sources: files; none: the model's examples."""

  def __init__(self, facts: Facts, sources: Sequence[pathlib.Path]):
    self._facts, self._tasks = facts, facts.manifest['tasks']
    searched = {self._tasks[task]['num_frames'] for task in self.searchers()}
    self._sources = list(sources) or [
        Item(example=i, thumbnail=True) for i, e in enumerate(facts.examples) if e['num_frames'] in searched]
    self._slots: list[GalleryItem | None] = [None] * len(self._sources)
    self._num_refused = 0

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
    waiting = asyncio.Semaphore(2 * limits.max_batch)

    async def add(index: int) -> None:
      async with waiting:
        try:
          self._slots[index] = await self._encoded(index, batcher)
        except (Refused, OSError) as e:
          self._num_refused += 1
          note(f'{self._sources[index]}: {e}' if isinstance(e, Refused) else str(e))

    await asyncio.gather(*map(add, range(len(self._sources))))

  async def _encoded(self, index: int, batcher: Batcher) -> GalleryItem:
    source = self._sources[index]
    if isinstance(source, Item):
      example = self._facts.examples[source.example]
      item, media, fits = source, '', lambda entry: entry['num_frames'] == example['num_frames']
      made = GalleryItem(index, f'example {source.example}', example['answer'])
    else:
      data, suffix = await asyncio.to_thread(source.read_bytes), source.suffix.lower()
      media = 'video' if suffix == '.gif' else media_type_of(suffix)
      item, fits = Item(thumbnail=True, **{media: data}), lambda entry: media_of(entry) == media
      name = source.name.encode(errors='surrogateescape').decode(errors='replace')  # the bytes may be no UTF-8
      made = GalleryItem(index, name, pathlib.PurePath(name).stem.replace('_', ' '))
    for task in self.searchers():
      if not fits(self._tasks[task]):
        continue
      output = await _output(batcher, task, item)
      made.features[task], made.png = output['features'], output['png']
    if not made.features:  # a file: of the examples only those that a task searches are sources
      raise Refused(422, f'No task of this model searches {media}s; remove the file.')
    return made


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
