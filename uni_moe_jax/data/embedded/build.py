"""Makes all embedded data: images and videos in one process while another reads texts."""

import functools
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from uni_moe_jax.config.schema import DataConfig
from uni_moe_jax.data.embedded import digits, docstring_texts, glyph_questions, glyph_videos, glyphs
from uni_moe_jax.data.shards import file_dataset, mirror
from uni_moe_jax.data.shards.record_format import EMBEDDED
from uni_moe_jax.data.shards.writer import Columns, Split, write_dataset
from uni_moe_jax.utils import workers
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_report = functools.partial(print, flush=True)


# One group per process, the longest first; then 'corpus'.
_GROUPS = ('paragraphs', 'pairs'), ('glyphs', 'questions', 'videos', 'digits')
_MADE_OF = {'questions': ('glyphs',), 'videos': ('glyphs',), 'corpus': ('paragraphs', 'glyphs')}


def build(config: DataConfig, num_workers: int, names: Iterable[str] = EMBEDDED) -> None:
  """Makes what the data directory lacks of some embedded datasets, and of those that they are made of.

  Raises UsageError for unknown names, and for fonts or packages that are missing.
  """
  if unknown := [name for name in names if name not in EMBEDDED]:
    raise UsageError(f'--embedded={unknown[0]} is unknown; {nearest(unknown[0], EMBEDDED)}.')
  needed = {made for name in names for made in (name, *_MADE_OF.get(name, ()))}
  groups = [[name for name in group if name in needed] for group in _GROUPS]
  tasks = [functools.partial(_build, config, group) for group in groups if group]
  workers.run(tasks, len(tasks), None, num_workers)
  _build(config, ['corpus'] if 'corpus' in needed else [])


def _build(config: DataConfig, names: Sequence[str]) -> int:
  directory = mirror.open_folder(config)  # a mirror of a bucket belongs to its process
  entries = functools.cache(functools.partial(docstring_texts.read_entries, _report))
  images = functools.cache(functools.partial(_columns, directory, 'glyphs'))
  make = {'glyphs': lambda: glyphs.splits(_report), 'questions': lambda: glyph_questions.splits(images, _report),
          'videos': lambda: glyph_videos.splits(images, _report), 'digits': lambda: digits.splits(_report),
          'paragraphs': lambda: docstring_texts.paragraphs(entries(), _report),
          'pairs': lambda: docstring_texts.pairs(entries(), _report), 'corpus': lambda: _corpus(directory)}
  for name in names:
    start = time.perf_counter()
    if write_dataset(directory, file_dataset.embedded_folder(name), make[name]):
      _report(f'{name}: {time.perf_counter() - start:.0f} s')
  return len(names)


def _corpus(directory: str | os.PathLike[str]) -> Iterator[Split]:
  """Yields running text for masked language modeling: paragraphs, and in training also the names of glyphs."""
  for split in docstring_texts.SPLITS:
    texts = _columns(directory, 'paragraphs', split)['text']
    names = np.unique(_columns(directory, 'glyphs', split)['name']) if split == 'train' else texts[:0]
    yield split, {'text': np.concatenate([texts, names])}, {}


def _columns(directory: str | os.PathLike[str], name: str, split: str) -> Columns:
  """The columns of a split that is written; of an array the first frame."""
  records = file_dataset.load(name, directory, split)
  rows = records.map(lambda record: record, np.arange(records.size))
  value = lambda x: x[0, ..., 0] if isinstance(x, np.ndarray) else x
  return {column: np.array([value(row[column]) for row in rows]) for column in rows[0]}
