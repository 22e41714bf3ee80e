"""Examples of records in files, decoded in parallel; a corrupt example is replaced in place.

A batch is one call of Python, which reads records and their texts, and TensorFlow ops that decode images. If an
example cannot be used, the batch is made again with the id `hash(seed, id, attempt)` in its position: the other
examples do not move, and the batch stays a function of (seed, step). In evaluation, it is an error.

Ops that find out which image is damaged cost as much as decoding a small one. So a batch is first made by ops that
fail at any damage, and only then by those.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data import hashing
from uni_moe_jax.data.batches import in_flight
from uni_moe_jax.data.examples import augmentations, file_dataset_features, image_transforms, phrases, video_pixels
from uni_moe_jax.data.examples.corrupt_examples import CorruptExampleCounter
from uni_moe_jax.data.examples.examples import Examples, Features, check_segments, mask_maker, move_images, subset
from uni_moe_jax.data.examples.video_processes import VideoProcesses
from uni_moe_jax.data.formats import video
from uni_moe_jax.data.formats.rows import LOCATION, MEDIA_TYPES
from uni_moe_jax.data.shards.file_dataset import CorruptExample, FileDataset, Record, example_parser
from uni_moe_jax.data.text import words
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.utils import cores
from uni_moe_jax.utils.errors import UsageError

_PNGS_AT_ONCE = 4  # in an iteration of a loop, which takes about 10 µs
_MAX_ATTEMPTS = 8  # to replace a corrupt example; if one in ten is corrupt, all fail with a probability of 1e-8


@dataclasses.dataclass(frozen=True)
class FileExampleBuilder:
  """Builds the examples of tasks over datasets in files.

  In training with random phrases, crops and masks; otherwise with the first phrase, the center crop, and every
  prediction masked. `random_special_tokens` and `seed`: as of `examples.Builder`.
  """
  tokenizer: Tokenizer
  keys: dict[str, tuple[str, ...]]  # named target set → what records call its classes, in order
  channels: int
  size: int  # side of the image in pixels
  training: bool
  random_special_tokens: bool
  seed: int
  max_corrupt_fraction: float  # of the examples that are read, before the run stops
  resize: str  # 'fast' or 'pillow', see `image_transforms`
  is_new: bool = True  # whether no checkpoint was trained with this config
  num_views: int = 1  # of every video in evaluation
  num_crops: int = 1
  video_processes: VideoProcesses = dataclasses.field(default_factory=VideoProcesses)

  def build(self, task: TaskSpec, records: FileDataset) -> Examples:
    """Examples of a task over one split. Raises UsageError if the config does not fit the source."""
    check_segments(task)
    corrupt_counter = CorruptExampleCounter(f'tasks.{task.name}', self.max_corrupt_fraction if self.training else 0.0)
    if task.type.readout == 'masked':
      return self._masked(task, records, corrupt_counter)
    batch, references = _Batch(self, task, records, corrupt_counter), None
    if records.columns.get(task.label_column) == 'texts':
      references = lambda ids: records.map(lambda record: record[task.label_column], batch.keep[ids])
    elif task.caption_templates:
      references = lambda ids: records.map(functools.partial(file_dataset_features.references, task), batch.keep[ids])
    return Examples(len(batch.keep), batch.make, references, corrupt_counter,
                    records.prefetch and (lambda ids: records.prefetch(batch.keep[ids])), batch.make_undamaged)

  def _masked(self, task: TaskSpec, records: FileDataset, corrupt_counter: CorruptExampleCounter) -> Examples:
    for field, off in dict(train_fraction=1, shots=0).items() if self.training else ():
      if (value := getattr(task, field)) != off:
        raise UsageError(
            f'config.tasks.{task.name}.{field}={value}: text in files is read as a stream and cannot be '
            f'subsampled; set it to {off}, or prepare a smaller file.')
    read = file_dataset_features.running_text(task, records, self.tokenizer, self.training, corrupt_counter)

    def read_undamaged(ids, hashes):
      num_read = []

      def count(number, corrupt):
        if corrupt:
          raise CorruptExample(corrupt[0])
        num_read.append(number)

      return read(ids, hashes, count), np.int64(sum(num_read))

    mask = lambda text: mask_maker(
        lambda *_: tf.ensure_shape(text, [None, task.max_len]), task, self.tokenizer, self.training,
        self.random_special_tokens)

    def make(ids, hashes):
      return mask(tf.numpy_function(read, [ids, hashes], tf.int32, stateful=False))(ids, hashes)

    def make_undamaged(ids, hashes):
      text, num_read = tf.numpy_function(read_undamaged, [ids, hashes], [tf.int32, tf.int64], stateful=False)
      return mask(text)(ids, hashes), tf.ensure_shape(num_read, [])

    return Examples(records.size, make, corrupt_counter=corrupt_counter, prefetch=records.prefetch,
                    make_undamaged=make_undamaged)


def example_ids(records: FileDataset, task: TaskSpec, seed: int | None = None) -> np.ndarray:
  """Ids of the records that are examples: of own data those with a label and the columns of templates, else all.

  A seed is of a run that trains on them; only then `train_fraction` and `shots` of the task apply.

  Raises:
    UsageError: there are none, or `shots` is set and labels are not known before records are read.
  """
  present = {c: labels >= 0 for c, labels in records.labels.items()} | {c: n > 0 for c, n in records.num_texts.items()}
  required = sorted(file_dataset_features.text_columns(task) & present.keys())
  keep = np.flatnonzero(np.all([np.ones(records.size, bool), *(present[column] for column in required)], axis=0))
  labels = None
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

  def __init__(
      self, builder: FileExampleBuilder, task: TaskSpec, records: FileDataset, corrupt_counter: CorruptExampleCounter):
    b = self._builder = builder
    self._task, self._records, self._corrupt_counter = task, records, corrupt_counter
    self.keep = example_ids(records, task, b.seed if b.training else None)
    self._phrases = None
    if file_dataset_features.has_phrase(task):
      self._phrases = phrases.open_phrases(task, records, b.tokenizer, b.training)
    self._readers = file_dataset_features.feature_readers(
        task, records, b.tokenizer, b.keys.get(task.target_set, ()), b.training, self._phrases is not None)
    self._media_column = records.media_column() if task.type.visual else None
    if task.type.visual and self._media_column is None:
      raise UsageError(f'config.tasks.{task.name}: source {task.source!r} has neither images nor videos; task type '
                       f'{task.type.name!r} needs them.')
    self._is_video = records.columns.get(self._media_column) == 'video'
    if self._is_video and task.num_frames < 1:
      raise UsageError(
          f'config.tasks.{task.name}.num_frames={task.num_frames}: source {task.source!r} has videos; set the number '
          'of frames that the model receives of each, for example 8.')
    if self._media_column:
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
    self._flips = b.training and task.random_flip
    self._mirror_words = (
        file_dataset_features.word_mirror(task.mirrored_words) if b.training and task.mirrored_words else None)
    self._tables = file_dataset_features.label_tables(
        task, records, b.keys.get(task.target_set, ()), self.keep, b.training)
    self._has_images = bool(self._media_column) and not self._is_video
    self._shape = [1, b.size, b.size, b.channels]  # of an image
    # TensorFlow takes an image from the bytes of its record, without Python's lock.
    self._read_examples = records.read_examples if self._has_images else None
    self._parse = example_parser(
        {c: t for c, t in records.columns.items() if t not in MEDIA_TYPES and c != LOCATION}, records.classes)
    self._specs = {name: (table.dtype, table.shape[1:]) for name, table in self._tables.items()}
    for reader in self._readers:
      self._specs |= reader.specs
    if self._phrases:
      self._specs |= file_dataset_features.phrase_specs(task)
    if self._is_video:
      self._specs['pixels'] = np.uint8, self._video_reader.shape
    # Traced once, and then inlined by pipelines of training and evaluation.
    self.make, self.make_undamaged = (
        tf.function(make, input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.uint64)])
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
    if self._has_images:
      features['pixels'] = self._decode(data, hashes)
    return {'id': tf.cast(ids, tf.int64), **features}, tf.size(ids, tf.int64)

  def _try(self, ids: tf.Tensor, hashes: tf.Tensor, is_new: tf.Tensor) -> tuple[Features, tf.Tensor]:
    """(features, ok bool [n]); those of corrupt examples are zeros, but for `label_tables` and phrases.

    is_new: bool [n], which to count.
    """
    problems, data, features = self._features(self._read, ids, hashes)
    if self._has_images:
      features['pixels'], decoded = self._decode_if_possible(data, hashes)
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
      features['pixels'] = move_images(features['pixels'], hashes, self._task)
    return [*(tf.ensure_shape(s, [None]) for s in strings), features]

  def _decode(self, data: tf.Tensor, hashes: tf.Tensor) -> tf.Tensor:
    """Decodes images: uint8 [n, 1, S, S, C]. Fails at a damaged one."""
    b, encoded, draws, n = self._builder, self._encoded(data), self._draws(hashes), tf.size(data)
    num_parts = -(-cores.available() // in_flight.num_in_flight())

    def decode_all(read, unroll):
      # A function that is not inlined is traced and optimized once, and costs nothing in the branch that is not taken.
      @functools.partial(tf.function, experimental_attributes={'_noinline': True})
      def decode_part(start, stop):
        # One after the other: handing each image to another thread would take as long as decoding a small one.
        images = tf.map_fn(
            lambda first: tf.stack([read(tf.minimum(first + i, n - 1)) for i in range(unroll)]),
            tf.range(start, stop, unroll), parallel_iterations=1,
            fn_output_signature=tf.TensorSpec([unroll, *self._shape[1:]], tf.uint8))
        images = tf.reshape(images, [-1, *self._shape])[:stop - start]
        return self._augment(images, hashes[start:stop])

      bounds = [tf.minimum(-(-n // unroll) * k // num_parts * unroll, n) for k in range(num_parts + 1)]
      return tf.concat([decode_part(*part) for part in itertools.pairwise(bounds)], 0)

    def decode_pngs():
      read = image_transforms.png_reader(encoded, b.channels, b.size, draws, self._task.crop)
      return decode_all(lambda i: self._flip(read(i), draws, i), _PNGS_AT_ONCE)

    def decode_any():
      return decode_all(lambda i: self._read_image(tf.gather(encoded, i), draws, i), 1)

    if b.resize != 'fast':
      return decode_any()
    return tf.cond(image_transforms.are_png(encoded), decode_pngs, decode_any)

  def _decode_if_possible(self, data: tf.Tensor, hashes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes images: (uint8 [n, 1, S, S, C], ok bool [n]); a damaged one is black."""
    draws, n = self._draws(hashes), tf.size(data)
    # Only a dataset can drop an element that fails. Images are numbered, which shows the missing ones.
    images = tf.data.Dataset.range(tf.cast(n, tf.int64), output_type=tf.int32).map(
        lambda i: (i, self._read_image(self._encoded(tf.gather(data, i)), draws, i)), cores.available(),
        deterministic=True).ignore_errors()
    sentinel = tf.data.Dataset.from_tensors((n, tf.zeros(self._shape[1:], tf.uint8)))
    index, images = images.concatenate(sentinel).batch(tf.cast(n, tf.int64) + 1).get_single_element()
    images = tf.scatter_nd(index[:, None], images, [n + 1, *self._shape[1:]])[:n]
    ok = tf.scatter_nd(index[:, None], tf.ones_like(index), [n + 1])[:n] > 0
    return self._augment(images[:, None], hashes), ok

  def _encoded(self, data: tf.Tensor) -> tf.Tensor:
    """The bytes of one or several images. Fails at a damaged record."""
    if not self._read_examples:
      return data
    return tf.io.parse_example(data, {self._media_column: tf.io.FixedLenFeature([], tf.string)})[self._media_column]

  def _draws(self, hashes: tf.Tensor) -> dict[str, tf.Tensor]:
    return image_transforms.draws(hashes, self._task.crop, self._task.min_crop_area) if self._builder.training else {}

  def _read_image(self, encoded: tf.Tensor, draws: dict[str, tf.Tensor], i: tf.Tensor) -> tf.Tensor:
    """uint8 [S, S, C] from the bytes of image i, mirrored or not."""
    b, draw = self._builder, {k: tf.gather(x, i) for k, x in draws.items()} or None
    image = image_transforms.read(encoded, b.channels, b.size, draw, self._task.crop, b.resize)
    return self._flip(image, draws, i)

  def _flip(self, image: tf.Tensor, draws: dict[str, tf.Tensor], i: tf.Tensor) -> tf.Tensor:
    return image_transforms.random_flip(image, {'flip': tf.gather(draws['flip'], i)}) if self._flips else image

  def _augment(self, pixels: tf.Tensor, hashes: tf.Tensor) -> tf.Tensor:
    """uint8 [n, 1, S, S, C] to the same shape."""
    t = self._task
    if self._builder.training:
      pixels = move_images(pixels, hashes, t)
    if self._builder.training and (t.randaugment or t.random_erasing):
      def augment(x):
        image, h = tf.ensure_shape(x[0][0], self._shape[1:]), x[1]
        image = augmentations.randaugment(image, h, t.randaugment) if t.randaugment else image
        return (augmentations.random_erasing(image, h, t.random_erasing) if t.random_erasing else image)[None]
      pixels = tf.map_fn(augment, (pixels, hashes), parallel_iterations=1,
                         fn_output_signature=tf.TensorSpec(self._shape, tf.uint8))
    return tf.ensure_shape(pixels, [None, *self._shape])

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
    records = file_dataset_features.read_or_stop(
        self._records, self.keep[ids], self._corrupt_counter, self._read_examples)
    if self._phrases:
      made = file_dataset_features.phrase_features(
          self._task, self._builder.tokenizer, *self._phrases(self.keep[ids], hashes))
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
