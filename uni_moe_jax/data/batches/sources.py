"""Sources by name. A new source is one function and one entry of `SOURCES`."""

import os
from collections.abc import Callable

import numpy as np

from uni_moe_jax.data.embedded import digits, docstring_texts, glyph_questions, glyph_videos, glyphs
from uni_moe_jax.data.examples.records import Records
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest


def load_corpus(directory: str | os.PathLike[str], split: str) -> Records:
  """Running text for masked language modeling: paragraphs, and in training also the names of glyphs."""
  columns = {'text': docstring_texts.load_paragraphs(directory, split).columns['text']}
  if split == 'train':
    names = np.unique(glyphs.load(directory, split).columns['name'])
    columns['text'] = np.concatenate([columns['text'], names])
  return Records(columns)


SOURCES: dict[str, Callable[[str, str], Records]] = {
    'glyphs': glyphs.load,
    'questions': glyph_questions.load,
    'videos': glyph_videos.load,
    'paragraphs': docstring_texts.load_paragraphs,
    'pairs': docstring_texts.load_pairs,
    'corpus': load_corpus,
    'digits': lambda _, split: digits.load(split),
}


def load(name: str, directory: str, split: str) -> Records | FileDataset:
  """Records of a named source: in memory, or in files for 'own:…' and 'tfds:…'.

  Raises:
    UsageError: unknown name or split. MissingFileError: the source is not prepared in the directory.
  """
  if name.startswith((file_dataset.OWN, file_dataset.TFDS)):
    return file_dataset.load(name, directory, split)
  if name not in SOURCES:
    raise UsageError(f"source {name!r} is unknown; {nearest(name, SOURCES)}. Your own prepared data is "
                     f"'{file_dataset.OWN}NAME', a TFDS dataset '{file_dataset.TFDS}NAME'.")
  return SOURCES[name](directory, split)
