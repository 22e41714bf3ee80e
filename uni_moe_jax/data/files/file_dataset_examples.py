"""Examples of records in files: raw bytes are fetched by id, decoded in parallel, and a bad example is replaced in place.

A batch is one call of Python, which reads the records and their texts, and TensorFlow ops that decode pictures. If some example
cannot be used, the batch is made once more with the id `hash(seed, id, attempt)` in its place: nothing shifts, and the batch
stays a function of (seed, step). Evaluation never replaces: there a bad example is an error, as it would be counted wrongly.
"""

import concurrent.futures
import dataclasses
import os

import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data.files import file_dataset_fields, image_transforms, video_pixels
from uni_moe_jax.data.files.file_dataset import CorruptExample, FileDataset
from uni_moe_jax.data.files.video import CorruptVideo
from uni_moe_jax.data.pipeline import hashing, masking
from uni_moe_jax.data.pipeline.corrupt_examples import CorruptExampleCounter
from uni_moe_jax.data.pipeline.examples import Examples, subset
from uni_moe_jax.data.pipeline.templates import template_columns
from uni_moe_jax.data.pipeline.tokenizer import Tokenizer
from uni_moe_jax.utils.errors import UsageError

_ATTEMPTS = 8  # until nothing takes the place of a bad example; of a source with one in ten bad, 1e-8 of them

