"""Converts records to the batch features of a task type: layout, targets, masked positions, weights.

A builder prepares what can be prepared once (texts are tokenized to tables) and returns `Examples`: a size and a
function from ids to features, made of TensorFlow ops on captured tensors. Features, with the leading axis n:

  pixels uint8 [n, T, H, W, C]                     visual segment
  text int32 [n, S], text_valid bool [n, S]        text segment; a caption is [words | queries], S = 2 · max_len
  position int32 [n, M]                            readout positions of a text segment
  label int32 [n, M], weight f32 [n, M]            targets in a set (classification: M = 1)
  target int32 [n, S], target_valid bool [n, S], text_id int32 [n], weight f32 [n, 1]      paired text
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples import augmentations, masking
from uni_moe_jax.data.examples.corrupt_examples import CorruptExampleCounter
from uni_moe_jax.data.examples.records import Records
from uni_moe_jax.data.text import words
from uni_moe_jax.data.text.templates import CHARS_PER_TOKEN, FilledTemplate, fill_template, first_tokens
from uni_moe_jax.data.text.tokenizer import Tokenizer, pack_tokens
from uni_moe_jax.utils import splitmix, templates
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

Features = dict[str, tf.Tensor]
MakeFeatures = Callable[[tf.Tensor, tf.Tensor], Features]  # (ids int64 [n], hashes uint64 [n]) → features


@dataclasses.dataclass(frozen=True)
class Examples:
  """Examples of a task.

  references: ids int [n] → the correct texts of each example; None: they are columns of the records.
  """
  size: int
  make: MakeFeatures
  references: Callable[[np.ndarray], list[tuple[str, ...]]] | None = None
  corrupt_counter: CorruptExampleCounter = CorruptExampleCounter('', 0.0)  # the default counts none: all can be used
  prefetch: Callable[[np.ndarray], None] | None = None  # ids in the order in which they will be made
  # Faster, but fails at a corrupt example and counts none: (features, number of records that were read, int64).
  make_undamaged: Callable[[tf.Tensor, tf.Tensor], tuple[Features, tf.Tensor]] | None = None

  def make_uncounted(self, undamaged: bool, ids: tf.Tensor, hashes: tf.Tensor) -> tuple[Features, tf.Tensor]:
    """As `make_undamaged`, if there is one and it is wanted; else as `make`, which leaves no record to count."""
    if undamaged and self.make_undamaged:
      return self.make_undamaged(ids, hashes)
    return self.make(ids, hashes), tf.constant(0, tf.int64)


def pad_tokens(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows of tokens: (ids int32 [U, S], valid bool [U, S])."""
  ids, valid = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    ids[i, :len(row)], valid[i, :len(row)] = row, True
  return ids, valid


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> list[list[int]]:
  """Returns the tokens of each text, truncated to `length`, with `eot` as the last one."""
  is_long = [len(text) > CHARS_PER_TOKEN * length for text in texts]  # perhaps a document
  rows = tokenizer.encode_batch(['' if long else text for text, long in zip(texts, is_long, strict=True)])
  return [(first_tokens(tokenizer, text, length - 1) if long else row[:length - 1]) + [tokenizer.eot]
          for text, long, row in zip(texts, is_long, rows, strict=True)]


def distinct_rows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rows of tokens of texts; those with the same tokens, cut to `length`, have one row.

  Returns:
    (tokens int32 [U, S], valid bool [U, S], int32 [n], the row of each text), in the order of the texts.
  """
  rows = list(map(tuple, encode_texts(texts, tokenizer, length)))
  index = {row: i for i, row in enumerate(dict.fromkeys(rows))}
  return *pad_tokens(list(index), length, tokenizer.pad), np.array([index[row] for row in rows], np.int32)


def template_features(
    filled: Sequence[FilledTemplate], task: TaskSpec, tokenizer: Tokenizer, training: bool) -> dict[str, np.ndarray]:
  """Features of filled templates: those of a text segment, and what `words.drop_words` needs if it will leave out."""
  text, valid = pad_tokens([f.ids for f in filled], task.max_len, tokenizer.pad)
  features = {'text': text, 'text_valid': valid, 'position': np.array([f.slot for f in filled], np.int32)[:, None]}
  if training and task.word_dropout:
    features[words.IN_FIELD] = pad_tokens([f.in_field for f in filled], task.max_len, False)[0].astype(bool)
  return features


def move_images(pixels: tf.Tensor, hashes: tf.Tensor, task: TaskSpec) -> tf.Tensor:
  """Moves training images or videos, uint8 [n, T, H, W, C], by the task's `max_affine` and `max_shift`."""
  pixels = augmentations.random_affine(pixels, hashes, task.max_affine)
  return augmentations.random_shift(pixels, hashes, task.max_shift)


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


