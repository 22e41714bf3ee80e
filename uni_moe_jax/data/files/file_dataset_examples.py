"""Examples of records in files, decoded in parallel; a corrupt example is replaced in place.

A batch is one call of Python, which reads records and their texts, and TensorFlow ops that decode images. If an
example cannot be used, the batch is made again with the id `hash(seed, id, attempt)` in its position: the other
examples do not move, and the batch stays a function of (seed, step). Evaluation replaces nothing: a corrupt example is
an error there, as any metric would count it wrongly.
"""

import concurrent.futures
import dataclasses
import os

import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data.files import file_dataset_features, image_transforms, video_pixels
from uni_moe_jax.data.files.file_dataset import CorruptExample, FileDataset, Record
from uni_moe_jax.data.files.file_dataset_features import FeatureReader
from uni_moe_jax.data.files.video import CorruptVideo
from uni_moe_jax.data.pipeline import hashing
from uni_moe_jax.data.pipeline.corrupt_examples import CorruptExampleCounter
from uni_moe_jax.data.pipeline.examples import Examples, Features, mask_maker, subset
from uni_moe_jax.data.pipeline.templates import template_columns
from uni_moe_jax.data.pipeline.tokenizer import Tokenizer
from uni_moe_jax.utils.errors import UsageError

_MAX_ATTEMPTS = 8  # to replace a corrupt example; if one in ten is corrupt, all fail with a probability of 1e-8


@dataclasses.dataclass(frozen=True)
class FileExampleBuilder:
  """Builds the examples of tasks over datasets in files.

  Attributes:
    tokenizer: of the run.
    keys: named target set → what records call its classes, in order.
    size: side of the image in pixels.
    channels: colors.
    training: random phrases, crops and masks; otherwise the first phrase, the center crop, and every prediction
      masked.
    random_special_tokens, seed: as of `examples.Builder`.
    max_corrupt_fraction: of the examples that are read, before the run stops.
    num_views, num_crops: of every video in evaluation.
  """
  tokenizer: Tokenizer
  keys: dict[str, tuple[str, ...]]
  size: int
  channels: int
  training: bool
  random_special_tokens: bool
  seed: int
  max_corrupt_fraction: float
  num_views: int = 1
  num_crops: int = 1

  def build(self, task: TaskSpec, records: FileDataset) -> Examples:
    """Examples of a task over one split. Raises UsageError if the config does not fit the source."""
    corrupt_counter = CorruptExampleCounter(f'tasks.{task.name}', self.max_corrupt_fraction if self.training else 0.0)
    if task.type.readout == 'masked':
      return self._masked(task, records, corrupt_counter)
    readers = self._readers(task, records)
    keep = example_ids(records, task, self.seed if self.training else None)
    references = None
    if records.columns.get(task.label_column) == 'texts':
      references = lambda ids: records.map(lambda record: record[task.label_column], keep[ids])
    elif task.caption_templates:
      references = lambda ids: records.map(lambda record: file_dataset_features.references(task, record), keep[ids])
    batch = _Batch(self, task, records, readers, keep, corrupt_counter)
    return Examples(len(keep), batch.make, references=references, corrupt_counter=corrupt_counter)

  def _readers(self, task: TaskSpec, records: FileDataset) -> list[FeatureReader]:
    readers = []
    if task.type.has_classes:
      readers.append(file_dataset_features.label_reader(task, records, self.keys[task.target_set]))
    if task.type.target == 'pair':
      readers.append(file_dataset_features.pair_reader(task, records, self.tokenizer, self.training))
    if task.type.readout == 'queries':
      readers.append(file_dataset_features.caption_reader(task, records, self.tokenizer, self.training))
    if task.type.readout == 'slot':
      readers.append(file_dataset_features.template_reader(task, records, self.tokenizer))
    return readers

  def _masked(self, task: TaskSpec, records: FileDataset, corrupt_counter: CorruptExampleCounter) -> Examples:
    if self.training and task.train_fraction < 1:
      raise UsageError(
          f'config.tasks.{task.name}.train_fraction={task.train_fraction}: text in files is read as a stream, of '
          'which no fraction can be taken; set it to 1, or prepare a smaller file.')
    stream = file_dataset_features.TextStream.create(task, records, self.tokenizer, self.training, corrupt_counter)

    def make_text(ids, hashes):
      text = tf.numpy_function(stream.rows, [ids, hashes], tf.int32, stateful=False)
      return tf.ensure_shape(text, [None, task.max_len])

    make = mask_maker(make_text, task, self.tokenizer, self.training, self.random_special_tokens)
    return Examples(records.size, make, corrupt_counter=corrupt_counter)