_Fetched = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class FileExampleBuilder:
  """What all tasks share.

  Attributes:
    tokenizer: of the run. keys: of each named target set, in order, what a record calls its classes.
    size, channels: pixels a side, colours.
    training: random phrases, crops and masks; otherwise the first phrase, the middle crop, every pick masked.
    random_special_tokens, seed: as of `examples.Builder`.
    max_corrupt_fraction: of the examples that are read, before the run stops.
    num_views, num_crops: at evaluation, of every clip.
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
    """Examples of a task over one split of its source. Raises UsageError where the config does not fit the source."""
    corrupt_counter = CorruptExampleCounter(f'tasks.{task.name}', self.max_corrupt_fraction if self.training else 0.0)
    if task.type.readout == 'masked':
      if self.training and task.train_fraction < 1:
        raise UsageError(f'config.tasks.{task.name}.subset={task.train_fraction}: text of files is read as a stream, of which there is no '
                         'subset; give 1, or prepare a smaller file.')
      running = file_dataset_fields.Running.of(task, records, self.tokenizer, self.training, corrupt_counter)
      return Examples(records.size, self._masked(task, running), corrupt_counter=corrupt_counter)
    readers = self._readers(task, records)
    keep = example_ids(records, task, self.seed if self.training else None)
    batch = _Batch(self, task, records, tuple(readers), keep, corrupt_counter)
    names = None if not task.caption_templates else lambda ids: records.each(keep[ids], lambda row: file_dataset_fields.references(task, row))
    if records.columns.get(task.label_column) == 'texts':
      names = lambda ids: records.each(keep[ids], lambda row: row[task.label_column])
    return Examples(len(keep), batch.make, references=names, corrupt_counter=corrupt_counter)

  def _readers(self, task: TaskSpec, records: FileDataset) -> list[file_dataset_fields.Reader]:
    kind, readers = task.type, []
    if kind.has_classes:
      readers.append(file_dataset_fields.labels(task, records, self.keys[task.target_set]))
    if kind.target == 'pair':
      readers.append(file_dataset_fields.pair(task, records, self.tokenizer, self.training))
    if kind.readout == 'queries':
      readers.append(file_dataset_fields.caption(task, records, self.tokenizer, self.training))
    if kind.readout == 'slot':
      readers.append(file_dataset_fields.slot(task, records, self.tokenizer))
    return readers

  def _masked(self, task: TaskSpec, running: file_dataset_fields.Running):
    tables = masking.word_tables(self.tokenizer, self.random_special_tokens)

    def make(ids, hashes):
      text = tf.numpy_function(running.rows, [ids, hashes], tf.int32, stateful=False)
      text = tf.ensure_shape(text, [None, task.max_len])
      valid = tf.ones_like(text, tf.bool)
      masked = masking.mask_words(
          text, valid, hashes, tables, max_predictions=task.max_predictions, always_mask=not self.training)
      return {'id': tf.cast(ids, tf.int64), 'text_valid': valid, **masked}
    return make


def example_ids(records: FileDataset, task: TaskSpec, seed: int | None = None) -> np.ndarray:
  """Ids of the records that are examples: where it is known beforehand, those that have a label and what templates name.

  Args:
    records: of its split. task: with its subset. seed: of a run that trains on them, and reads the subset; None: all.

  Raises:
    UsageError: there are none, or a number per class is asked for and classes are not known beforehand.
  """
  named = {task.label_column, *(column for template in (*task.caption_templates, task.template) for column in template_columns(template))}
  has = {**{c: labels >= 0 for c, labels in records.labels.items()}, **records.present}
  wanted = sorted(named & has.keys())
  keep, labels = np.arange(records.size), None
  for column in wanted:
    keep = keep[has[column][keep]]
  if task.label_column in records.labels:
    labels = records.labels[task.label_column][keep]
  elif task.shots and seed is not None:
    raise UsageError(f'config.tasks.{task.name}.per_class={task.shots}: the labels of source {task.source!r} are only known '
                     f'when its records are read; give config.tasks.{task.name}.per_class=0 and a subset, or prepare it as your own data '
                     'with one class a record.')
  if not len(keep):
    raise UsageError(f'config.tasks.{task.name}: no record of source {task.source!r}, split {task.split!r}, has '
                     f'{" and ".join(map(repr, wanted)) or "anything"}.')
  return keep if seed is None else subset(keep, labels, task, seed)


class _Batch:
  """Makes batches of one task."""

  def __init__(self, builder: FileExampleBuilder, task: TaskSpec, records: FileDataset, readers: tuple[file_dataset_fields.Reader, ...],
               keep: np.ndarray, corrupt_counter: CorruptExampleCounter):
    self._builder, self._task, self._records = builder, task, records
    self._readers, self._keep, self._corrupt_counter = readers, keep, corrupt_counter
    self._media = records.media() if task.type.visual else None
    if task.type.visual and self._media is None:
      raise UsageError(f'config.tasks.{task.name}: source {task.source!r} has neither pictures nor clips; kind '
                       f'{task.type.name!r} needs them.')
    self._is_clip = self._media is not None and records.columns[self._media] == 'video'
    if self._is_clip and task.num_frames < 1:
      raise UsageError(f'config.tasks.{task.name}.num_frames={task.num_frames}: source {task.source!r} has clips; say how many frames the '
                       'model sees of each, for example 8.')
    self._clips = video_pixels.VideoReader(
        builder.size, task.num_frames, task.crop, task.random_flip, builder.training, builder.num_views, builder.num_crops)
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())  # starts no thread before there is a clip
    self._shapes = {name: shape for r in readers for name, shape in r.shapes.items()}
    # Traced once: an evaluation calls it eagerly, a training pipeline inlines it.
    self.make = tf.function(self._make, input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.uint64)])

  def _make(self, ids: tf.Tensor, hashes: tf.Tensor) -> dict[str, tf.Tensor]:
    fields, ok = self._try(ids, hashes, tf.ones_like(ids, tf.bool))
    if self._builder.training:
      fields = self._replace_bad(ids, hashes, fields, ok)
    return {'id': tf.cast(ids, tf.int64), **fields}

  def _replace_bad(self, ids: tf.Tensor, hashes: tf.Tensor, fields: _Fetched, ok: tf.Tensor) -> _Fetched:
    """The fields once every example can be used; the whole batch is made again, which is rare, so that nothing else differs."""
    seed = tf.constant(np.uint64(hashing.mix(self._builder.seed, self._task.name, 'replacement')))
    names = list(fields)

    def wanted(attempt, asked, ok, *_):
      return (attempt < _ATTEMPTS) & ~tf.reduce_all(ok)

    def again(attempt, asked, ok, *_):
      drawn = hashing.mix_tensor(hashing.mix_tensor(tf.fill(tf.shape(ids), seed), ids), attempt)
      asked = tf.where(ok, asked, tf.cast(hashing.randint(drawn, len(self._keep)), tf.int64))
      fields, now = self._try(asked, hashes, ~ok)
      return attempt + 1, asked, now, *[fields[n] for n in names]

    state = (tf.constant(1), ids, ok, *[fields[n] for n in names])
    _, _, ok, *values = tf.while_loop(wanted, again, state, parallel_iterations=1)
    tf.numpy_function(self._settle, [ok], tf.bool)
    return dict(zip(names, values))

  def _settle(self, ok: np.ndarray) -> np.bool_:
    if not ok.all():
      self._corrupt_counter.fail_replacement()
    return np.bool_(True)

  def _try(self, ids: tf.Tensor, hashes: tf.Tensor, counted: tf.Tensor) -> tuple[_Fetched, tf.Tensor]:
    """(fields, ok bool [n]); fields of an example that is not ok are zeros. counted: bool [n], those that were not read before."""
    clip = [self._clips.shape] if self._is_clip else []
    types = [np.bool_, tf.string] + [dtype for dtype, _ in self._shapes.values()] + [np.uint8 for _ in clip]
    ok, data, *values = tf.numpy_function(self._read, [ids, hashes, counted], types)
    ok.set_shape([None])
    fields = {}
    for (name, (_, shape)), value in zip(self._shapes.items(), values):
      fields[name] = tf.ensure_shape(value, [None, *shape])
    if self._is_clip:
      fields['pixels'] = tf.ensure_shape(values[-1], [None, *self._clips.shape])
    elif self._media:
      data.set_shape([None])
      pixels, decoded = decode(data, hashes, self._picture, self._builder.size, self._builder.channels)
      decoded = tf.numpy_function(self._count, [ids, ok & counted, decoded], tf.bool)
      decoded.set_shape([None])
      fields['pixels'], ok = pixels, ok & decoded
    return fields, ok

  def _picture(self, data: tf.Tensor, h: tf.Tensor) -> tf.Tensor:
    """uint8 [1, S, S, C] of one encoded picture: an image is a clip of one frame."""
    b, t = self._builder, self._task
    picture = tf.io.decode_image(data, channels=b.channels, expand_animations=False)
    return image_transforms.prepared(picture, b.size, h if b.training else None, t.crop, t.random_flip, t.randaugment, t.random_erasing)[None]

  def _read(self, ids: np.ndarray, hashes: np.ndarray, counted: np.ndarray):
    """ok, encoded pictures, fields in the order of their shapes, and pixels of clips."""
    n, bad = len(ids), []
    ok, data = np.ones(n, bool), np.full(n, b'', object)
    columns = {name: np.zeros((n, *shape), dtype) for name, (dtype, shape) in self._shapes.items()}
    clips = np.zeros((n, *self._clips.shape), np.uint8) if self._is_clip else None
    rows = file_dataset_fields.fetched(self._records, self._keep[ids], self._corrupt_counter)
    # At once, since decoders and Pillow leave Python to others meanwhile.
    decoded = self._pool.map(self._clip, rows, hashes.tolist()) if self._is_clip else [None] * n
    for i, (row, h, clip) in enumerate(zip(rows, hashes.tolist(), decoded)):
      try:
        if isinstance(row, CorruptExample):
          raise row
        for reader in self._readers:
          for name, value in reader.read(row, h).items():
            columns[name][i] = value
        if self._is_clip:
          if isinstance(clip, CorruptVideo):
            raise clip
          clips[i] = clip
        elif self._media:
          data[i] = row[self._media]
      except (CorruptExample, CorruptVideo) as e:
        ok[i] = False
        if counted[i]:
          bad.append(f'{self._records.where(int(self._keep[ids[i]]))}: {e}')
    self._corrupt_counter.count(int(counted.sum()), bad)
    return ok, data, *columns.values(), *([clips] if self._is_clip else [])

  def _clip(self, row: file_dataset_fields.Row | CorruptExample, h: int) -> np.ndarray | CorruptVideo | None:
    try:
      return None if isinstance(row, CorruptExample) else self._clips(row[self._media], h)
    except CorruptVideo as e:
      return e

  def _count(self, ids: np.ndarray, ok: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Counts the pictures that no op could decode."""
    broken = np.flatnonzero(ok & ~decoded)
    if len(broken):
      self._corrupt_counter.count(0, [f'{self._records.where(int(self._keep[ids[i]]))}: broken picture' for i in broken])
    return decoded