def example_ids(records: Records, task: TaskSpec, seed: int | None = None) -> np.ndarray:
  """Returns the indices of the records that are examples of a task: for classification and `shots`, those with a class.

  With the seed of a run that trains on them, only of its subset. Raises UsageError for `shots` without their column.
  """
  indices, labels = np.arange(records.size), None
  if task.type.has_classes or task.shots and seed is not None:
    if task.label_column not in records.columns:
      raise UsageError(f'config.tasks.{task.name}.label_column={task.label_column!r} is no column; '
                       f'{nearest(task.label_column, records.columns)}.')
    column = records.columns[task.label_column]
    indices = np.flatnonzero(column != '')
    labels = column[indices]
  return indices if seed is None else subset(indices, labels, task, seed)


def check_segments(task: TaskSpec) -> None:
  """Raises UsageError for a task type of the config that reads a segment which examples with its readout lack."""
  t = task.type
  for readout, wrong, lacking, fix in (
      ('cls', t.text_index is not None, 'text',
       "fill a template and read it at its slot (readout 'slot'), or leave the segment out"),
      ('masked', t.visual, 'visual', 'leave the segment out')):
    if t.readout == readout and wrong:
      raise UsageError(f'config.tasks.{task.name}: task type {t.name!r} has a {lacking} segment, but examples with '
                       f'readout {readout!r} have no input of it; {fix}.')


def mask_maker(make_text: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], task: TaskSpec, tokenizer: Tokenizer,
               training: bool, random_special_tokens: bool) -> MakeFeatures:
  """Returns the function that makes the features of masked language modeling; the flags are those of `Builder`.

  make_text: (ids int64 [n], hashes uint64 [n]) → int32 [n, S], full rows of text.
  """
  def make(ids, hashes):
    text = make_text(ids, hashes)
    masked = masking.mask_words(
        text, hashes, tokenizer, max_predictions=task.max_predictions, always_mask=not training,
        random_special_tokens=random_special_tokens)
    return {'id': tf.cast(ids, tf.int64), 'text_valid': tf.ones_like(text, tf.bool), **masked}
  return make


