"""Examples of a task, as features that a pipeline can batch; a corrupt example is replaced in place.

A batch is one call of Python, which reads records and their texts (`features.py`), and TensorFlow ops that make pixels
(`pixels.py`). If an example cannot be used, the batch is made again with the id `hash(seed, id, attempt)` in its
position: the other examples do not move, and the batch stays a function of (seed, step). In evaluation, it is an error.

Ops that find out which image is damaged cost as much as decoding a small one. So a batch is first made by ops that
fail at any damage, and only then by those.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples import features as features_lib
from uni_moe_jax.data.examples import image_transforms, masking, phrases, pixels, video_pixels
from uni_moe_jax.data.examples.corrupt_examples import CorruptExampleCounter, read_or_stop
from uni_moe_jax.data.examples.running_text import running_text
from uni_moe_jax.data.examples.video_processes import VideoProcesses
from uni_moe_jax.data.formats import video
from uni_moe_jax.data.formats.rows import LOCATION, MEDIA_TYPES
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.shards.record_format import PIXEL_TYPES, CorruptExample, Record, example_parser
from uni_moe_jax.data.text import words
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.utils import splitmix
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_MAX_ATTEMPTS = 8  # to replace a corrupt example; if one in ten is corrupt, all fail with a probability of 1e-8

Features = dict[str, tf.Tensor]
MakeFeatures = Callable[[tf.Tensor, tf.Tensor], Features]  # (ids int64 [n], hashes uint64 [n]) → features
References = Callable[[np.ndarray], list[tuple[str, ...]]]  # ids int [n] → the correct texts of each example


@dataclasses.dataclass(frozen=True)
class Examples:
  """Examples of a task. references: of captions, pairs and questions with a list of answers."""
  size: int
  make: MakeFeatures
  references: References | None = None
  corrupt_counter: CorruptExampleCounter = CorruptExampleCounter('', 0.0)  # the default counts none: all can be used
  prefetch: Callable[[np.ndarray], None] | None = None  # ids in the order in which they will be made
  # Faster, but fails at a corrupt example and counts none: (features, number of records that were read, int64).
  make_undamaged: Callable[[tf.Tensor, tf.Tensor], tuple[Features, tf.Tensor]] | None = None

  def make_uncounted(self, undamaged: bool, ids: tf.Tensor, hashes: tf.Tensor) -> tuple[Features, tf.Tensor]:
    """As `make_undamaged`, if there is one and it is wanted; else as `make`, which leaves no record to count."""
    if undamaged and self.make_undamaged:
      return self.make_undamaged(ids, hashes)
    return self.make(ids, hashes), tf.constant(0, tf.int64)


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
  """Builds the examples of tasks.

  In training with random phrases, crops and masks, and with words left out; otherwise with the first phrase, the center
  crop, and every prediction masked.
  """
  tokenizer: Tokenizer
  keys: dict[str, tuple[str, ...]]  # named target set → what records call its classes, in order
  channels: int
  size: int  # side of the image in pixels
  training: bool
  random_special_tokens: bool  # masked language modeling may replace words by special tokens (published)
  seed: int  # of the run; it chooses subsets of the training examples
  max_corrupt_fraction: float  # of the examples that are read, before the run stops
  resize: str  # 'fast' or 'pillow', see `image_transforms`
  is_new: bool = True  # whether no checkpoint was trained with this config
  num_views: int = 1  # of every video in evaluation
  num_crops: int = 1
  video_processes: VideoProcesses = dataclasses.field(default_factory=VideoProcesses)

  def build(self, task: TaskSpec, records: FileDataset) -> Examples:
    """Examples of a task over one split. Raises UsageError if the config does not fit the source."""
    features_lib.check_segments(task)
    corrupt_counter = CorruptExampleCounter(f'tasks.{task.name}', self.max_corrupt_fraction if self.training else 0.0)
    if task.type.readout == 'masked':
      return self._masked(task, records, corrupt_counter)
    batch, references = _Batch(self, task, records, corrupt_counter), None
    if records.columns.get(task.label_column) == 'texts':
      references = lambda ids: records.map(lambda record: record[task.label_column], batch.keep[ids])
    elif task.caption_templates:
      references = lambda ids: records.map(functools.partial(features_lib.references, task), batch.keep[ids])
    return Examples(len(batch.keep), batch.make, references, corrupt_counter,
                    records.prefetch and (lambda ids: records.prefetch(batch.keep[ids])), batch.make_undamaged)

  def _masked(self, task: TaskSpec, records: FileDataset, corrupt_counter: CorruptExampleCounter) -> Examples:
    keep = example_ids(records, task, self.seed if self.training else None)
    read = running_text(task, records, keep, self.tokenizer, self.training, corrupt_counter)

    def read_undamaged(ids, hashes):
      num_read = []

      def count(number, corrupt):
        if corrupt:
          raise CorruptExample(corrupt[0])
        num_read.append(number)

      return read(ids, hashes, count), np.int64(sum(num_read))

    def mask(text, ids, hashes):
      text = tf.ensure_shape(text, [None, task.max_len])
      masked = masking.mask_words(
          text, hashes, self.tokenizer, max_predictions=task.max_predictions, always_mask=not self.training,
          random_special_tokens=self.random_special_tokens)
      return {'id': tf.cast(ids, tf.int64), 'text_valid': tf.ones_like(text, tf.bool), **masked}

    def make(ids, hashes):
      return mask(tf.numpy_function(read, [ids, hashes], tf.int32, stateful=False), ids, hashes)

    def make_undamaged(ids, hashes):
      text, num_read = tf.numpy_function(read_undamaged, [ids, hashes], [tf.int32, tf.int64], stateful=False)
      return mask(text, ids, hashes), tf.ensure_shape(num_read, [])

    return Examples(len(keep), make, None, corrupt_counter,
                    records.prefetch and (lambda ids: records.prefetch(keep[ids])), make_undamaged)


def subset(indices: np.ndarray, labels: np.ndarray | None, task: TaskSpec, seed: int) -> np.ndarray:
  """Chooses a task's training examples, by `train_fraction` or `shots`, in order.

  The choice is a function of the seed and of each example's index in its split. Those with the lowest hashes are taken,
  so a smaller subset is part of a larger one. Every class is sampled separately, where there are `labels` of the
  examples.
  """
  if task.train_fraction == 1 and not task.shots:
    return indices
  hashes = splitmix.mix(seed, task.source, task.split, 'subset', indices.astype(np.uint64))
  labels = np.zeros(len(indices), int) if labels is None else labels
  _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  order = np.lexsort((hashes, classes))  # class by class
  rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  # Slightly less than the product: .07 · 100 is 7.000000000000001.
  numbers = np.full(len(sizes), task.shots) if task.shots else np.ceil(task.train_fraction * sizes * (1 - 1e-12))
  return indices[np.sort(order[rank < np.repeat(numbers, sizes)])]


def example_ids(records: FileDataset, task: TaskSpec, seed: int | None = None) -> np.ndarray:
  """Ids of the records that are examples: of own data those with a label and the columns of templates, else all.

  A seed is of a run that trains on them; only then `train_fraction` and `shots` of the task apply.

  Raises:
    UsageError: there are none, or `shots` is set and labels are not known before records are read.
  """
  present = {c: labels >= 0 for c, labels in records.labels.items()} | {c: n > 0 for c, n in records.num_texts.items()}
  required = sorted(features_lib.text_columns(task) & present.keys())
  keep = np.flatnonzero(np.all([np.ones(records.size, bool), *(present[column] for column in required)], axis=0))
  labels = None
  if task.label_column in records.labels:
    labels = records.labels[task.label_column][keep]
  elif task.shots and seed is not None:
    if task.label_column not in records.columns:
      raise UsageError(f'config.tasks.{task.name}.label_column={task.label_column!r} is no column of source '
                       f'{task.source!r}; {nearest(task.label_column, records.columns)}.')
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

  def __init__(
      self, builder: ExampleBuilder, task: TaskSpec, records: FileDataset, corrupt_counter: CorruptExampleCounter):
    b = self._builder = builder
    self._task, self._records, self._corrupt_counter = task, records, corrupt_counter
    self.keep = example_ids(records, task, b.seed if b.training else None)
    self._phrases = None
    if features_lib.has_phrase(task):
      self._phrases = phrases.open_phrases(task, records, b.tokenizer, b.training)
    self._readers = features_lib.feature_readers(
        task, records, b.tokenizer, b.keys.get(task.target_set, ()), b.training, self._phrases is not None)
    self._media_column = records.media_column() if task.type.visual else None
    if task.type.visual and self._media_column is None:
      raise UsageError(f'config.tasks.{task.name}: source {task.source!r} has neither images nor videos; task type '
                       f'{task.type.name!r} needs them.')
    self._is_video = records.columns.get(self._media_column) == 'video'  # in files; arrays of frames are as images
    if self._is_video and task.num_frames < 1:
      raise UsageError(
          f'config.tasks.{task.name}.num_frames={task.num_frames}: source {task.source!r} has videos; set the number '
          'of frames that the model receives of each, for example 8.')
    if records.columns.get(self._media_column) in MEDIA_TYPES:
      has, other, fields = (('videos', 'images', ('randaugment', 'random_erasing')) if self._is_video else
                            ('images', 'videos', ('num_frames',) if b.is_new else ()))  # or it could not continue
      if field := next(filter(functools.partial(getattr, task), fields), ''):
        raise UsageError(f'config.tasks.{task.name}.{field}={getattr(task, field)}: source {task.source!r} has {has}, '
                         f'and it is for {other}; set it to 0.')
    if self._is_video:
      [first] = records.read_valid(self.keep[:1])
      if not isinstance(first, CorruptExample):
        video.check_decoder(first[self._media_column])  # in a thread of TensorFlow the error would be a traceback
    self._video_reader = video_pixels.VideoReader(
        b.size, task.num_frames, task.crop, task.random_flip, b.training, b.num_views, b.num_crops, task.frame_stride,
        task.min_crop_area, b.channels)
    self._mirror_words = (
        features_lib.word_mirror(task.mirrored_words) if b.training and task.mirrored_words else None)
    self._tables = features_lib.label_tables(
        task, records, b.keys.get(task.target_set, ()), self.keep, b.training)
    self._pixels = None
    if self._media_column and not self._is_video:
      self._pixels = pixels.Pixels(task, records, b.size, b.channels, b.training, b.resize)
    # TensorFlow takes an image from the bytes of its record, without Python's lock.
    self._read_examples = records.read_examples if self._pixels else None
    self._parse = example_parser(
        {c: t for c, t in records.columns.items() if t not in PIXEL_TYPES and c != LOCATION}, records.classes, {})
    self._specs = {name: (table.dtype, table.shape[1:]) for name, table in self._tables.items()}
    for reader in self._readers:
      self._specs |= reader.specs
    if self._phrases:
      self._specs |= features_lib.phrase_specs(task)
    if self._is_video:
      self._specs['pixels'] = np.uint8, self._video_reader.shape
    # Traced once, and then inlined by pipelines of training and evaluation.
    self.make, self.make_undamaged = (
        tf.function(make, input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.uint64)],
                    autograph=False)
        for make in (self._make, self._make_undamaged))

  def _make(self, ids: tf.Tensor, hashes: tf.Tensor) -> Features:
    features, ok = self._try(ids, hashes, tf.ones_like(ids, tf.bool))
    if self._builder.training:
      features = self._replace_corrupt(ids, hashes, features, ok)
    return {'id': tf.cast(ids, tf.int64), **features}

  def _replace_corrupt(self, ids: tf.Tensor, hashes: tf.Tensor, features: Features, ok: tf.Tensor) -> Features:
    """Makes the whole batch again until every example can be used, which is rare."""
    seed = hashing.mix_constant(self._builder.seed, self._task.name, 'replacement')

    def is_incomplete(attempt, _, ok, __):
      return (attempt < _MAX_ATTEMPTS) & ~tf.reduce_all(ok)

    def retry(attempt, candidates, ok, _):
      drawn = hashing.mix_tensor(hashing.mix_tensor(tf.fill(tf.shape(ids), seed), ids), attempt)
      candidates = tf.where(ok, candidates, tf.cast(hashing.randint(drawn, len(self.keep)), tf.int64))
      features, now_ok = self._try(candidates, hashes, ~ok)
      return attempt + 1, candidates, now_ok, features

    _, _, ok, features = tf.while_loop(is_incomplete, retry, (tf.constant(1), ids, ok, features), parallel_iterations=1)
    tf.numpy_function(self._give_up_unless, [ok], tf.bool)
    return features

  def _give_up_unless(self, ok: np.ndarray) -> np.bool_:
    if not ok.all():
      self._corrupt_counter.has_no_replacement = True
    return np.bool_(True)

  def _make_undamaged(self, ids: tf.Tensor, hashes: tf.Tensor) -> tuple[Features, tf.Tensor]:
    data, features = self._features(self._read_undamaged, ids, hashes)
    if self._pixels:
      features['pixels'] = self._pixels.decode(data, hashes)
    return {'id': tf.cast(ids, tf.int64), **features}, tf.size(ids, tf.int64)

  def _try(self, ids: tf.Tensor, hashes: tf.Tensor, is_new: tf.Tensor) -> tuple[Features, tf.Tensor]:
    """(features, ok bool [n]); those of corrupt examples are zeros, but for `label_tables` and phrases.

    is_new: bool [n], which to count.
    """
    problems, data, features = self._features(self._read, ids, hashes)
    if self._pixels:
      features['pixels'], decoded = self._pixels.decode_if_possible(data, hashes)
      problems = tf.where((problems == '') & ~decoded, 'corrupt image', problems)
    ok = tf.numpy_function(self._count, [ids, is_new, problems], tf.bool)
    ok.set_shape([None])
    return features, ok

  def _features(self, read: Callable[..., Any], ids: tf.Tensor, hashes: tf.Tensor) -> list[Any]:
    """What `read` (`_read` or `_read_undamaged`) returns, with the last ones as features."""
    first = [tf.string] * (2 if read == self._read else 1)
    made = tf.numpy_function(read, [ids, hashes], first + [dtype for dtype, _ in self._specs.values()])
    strings, values = made[:len(first)], made[len(first):]
    features = {name: tf.ensure_shape(value, [None, *shape])
                for (name, (_, shape)), value in zip(self._specs.items(), values, strict=True)}
    features = words.drop_words(features, hashes, self._task, self._builder.tokenizer)
    if self._is_video and self._builder.training:
      features['pixels'] = pixels.move(features['pixels'], hashes, self._task)
    return [*(tf.ensure_shape(s, [None]) for s in strings), features]

  def _read_undamaged(self, ids: np.ndarray, hashes: np.ndarray):
    """As `_read`, but for the problems. Raises CorruptExample."""
    problems, *values = self._read(ids, hashes)
    if (problems != b'').any():
      raise CorruptExample
    return values

  def _read(self, ids: np.ndarray, hashes: np.ndarray):
    """Problems ('' for none), images (see `_example`), and the features of `_specs` in order."""
    n = len(ids)
    problems, data = np.full(n, b'', object), np.full(n, b'', object)
    features = {name: self._tables[name][ids] if name in self._tables else np.zeros((n, *shape), dtype)
                for name, (dtype, shape) in self._specs.items()}
    records = read_or_stop(self._records, self.keep[ids], self._corrupt_counter, self._read_examples)
    if self._phrases:
      made = features_lib.phrase_features(self._task, self._builder.tokenizer, *self._phrases(self.keep[ids], hashes))
      for name, value in made.items():
        features[name][:] = value
    examples = list(map(self._example, records, hashes.tolist()))
    if self._is_video:
      examples = self._read_videos(examples, hashes, features['pixels'])
    usable = [i for i, example in enumerate(examples) if not isinstance(example, Exception)]
    for i in set(range(n)).difference(usable):
      problems[i] = str(examples[i]).encode(errors='backslashreplace')
    contents, media = zip(*(examples[i] for i in usable)) if usable else ((), ())
    if usable and not self._is_video:
      data[usable] = np.array(media, object)
    for reader, values in zip(self._readers, zip(*contents)):
      for name, value in reader.collate(values).items():
        features[name][usable] = value
    return problems, data, *features.values()

  def _example(self, record: Record | bytes | CorruptExample, h: int) -> tuple[list[Any], Any] | Exception:
    """(contents by reader; an encoded image or video, or a serialized example) of a record, or its problem."""
    try:
      if isinstance(record, CorruptExample):
        return record
      media = record if self._read_examples else record.get(self._media_column, b'')
      contents = []
      if self._readers:
        record = self._parse(record) if self._read_examples else record
        if self._mirror_words and (video_pixels if self._is_video else image_transforms).is_mirrored(h):
          record = self._mirror_words(record)
        contents = [reader.read(record, h) for reader in self._readers]
      return contents, media
    except CorruptExample as e:
      return e

  def _read_videos(
      self, examples: list[tuple[list[Any], Any] | Exception], hashes: np.ndarray, pixels: np.ndarray) -> list[Any]:
    """Writes the frames of each video to its row of `pixels`. Returns the examples, or the problem with their video."""
    usable = [i for i, example in enumerate(examples) if not isinstance(example, Exception)]
    problems = self._builder.video_processes.read(
        self._video_reader, [examples[i][1] for i in usable], hashes[usable].tolist(), [pixels[i] for i in usable])
    problems = {i: problem for i, problem in zip(usable, problems, strict=True) if problem}
    return [problems.get(i, example) for i, example in enumerate(examples)]

  def _count(self, ids: np.ndarray, is_new: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """Counts new examples and reports the corrupt ones; returns which can be used."""
    corrupt = [f'{self._records.location(int(self.keep[ids[i]]))}: {problems[i].decode()}'
               for i in np.flatnonzero(is_new & (problems != b''))]
    self._corrupt_counter.count(int(is_new.sum()), corrupt)
    return problems == b''
