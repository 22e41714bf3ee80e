"""What prepared data looks like: names in its folder, types of columns, and a record as bytes.

  data_dir/own/NAME/VERSION/      features and shards as TFDS lays them out; tfds.builder_from_directory(…) reads them
           embedded/NAME/VERSION/ the same, of the embedded data
                    prepared.json splits, columns, classes, shapes of arrays and fingerprints; of own data also
                                  statistics, skipped rows (first locations), identity of the input and the options
                    {split}-{column}.npy: class indices int32 [N], -1 for none; of texts their numbers int32 [N]
                    {split}-{column}.texts: a line each

Types of columns: 'image' and 'video' are bytes of files; 'array' is uint8 [T, H, W, C], which needs no decoding; 'text'
is a string, 'texts' a list of them, 'class' the name of a class, '' for none.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from uni_moe_jax.data.formats.rows import MEDIA_TYPES

OWN_FOLDER, EMBEDDED_FOLDER, SUMMARY = 'own', 'embedded', 'prepared.json'
VERSIONS = re.compile(r'\d+\.\d+\.\d+')
FORMAT = 5  # of prepared data; data of another format must be prepared again
TEXT_TYPES, TEXTS = ('text', 'texts'), '.texts'  # of columns, and the suffix of files with their texts
PIXEL_TYPES = (*MEDIA_TYPES, 'array')  # of columns; at most one column has one of them
# Versions of the embedded data (`data/embedded`). One changes with the content: an older folder is not read.
EMBEDDED = {'glyphs': '2.0.0', 'questions': '2.0.0', 'videos': '3.0.0', 'paragraphs': '2.0.0', 'pairs': '2.0.0',
            'corpus': '2.0.0', 'digits': '2.0.0'}

Record = dict[str, Any]


class CorruptExample(Exception):
  """A record that gives no example; the message is the reason."""


def serialize(values: Mapping[str, Any]) -> bytes:
  """A record as TFDS writes it, a tf.train.Example, of class indices, strings, lists of strings and bytes."""
  from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2
  features = {}
  for name, value in values.items():
    if isinstance(value, int):
      features[name] = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[value]))
    else:
      strings = [v.encode() if isinstance(v, str) else v for v in (value if isinstance(value, list) else [value])]
      features[name] = tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=strings))
  return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features)).SerializeToString(
      deterministic=True)


def example_parser(
    columns: Mapping[str, str], classes: Mapping[str, tuple[str, ...]], shapes: Mapping[str, tuple[int, ...]],
) -> Callable[[bytes], Record]:
  """Serialized tf.train.Example → the record of some columns. Images and videos stay encoded.

  The function raises CorruptExample.
  """
  from tensorflow.train import Example

  def get(feature, column, column_type):
    if column_type == 'class':
      [index] = feature.int64_list.value
      return classes[column][index] if index >= 0 else ''
    if column_type == 'texts':
      return tuple(text.decode() for text in feature.bytes_list.value)
    [value] = feature.bytes_list.value
    if column_type == 'array':
      return np.frombuffer(value, np.uint8).reshape(shapes[column])
    return value.decode() if column_type == 'text' else value

  def parse(example):
    try:
      features = Example.FromString(example).features.feature
      return {column: get(features[column], column, column_type) for column, column_type in columns.items()}
    except Exception as e:  # protobuf documents no closed set of errors for damaged bytes
      raise CorruptExample(f'a record that cannot be read ({e})') from e
  return parse
