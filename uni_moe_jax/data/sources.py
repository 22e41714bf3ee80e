"""Sources by name. A new source is one function and one entry of `SOURCES`."""

import os
from collections.abc import Callable

import numpy as np

from uni_moe_jax.data import clips, digits, glyphs, storage, stored, texts
from uni_moe_jax.data.records import Records
from uni_moe_jax.data.stored import Stored
from uni_moe_jax.tasks import nearest


def load_corpus(directory: str | os.PathLike[str], split: str) -> Records:
  """Running text for masked language modelling: paragraphs, and in training the names of glyphs too."""
  columns = {'text': texts.load_paragraphs(directory, split).columns['text']}
  if split == 'train':
    names = np.unique(glyphs.load(directory, split).columns['name'])
    columns['text'] = np.concatenate([columns['text'], names])
  return Records(columns, {}, storage.fingerprint(columns, {}))


SOURCES: dict[str, Callable[[str, str], Records]] = {
    'glyphs': glyphs.load,
    'clips': clips.load,
    'paragraphs': texts.load_paragraphs,
    'pairs': texts.load_pairs,
    'corpus': load_corpus,
    'digits': lambda _, split: digits.load(split),
}


def load(name: str, directory: str, split: str) -> Records | Stored:
  """Records of a named source: in memory, or in files for 'own:…' and 'tfds:…'.

  Raises:
    ValueError: unknown name or split. FileNotFoundError: the source is not prepared in the directory.
  """
  if stored.is_stored(name):
    return stored.load(name, directory, split)
  if name not in SOURCES:
    raise ValueError(f"source {name!r} is unknown; {nearest(name, SOURCES)}. Your own prepared data is '{stored.OWN}NAME', a TFDS "
                     f"data set '{stored.TFDS}NAME'.")
  return SOURCES[name](os.path.expanduser(directory), split)
