"""Synthetic records of benchmarks: TFDS mocks its datasets, own data has the columns of docs/guides/benchmarks.md."""

import contextlib
import functools
import pathlib
import threading

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.shards.file_dataset import FileDataset

EXAMPLES = 6


def answers(i: int) -> tuple[str, ...]:
  """Return ten answers, different for every example, so that a score shows which examples were counted."""
  first, second = np.roll(('yes', 'no', 'two', 'three'), i)[:2].tolist()
  return (first,) * (2 + i) + (second,) * (8 - i)


def _text(i: int, n: int = 6) -> str:
  return ' '.join(np.random.default_rng(i).choice(tiny.WORDS, n))


@functools.cache
def image(i: int) -> bytes:
  return own_files.encode_image(own_files.color_image('red', i, (20 + i, 30)))


@functools.cache
def _video(i: int) -> bytes:
  return own_files.npy_bytes(own_files.moving_bar(i % 2 == 0))


def _coco(i: int) -> dict:
  """COCO captions. The mock of TFDS gives the fields of its list of objects different lengths."""
  return {'image': image(i), 'image/filename': f'{i}.jpg', 'captions': {'text': [_text(i), _text(i + 100)]}}


def _serialize(record: dict) -> bytes:
  """Return a record as TFDS stores it; fields of lists and records in records have joined names."""
  example = tf.train.Example()

  def add(name, value):
    if isinstance(value, dict):
      for key, inner in value.items():
        add(f'{name}/{key}' if name else key, inner)
      return
    values = np.atleast_1d(value).tolist() if not isinstance(value, bytes) else [value]
    if isinstance(values[0], (str, bytes)):
      example.features.feature[name].bytes_list.value.extend(v if isinstance(v, bytes) else v.encode() for v in values)
    elif isinstance(values[0], int):
      example.features.feature[name].int64_list.value.extend(values)
  add('', record)
  return example.SerializeToString()


def _own(source: str) -> FileDataset:
  """Return records with the columns of a benchmark's own data."""
  name = source.removeprefix('own:')
  has_class, is_video = name in ('kinetics400', 'kinetics700', 'moments', 'imagenet21k'), name in (
      'kinetics400', 'kinetics700', 'moments', 'msvd', 'msrvtt')
  classes = {'label': ('n01', 'n02') if name == 'imagenet21k' else ('running fast', 'sitting')} if has_class else {}
  columns = {'video' if is_video else 'image': 'video' if is_video else 'image'}
  columns |= {'label': 'class'} if has_class else (
      {'question': 'text', 'answers': 'texts'} if name == 'vqa' else {'captions': 'texts'})
  columns = {'text': 'text'} if name == 'bookswiki' else columns
  value = {'image': image, 'video': _video, 'label': lambda i: classes['label'][i % 2], 'question': _text,
           'text': _text, 'answers': answers, 'captions': lambda i: (_text(i), _text(i + 100))}
  rows = lambda ids: [{c: value[c](i) for c in columns} for i in ids.tolist()]
  return FileDataset(source, EXAMPLES, rows, columns, classes, {}, source)


def write_class_names(folder: pathlib.Path) -> None:
  """Write the files of class names to a data directory."""
  names = folder / 'class_names'
  names.mkdir()
  wnids = tfds.builder('imagenet2012', data_dir=folder).info.features['label'].names
  (names / 'imagenet1k.tsv').write_text(''.join(f'{w}\tname {i}|other {i}\n' for i, w in enumerate(wnids)))
  (names / 'imagenet21k.tsv').write_text('n01\tdog|hound\nn02\tcat\n')
  (names / 'vqa_answers.tsv').write_text('yes\nno\n2\n3\n')


class _Local:
  """`Shards` that are in no bucket."""
  names = ()

  def __len__(self) -> int:
    return EXAMPLES


@contextlib.contextmanager
def records(monkeypatch):
  """Give every source `EXAMPLES` records, whatever is on the disk."""
  lock = threading.Lock()  # evaluators run in threads, and TFDS patches a class of its own while it opens a source

  def open_mocked(builder, _, split):
    images = {name: tfds.decode.SkipDecoding() for name, feature in builder.info.features.items()
              if isinstance(feature, tfds.features.Image)}
    with lock:
      source = builder.as_data_source(split, decoders=images or None)
    read = _coco if builder.name == 'coco_captions' else source.__getitem__
    return _Local(), lambda ids: [_serialize(read(int(i))) for i in ids]

  load_prepared = file_dataset._load_prepared
  mocked = lambda source, *rest: _own(source) if source.startswith(file_dataset.OWN) else load_prepared(source, *rest)
  for name, value in dict(_load_prepared=mocked, own_folder=lambda *_: '', _check_prepared=lambda *_: None,
                          _open=open_mocked).items():
    monkeypatch.setattr(file_dataset, name, value)
  with tfds.testing.mock_data(num_examples=EXAMPLES):
    yield