def example_ids(records: FileDataset, task: TaskSpec, seed: int | None = None) -> np.ndarray:
  """Ids of the records that are examples: those with a label and the columns of templates.

  Whether a record has them is known in advance only for own data; otherwise all ids are returned.

  Args:
    records: of the task's split.
    task: with its `train_fraction` and `shots`.
    seed: of a run that trains on them and takes the subset; None for all records.

  Raises:
    UsageError: there are none, or `shots` is set and labels are not known before records are read.
  """
  templates = (*task.caption_templates, task.template)
  columns = {task.label_column, *(column for template in templates for column in template_columns(template))}
  present = {**{c: labels >= 0 for c, labels in records.labels.items()}, **records.present}
  required = sorted(columns & present.keys())
  keep, labels = np.arange(records.size), None
  for column in required:
    keep = keep[present[column][keep]]
  if task.label_column in records.labels:
    labels = records.labels[task.label_column][keep]
  elif task.shots and seed is not None:
    raise UsageError(
        f'config.tasks.{task.name}.shots={task.shots}: the labels of source {task.source!r} are known only when its '
        f'records are read; set config.tasks.{task.name}.shots=0 and train_fraction, or prepare the source as your own '
        'data with one class per record.')
  if not len(keep):
    raise UsageError(f'config.tasks.{task.name}: no record of source {task.source!r}, split {task.split!r}, has '
                     f'{" and ".join(map(repr, required)) or "anything"}.')
  return keep if seed is None else subset(keep, labels, task, seed)