@dataclasses.dataclass(frozen=True)
class Builder:
  """Builds examples of tasks from records in memory."""
  tokenizer: Tokenizer
  classes: dict[str, tuple[str, ...]]  # for each target set, the records' names of its entries, in order
  channels: int  # of images
  # Random captions, masks, transforms and words left out; otherwise the first caption, and every selected token masked.
  training: bool
  random_special_tokens: bool = False  # masked language modeling may replace words by special tokens (published)
  seed: int = 0  # of the run; it chooses subsets of the training examples
  # By (source, split): tasks with one source share its images.
  pixels: dict[tuple[str, str], tf.Tensor] = dataclasses.field(default_factory=dict)

  def build(self, task: TaskSpec, records: Records) -> Examples:
    """Builds a task's examples of a split. Raises UsageError for columns and classes that the records do not have."""
    check_segments(task)
    makers, labels = [], None
    if task.type.has_classes:
      labels = class_indices(records, task, self.classes[task.target_set])
    indices = example_ids(records, task, self.seed if self.training else None)
    if task.type.readout == 'masked':
      return self._masked(task, records, indices)
    if labels is not None:
      makers.append(_lookup(label=labels[indices, None], weight=np.ones((len(indices), 1), np.float32)))
    if task.type.visual:
      makers.append(self._pixels(task, records, indices))
    if task.type.target == 'pair' or task.type.readout == 'queries':
      makers.append(self._captions(task, records, indices))
    if task.type.readout == 'slot':
      makers.append(self._template(task, records, indices))
    if not len(indices):
      raise UsageError(f'config.tasks.{task.name}: no record of source {task.source!r}, split {task.split!r}, has a '
                       f'{task.label_column!r}.')

    def make(ids, hashes):
      features = {'id': tf.cast(ids, tf.int64)}
      for maker in makers:
        features |= maker(ids, hashes)
      return features
    return Examples(len(indices), make)

  def _pixels(self, task: TaskSpec, records: Records, indices: np.ndarray) -> MakeFeatures:
    if 'pixels' not in records.columns:
      raise UsageError(f'config.tasks.{task.name}: source {task.source!r} has no pixels, which task type '
                       f'{task.type.name!r} needs.')
    key = (task.source, task.split)
    if key not in self.pixels:
      pixels = records.columns['pixels']
      # An image is a video of one frame.
      self.pixels[key] = tf.constant(pixels[:, None] if pixels.ndim == 3 else pixels)
    pixels, indices = self.pixels[key], tf.constant(indices)

    def make(ids, hashes):
      frames = tf.gather(pixels, tf.gather(indices, ids))[..., None]
      frames = move_images(frames, hashes, task) if self.training else frames
      return {'pixels': tf.repeat(frames, self.channels, axis=-1)}
    return make

  def _captions(self, task: TaskSpec, records: Records, indices: np.ndarray) -> MakeFeatures:
    """Returns the maker of a text that is paired with its image, or of a caption to generate."""
    texts, index = np.unique(fill_captions(records, task)[indices], return_inverse=True)
    tokens, valid, row_of = map(tf.constant, distinct_rows(texts, self.tokenizer, task.max_len))
    index = tf.gather(row_of, index)  # [n, P], of the text that each template makes

    def make(ids, hashes):
      text_id = tf.gather(index, ids)
      if self.training:
        text_id = tf.gather(
            text_id, hashing.randint(hashing.mix_tensor(hashes, 'phrase'), index.shape[1]), batch_dims=1)
      else:
        text_id = text_id[:, 0]
      words, is_word = tf.gather(tokens, text_id), tf.gather(valid, text_id)
      if task.type.target == 'pair':
        return {'target': words, 'target_valid': is_word, 'text_id': text_id,
                'weight': tf.ones([tf.size(ids), 1], tf.float32)}
      return {'text': tf.concat([words, tf.fill(tf.shape(words), self.tokenizer.spe)], axis=1),
              'text_valid': tf.concat([is_word, is_word], axis=1), 'label': words,
              'weight': tf.cast(is_word, tf.float32)}
    return make

  def _template(self, task: TaskSpec, records: Records, indices: np.ndarray) -> MakeFeatures:
    columns = templates.columns(task.template)
    for name in columns:
      if name not in records.columns:
        raise UsageError(f'config.tasks.{task.name}.template names column {name!r}; {nearest(name, records.columns)}.')
    texts = {n: records.columns[n][indices].tolist() for n in columns}
    filled = [fill_template(self.tokenizer, task.template, {n: texts[n][i] for n in columns}, task.max_len)
              for i in range(len(indices))]
    make = _lookup(**template_features(filled, task, self.tokenizer, self.training))
    return lambda ids, hashes: words.drop_words(make(ids, hashes), hashes, task, self.tokenizer)

  def _masked(self, task: TaskSpec, records: Records, indices: np.ndarray) -> Examples:
    if 'text' not in records.columns:
      raise UsageError(f"config.tasks.{task.name}: source {task.source!r} has no column 'text'; it has "
                       f'{", ".join(sorted(records.columns))}.')
    encoded = self.tokenizer.encode_batch(records.columns['text'][indices].tolist())
    rows = tf.constant(pack_tokens(encoded, task.max_len, self.tokenizer.eot))
    return Examples(len(rows), mask_maker(
        lambda ids, _: tf.gather(rows, ids), task, self.tokenizer, self.training, self.random_special_tokens))


def _lookup(**tables: np.ndarray) -> MakeFeatures:
  """Returns the maker of features that are rows of tables."""
  tensors = {name: tf.constant(table) for name, table in tables.items()}
  return lambda ids, _: {name: tf.gather(table, ids) for name, table in tensors.items()}


def fill_captions(records: Records, task: TaskSpec) -> np.ndarray:
  """Fills every template with every record's columns: unicode [N, P]."""
  columns = {name: column.tolist() for name, column in records.columns.items() if column.dtype.kind == 'U'}
  for template in task.caption_templates:
    for name in templates.columns(template):
      if name not in columns:
        raise UsageError(f'config.tasks.{task.name}.caption_templates: template {template!r} names column {name!r}; '
                         f'{nearest(name, columns)}.')
  rows = ({name: column[i] for name, column in columns.items()} for i in range(records.size))
  return np.array([[templates.fill(template, row) for template in task.caption_templates] for row in rows])


def class_indices(records: Records, task: TaskSpec, classes: Sequence[str]) -> np.ndarray:
  """Returns int32 [N], the index of each record's class in the target set; -1 for no class."""
  field, column = f'config.tasks.{task.name}', task.label_column
  if column not in records.columns:
    raise UsageError(f'{field}.label_column={column!r} is no column; {nearest(column, records.columns)}.')
  index = {name: i for i, name in enumerate(classes)} | {'': -1}
  values = records.columns[column].tolist()
  if unknown := sorted(set(values) - set(index)):
    raise UsageError(f'{field}: class {unknown[0]!r} is not in the target set; {nearest(unknown[0], classes)}.')
  return np.array([index[value] for value in values], np.int32)
