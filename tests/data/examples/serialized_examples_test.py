"""Images whose records are read as bytes: TensorFlow takes the image of each, and Python the texts."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples.examples import ExampleBuilder
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer

SIDE = 16


def _record(i: int) -> dict:
  """An image of level i, and its class."""
  image = Image.new('RGB', (20, 20), (i, i, i))
  return {'image': own_files.encode_image(image, 'PNG'), 'label': 'ab'[i % 2]}


def _serialize(i: int) -> bytes:
  if i == 2:
    return b'no record'
  record, feature = _record(i), tf.train.Feature
  return tf.train.Example(features=tf.train.Features(feature={
      'image': feature(bytes_list=tf.train.BytesList(value=[record['image']])),
      'label': feature(int64_list=tf.train.Int64List(value=[i % 2]))})).SerializeToString()


def _make(dataset: FileDataset, ids, task_type: str, **fields):
  """(features, corrupt examples) of a batch of training."""
  c = tiny.config(data_dir='')
  c.target_sets.ab = config_lib.target_set(('a', 'b'), family='names')
  c.tasks.x = config_lib.task(task_type, 'own:x', batch_size=4, **fields)
  builder = ExampleBuilder(
      SentencePieceTokenizer(tiny.tokenizer_file()), {'ab': ('a', 'b')}, channels=3, size=SIDE, training=True,
      random_special_tokens=False, seed=0, max_corrupt_fraction=0.5, resize='fast')
  examples = builder.build(make_plan(c).tasks[0], dataset)
  ids = tf.constant(ids, tf.int64)
  features = examples.make(ids, hashing.example_hash(0, 'x', tf.constant(0, tf.int64), ids))
  return {k: v.numpy() for k, v in features.items()}, examples.corrupt_counter.num_corrupt


@pytest.mark.parametrize('labels_are_known', [False, True])
@pytest.mark.parametrize('task_type, fields', [
    ('image_classification', dict(target_set='ab', label_column='label')),
    ('image_retrieval', dict(caption_templates=('it is {label}',), max_len=8))])
def test_bytes_give_the_examples_of_records_and_those_that_are_none_are_replaced(task_type, fields, labels_are_known):
  labels = {'label': np.arange(40) % 2} if labels_are_known else {}
  records = FileDataset('own:x', 40, lambda ids: [_record(int(i)) for i in ids], {'image': 'image', 'label': 'class'},
                        {'label': ('a', 'b')}, labels, '')
  serialized = dataclasses.replace(records, read_examples=lambda ids: [_serialize(int(i)) for i in ids])
  expected, num_corrupt = _make(records, range(40), task_type, **fields)
  assert num_corrupt == 0
  made, num_corrupt = _make(serialized, range(8), task_type, **fields)
  assert num_corrupt == 1
  for k in expected:
    assert [np.array_equal(a, b) for a, b in zip(expected[k], made[k])][:2] == [True, True]
    np.testing.assert_array_equal(made[k][3:], expected[k][3:8])
  # The replacement is one example: the level of its image is its number.
  level = made['pixels'][2].reshape(-1)[0]
  assert level != 2
  for k in expected.keys() - {'id'}:
    np.testing.assert_array_equal(made[k][2], expected[k][level])


def test_the_records_of_a_small_split_are_read_once_and_those_that_cannot_be_read_are_tried_again():
  calls, broken = [], {7}

  def read(ids):
    calls.append(ids.tolist())
    if broken & set(ids.tolist()):
      raise OSError
    return [b'%d' % i for i in ids]

  kept = file_dataset.keep_records(read)
  assert kept(np.array([3, 1, 3])) == [b'3', b'1', b'3'] and kept(np.array([1, 2])) == [b'1', b'2']
  with pytest.raises(OSError):
    kept(np.array([1, 7]))
  broken.clear()
  assert kept(np.array([7, 2])) == [b'7', b'2']
  assert calls == [[3, 1, 3], [2], [7], [7]]