def decode(data: tf.Tensor, hashes: tf.Tensor, one, size: int, channels: int) -> tuple[tf.Tensor, tf.Tensor]:
  """Decodes the pictures of a batch in parallel.

  Args:
    data: bytes [n]. hashes: uint64 [n].
    one: (bytes, hash) → uint8 [1, size, size, channels]; may raise, which costs that picture alone.

  Returns:
    (pixels uint8 [n, 1, size, size, channels], ok bool [n]); a picture that is not ok is black.
  """
  shape, n = [1, size, size, channels], tf.shape(data)[0]
  pictures_of = tf.data.Dataset.from_tensor_slices((tf.range(n), data, hashes))
  pictures_of = pictures_of.map(
      lambda i, d, h: (i, tf.ensure_shape(one(d, h), shape)), num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
  # A dataset can leave a broken element out, and nothing else can: what is missing is seen by its number.
  last = tf.data.Dataset.from_tensors((n, tf.zeros(shape, tf.uint8)))
  found = pictures_of.ignore_errors().concatenate(last).batch(tf.cast(n, tf.int64) + 1)
  index, pixels = found.get_single_element()
  place = tf.scatter_nd(index[:, None], tf.range(1, tf.size(index) + 1), [n + 1])[:n]  # 0: not found
  pixels = tf.where(tf.reshape(place > 0, [-1, 1, 1, 1, 1]), tf.gather(pixels, tf.maximum(place - 1, 0)), tf.constant(0, tf.uint8))
  return tf.ensure_shape(pixels, [None, *shape]), place > 0