class _Batch:
  """Makes the batches of one task."""

  def __init__(self, builder: FileExampleBuilder, task: TaskSpec, records: FileDataset, readers: list[FeatureReader],
               keep: np.ndarray, corrupt_counter: CorruptExampleCounter):
    self._builder, self._task, self._records = builder, task, records
    self._readers, self._keep, self._corrupt_counter = readers, keep, corrupt_counter
    self._media_column = records.media_column() if task.type.visual else None
    if task.type.visual and self._media_column is None:
      raise UsageError(f'config.tasks.{task.name}: source {task.source!r} has neither images nor videos; task type '
                       f'{task.type.name!r} needs them.')
    self._is_video = self._media_column is not None and records.columns[self._media_column] == 'video'
    if self._is_video and task.num_frames < 1:
      raise UsageError(
          f'config.tasks.{task.name}.num_frames={task.num_frames}: source {task.source!r} has videos; set the number '
          'of frames that the model receives of each, for example 8.')
    self._video_reader = video_pixels.VideoReader(
        builder.size, task.num_frames, task.crop, task.random_flip, builder.training, builder.num_views,
        builder.num_crops)
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())  # starts its threads with the first video
    self._specs = {name: spec for r in readers for name, spec in r.specs.items()}
    if self._is_video:
      self._specs['pixels'] = (np.uint8, self._video_reader.shape)
    # Traced once: an evaluation calls it eagerly, a training pipeline inlines it.
    self.make = tf.function(
        self._make, input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.uint64)])

  def _make(self, ids: tf.Tensor, hashes: tf.Tensor) -> Features:
    features, ok = self._try(ids, hashes, tf.ones_like(ids, tf.bool))
    if self._builder.training:
      features = self._replace_corrupt(ids, hashes, features, ok)
    return {'id': tf.cast(ids, tf.int64), **features}

  def _replace_corrupt(self, ids: tf.Tensor, hashes: tf.Tensor, features: Features, ok: tf.Tensor) -> Features:
    """Makes the whole batch again until every example can be used, which is rare."""
    seed = hashing.mix_constant(self._builder.seed, self._task.name, 'replacement')
    names = list(features)

    def is_incomplete(attempt, _, ok, *__):
      return (attempt < _MAX_ATTEMPTS) & ~tf.reduce_all(ok)

    def retry(attempt, candidates, ok, *_):
      drawn = hashing.mix_tensor(hashing.mix_tensor(tf.fill(tf.shape(ids), seed), ids), attempt)
      candidates = tf.where(ok, candidates, tf.cast(hashing.randint(drawn, len(self._keep)), tf.int64))
      features, now_ok = self._try(candidates, hashes, ~ok)
      return attempt + 1, candidates, now_ok, *[features[n] for n in names]

    state = (tf.constant(1), ids, ok, *[features[n] for n in names])
    _, _, ok, *values = tf.while_loop(is_incomplete, retry, state, parallel_iterations=1)
    tf.numpy_function(self._give_up_unless, [ok], tf.bool)
    return dict(zip(names, values, strict=True))

  def _give_up_unless(self, ok: np.ndarray) -> np.bool_:
    if not ok.all():
      self._corrupt_counter.fail_replacement()
    return np.bool_(True)

  def _try(self, ids: tf.Tensor, hashes: tf.Tensor, is_new: tf.Tensor) -> tuple[Features, tf.Tensor]:
    """(features, ok bool [n]); features of corrupt examples are zeros. is_new: bool [n], which to count."""
    types = [tf.string, tf.string] + [dtype for dtype, _ in self._specs.values()]
    problems, data, *values = tf.numpy_function(self._read, [ids, hashes], types)
    features = {name: tf.ensure_shape(value, [None, *shape])
                for (name, (_, shape)), value in zip(self._specs.items(), values, strict=True)}
    if self._media_column and not self._is_video:
      data.set_shape([None])
      features['pixels'], decoded = decode(data, hashes, self._image, self._builder.size, self._builder.channels)
      problems = tf.where((problems == '') & ~decoded, 'corrupt image', problems)
    ok = tf.numpy_function(self._count, [ids, is_new, problems], tf.bool)
    ok.set_shape([None])
    return features, ok

  def _image(self, data: tf.Tensor, h: tf.Tensor) -> tf.Tensor:
    """uint8 [1, S, S, C] of one encoded image: a video of one frame."""
    b, t = self._builder, self._task
    image = tf.io.decode_image(data, channels=b.channels, expand_animations=False)
    return image_transforms.transform(
        image, b.size, h if b.training else None, t.crop, t.random_flip, t.randaugment, t.random_erasing)[None]

  def _read(self, ids: np.ndarray, hashes: np.ndarray):
    """Problems ('' for none), encoded images, and the features of `_specs` in order."""
    n = len(ids)
    problems, data = np.full(n, b'', object), np.full(n, b'', object)
    features = {name: np.zeros((n, *shape), dtype) for name, (dtype, shape) in self._specs.items()}
    records = file_dataset_features.read_or_stop(self._records, self._keep[ids], self._corrupt_counter)
    # In parallel: decoders and Pillow release Python's lock.
    videos = self._pool.map(self._video, records, hashes.tolist()) if self._is_video else [None] * n
    for i, (record, h, video) in enumerate(zip(records, hashes.tolist(), videos, strict=True)):
      try:
        if isinstance(record, CorruptExample):
          raise record
        for reader in self._readers:
          for name, value in reader.read(record, h).items():
            features[name][i] = value
        if isinstance(video, CorruptVideo):
          raise video
        if self._is_video:
          features['pixels'][i] = video
        elif self._media_column:
          data[i] = record[self._media_column]
      except (CorruptExample, CorruptVideo) as e:
        problems[i] = str(e).encode(errors='backslashreplace')
    return problems, data, *features.values()

  def _video(self, record: Record | CorruptExample, h: int) -> np.ndarray | CorruptVideo | None:
    try:
      return None if isinstance(record, CorruptExample) else self._video_reader(record[self._media_column], h)
    except CorruptVideo as e:
      return e

  def _count(self, ids: np.ndarray, is_new: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """Counts new examples and reports the corrupt ones; returns which can be used."""
    corrupt = [f'{self._records.location(int(self._keep[ids[i]]))}: {problems[i].decode()}'
               for i in np.flatnonzero(is_new & (problems != b''))]
    self._corrupt_counter.count(int(is_new.sum()), corrupt)
    return problems == b''


def decode(data: tf.Tensor, hashes: tf.Tensor, decode_one, size: int, channels: int) -> tuple[tf.Tensor, tf.Tensor]:
  """Decodes the images of a batch in parallel.

  Args:
    data: bytes [n].
    hashes: uint64 [n].
    decode_one: (bytes, hash) → uint8 [1, size, size, channels]; if it raises, only that image is lost.

  Returns:
    (pixels uint8 [n, 1, size, size, channels], ok bool [n]); an image that is not ok is black.
  """
  shape, n = [1, size, size, channels], tf.shape(data)[0]
  images = tf.data.Dataset.from_tensor_slices((tf.range(n), data, hashes)).map(
      lambda i, d, h: (i, tf.ensure_shape(decode_one(d, h), shape)),
      num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
  # Only a dataset can drop an element that fails. Images are numbered, which shows the missing ones.
  sentinel = tf.data.Dataset.from_tensors((n, tf.zeros(shape, tf.uint8)))
  batch = images.ignore_errors().concatenate(sentinel).batch(tf.cast(n, tf.int64) + 1)
  index, pixels = batch.get_single_element()
  position = tf.scatter_nd(index[:, None], tf.range(1, tf.size(index) + 1), [n + 1])[:n]  # 0: missing
  ok = position > 0
  pixels = tf.gather(pixels, tf.maximum(position - 1, 0))
  pixels = tf.where(ok[:, None, None, None, None], pixels, tf.constant(0, tf.uint8))
  return tf.ensure_shape(pixels, [None, *shape]), ok
