"""Invented records of the benchmarks' sources: TFDS mocks its own, and own data has the columns that docs/guides/benchmarks.md says."""

import contextlib
import functools
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.testing import mocking

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax.data.files import file_dataset
from uni_moe_jax.data.files.file_dataset import FileDataset

EXAMPLES = 6


def answers(i: int) -> tuple[str, ...]:
  """Ten answers of which every example has others, or others in number: a score tells which examples were counted."""
  first, second = np.roll(('yes', 'no', 'two', 'three'), i)[:2].tolist()
  return (first,) * (2 + i) + (second,) * (8 - i)


def _text(i: int, n: int = 6) -> str:
  return ' '.join(np.random.default_rng(i).choice(tiny.WORDS, n))


@functools.cache
def picture(i: int) -> bytes:
  return own_files.encode_image(own_files.color_image('red', i, (20 + i, 30)))


@functools.cache
def _clip(i: int) -> bytes:
  return own_files.npy_bytes(own_files.moving_bar(i % 2 == 0))


class _Coco:
  """COCO's captions: TFDS's own mock gives the parts of its list of objects different lengths."""

  def __len__(self):
    return EXAMPLES

  def __getitems__(self, keys):
    return [{'image': picture(i), 'image/filename': f'{i}.jpg', 'captions': {'text': [_text(i), _text(i + 100)]}} for i in keys]


def _own(source: str) -> FileDataset:
  """Records with the columns that a benchmark's own data has."""
  name = source.removeprefix('own:')
  by_class, clips = name in ('kinetics400', 'kinetics700', 'moments', 'imagenet21k'), name in (
      'kinetics400', 'kinetics700', 'moments', 'msvd', 'msrvtt')
  classes = {'label': ('n01', 'n02') if name == 'imagenet21k' else ('running fast', 'sitting')} if by_class else {}
  columns = {'video' if clips else 'image': 'video' if clips else 'image'}
  columns |= {'label': 'class'} if by_class else (
      {'question': 'text', 'answers': 'texts'} if name == 'vqa' else {'captions': 'texts'})
  columns = {'text': 'text'} if name == 'bookswiki' else columns
  value = {
      'image': picture, 'video': _clip, 'label': lambda i: classes['label'][i % 2], 'question': _text, 'text': _text,
      'answers': answers, 'captions': lambda i: (_text(i), _text(i + 100))}
  rows = lambda ids: [{c: value[c](i) for c in columns} for i in ids.tolist()]
  return FileDataset(source, EXAMPLES, rows, columns, classes, {}, source)


def write_class_names(folder: pathlib.Path) -> None:
  """The files of class names, into a data directory."""
  names = folder / 'class_names'
  names.mkdir()
  wnids = tfds.builder('imagenet2012', data_dir=folder).info.features['label'].names
  (names / 'imagenet1k.tsv').write_text(''.join(f'{w}\tname {i}|other {i}\n' for i, w in enumerate(wnids)))
  (names / 'imagenet21k.tsv').write_text('n01\tdog|hound\nn02\tcat\n')
  (names / 'vqa_answers.tsv').write_text('yes\nno\n2\n3\n')


@contextlib.contextmanager
def records(monkeypatch):
  """Every source has `EXAMPLES` records, whatever lies on the disk."""
  # As it is in TFDS 4.9.10, reading several records of a mocked source at once lacks an argument.
  monkeypatch.setattr(mocking, '_getitems', lambda keys, generator, **_: [generator[k] for k in keys])
  monkeypatch.setattr(file_dataset, '_load_own', lambda source, *_: _own(source))
  monkeypatch.setattr(file_dataset, '_check_prepared', lambda *_: None)
  opened = file_dataset._open
  monkeypatch.setattr(
      file_dataset, '_open', lambda builder, *rest: _Coco() if builder.name == 'coco_captions' else opened(builder, *rest))
  with tfds.testing.mock_data(num_examples=EXAMPLES):
    yield
