"""Records to the batch fields of a task kind: layout, targets, picks, weights.

A builder prepares what can be prepared once (texts are tokenised to tables) and returns `Examples`: a size and a function
from ids to fields, made of TensorFlow ops on captured tensors. Fields, with the leading axis n:

  pixels uint8 [n, T, H, W, C]                          visual segment
  text int32 [n, S], text_valid bool [n, S]             text segment; a caption is [words | queries], S = 2 · length
  position int32 [n, M]                                 where a text segment is read
  label int32 [n, M], weight f32 [n, M]                 targets in a set (classification: M = 1)
  target int32 [n, S], target_valid bool [n, S], text_id int32 [n], weight f32 [n, 1]      paired text
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data.pipeline import hashing, preprocess
from uni_moe_jax.data.pipeline.corrupt_examples import Faults
from uni_moe_jax.data.pipeline.records import Records
from uni_moe_jax.data.pipeline.templates import columns_of, fill_template
from uni_moe_jax.data.pipeline.tokenizer import Tokenizer, pack
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

Fields = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Examples:
  """A task's examples.

  Attributes:
    size: N. make: (ids int64 [n], hashes uint64 [n]) → fields.
    references: ids int [n] → the texts that are right for each; None: see the records' columns.
    faults: counts examples that could not be used; None: all can.
  """
  size: int
  make: Callable[[tf.Tensor, tf.Tensor], Fields]
  references: Callable[[np.ndarray], list[tuple[str, ...]]] | None = None
  faults: Faults | None = None


@dataclasses.dataclass(frozen=True)
class TextTable:
  """Texts as padded rows: ids int32 [U, S], valid bool [U, S]."""
  ids: np.ndarray
  valid: np.ndarray

  @classmethod
  def of(cls, rows: Sequence[Sequence[int]], length: int, pad: int) -> 'TextTable':
    ids = np.full((len(rows), length), pad, np.int32)
    valid = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
      ids[i, :len(row)], valid[i, :len(row)] = row, True
    return cls(ids, valid)


def text_rows(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> list[list[int]]:
  """Tokens of whole texts, cut to `length` with `eot` as the last."""
  return [row[:length - 1] + [tokenizer.eot] for row in tokenizer.encode_batch(list(texts))]


def unique_texts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(distinct texts [U], index int32 of the shape of `rows`)."""
  texts, index = np.unique(rows, return_inverse=True)
  return texts, index.reshape(rows.shape).astype(np.int32)


def phrases(records: Records, templates: tuple[str, ...], field: str) -> np.ndarray:
  """Every template filled with every record's columns: unicode [N, P]."""
  known = sorted(name for name, c in records.columns.items() if c.dtype.kind == 'U')
  for template in templates:
    for name in columns_of(template):
      if name not in known:
        raise UsageError(f'config.{field}: template {template!r} names column {name!r}; {nearest(name, known)}.')
  n = len(next(iter(records.columns.values())))
  rows = [dict(zip(known, values)) for values in zip(*(records.columns[k].tolist() for k in known))] or [{}] * n
  return np.array([[t.format(**row) for t in templates] for row in rows])


def class_index(records: Records, column: str, classes: Sequence[str], field: str) -> np.ndarray:
  """int32 [N]: place of each record's class among the target set's texts, -1 for records without one."""
  if column not in records.columns:
    raise UsageError(f'config.{field}.label={column!r} is no column; {nearest(column, records.columns)}.')
  place = {name: i for i, name in enumerate(classes)} | {'': -1}
  values = records.columns[column]
  unknown = sorted({v for v in np.unique(values).tolist()} - set(place))
  if unknown:
    raise UsageError(f'config.{field}: class {unknown[0]!r} is not in the target set; {nearest(unknown[0], classes)}.')
  return np.array([place[v] for v in values.tolist()], np.int32)


def subset(keep: np.ndarray, labels: np.ndarray | None, task: TaskSpec, seed: int) -> np.ndarray:
  """The training examples of a task, in order.

  Which ones is a function of the seed and of each example's place in its split: those with the lowest hashes, so that a
  smaller subset is part of a larger one.

  Args:
    keep: places of the examples that there are. labels: the class of each, or None.
    task: its `subset` and `per_class`.
    seed: of the run.
  """
  if task.train_fraction == 1 and not task.shots:
    return keep
  hashes = np.array([hashing.mix(seed, task.source, task.split, 'subset', int(i)) for i in keep], np.uint64)
  chosen = []
  for value in [None] if labels is None else np.unique(labels):
    members = np.arange(len(keep)) if value is None else np.flatnonzero(labels == value)
    number = task.shots or math.ceil(task.train_fraction * len(members))
    chosen.append(members[np.argsort(hashes[members], kind='stable')[:number]])
  return keep[np.sort(np.concatenate(chosen))]


def places(records: Records, task: TaskSpec, seed: int | None = None) -> np.ndarray:
  """Places of the records that are examples of a task, in order: where it chooses a class, those that have one.

  Args:
    records: of its split. seed: of a run that trains on them, and reads its subset; None: all.
  """
  keep, labels = np.arange(len(next(iter(records.columns.values())))), None
  if task.type.has_classes:
    column = records.columns[task.label_column]
    keep = np.flatnonzero(column != '')
    labels = column[keep]
  return keep if seed is None else subset(keep, labels, task, seed)


@dataclasses.dataclass(frozen=True)
class Builder:
  """What all builders need.

  Attributes:
    tokenizer: of the run.
    classes: of each named target set, in order, what records call its entries.
    channels: of pictures. training: random phrases, masks and shifts; otherwise the first phrase, every pick masked.
    seed: of the run, by which subsets of the training examples are chosen.
    mask_specials: masked language modelling may put special tokens in the place of words (published).
    pixels: tensors by (source, split), so that tasks of one source hold its pictures once.
  """
  tokenizer: Tokenizer
  classes: dict[str, tuple[str, ...]]
  channels: int
  training: bool
  mask_specials: bool = False
  seed: int = 0
  pixels: dict[tuple[str, str], tf.Tensor] = dataclasses.field(default_factory=dict)

  def build(self, task: TaskSpec, records: Records) -> Examples:
    """Examples of a task over one split of its source.

    Raises:
      UsageError: the config names a column, class or template that the records do not have.
    """
    kind, field = task.type, f'tasks.{task.name}'
    labels = class_index(records, task.label_column, self.classes[task.target_set], field) if task.type.has_classes else None
    keep = places(records, task, self.seed if self.training else None)
    makers = [] if labels is None else [self._labels(labels[keep])]
    if kind.readout == 'masked':
      return self._masked(task, records, keep, field)
    if kind.visual:
      makers.append(self._pixels(task, records, keep, field))
    if kind.target == 'pair':
      makers.append(self._pair(task, records, keep, field))
    if kind.readout == 'queries':
      makers.append(self._caption(task, records, keep, field))
    if kind.readout == 'slot':
      makers.append(self._template(task, records, keep, field))
    if not len(keep):
      raise UsageError(f'config.{field}: no record of source {task.source!r}, split {task.split!r}, has a {task.label_column!r}.')

    def make(ids, hashes):
      fields = {'id': tf.cast(ids, tf.int64)}
      for maker in makers:
        fields.update(maker(ids, hashes))
      return fields

    return Examples(len(keep), make)

  def _labels(self, labels: np.ndarray):
    labels = tf.constant(labels)
    return lambda ids, _: {
        'label': tf.gather(labels, ids)[:, None], 'weight': tf.ones([tf.size(ids), 1], tf.float32)}

  def _pixels(self, task: TaskSpec, records: Records, keep: np.ndarray, field: str):
    if 'pixels' not in records.columns:
      raise UsageError(f'config.{field}: source {task.source!r} has no pixels, kind {task.type.name!r} needs them.')
    source = (task.source, task.split)
    if source not in self.pixels:
      pixels = records.columns['pixels']
      # An image is a clip of one frame.
      self.pixels[source] = tf.constant(pixels[:, None] if pixels.ndim == 3 else pixels)
    pixels, kept = self.pixels[source], tf.constant(keep)
    most = task.max_shift if self.training else 0

    def make(ids, hashes):
      frames = preprocess.colours(tf.gather(pixels, tf.gather(kept, ids)), self.channels)
      return {'pixels': preprocess.shift(frames, hashes, most)}
    return make

  def _phrase_table(self, task: TaskSpec, records: Records, keep: np.ndarray, field: str):
    """(table of distinct texts, index [N, P])."""
    texts, index = unique_texts(phrases(records, task.caption_templates, f'{field}.captions')[keep])
    table = TextTable.of(text_rows(texts, self.tokenizer, task.max_len), task.max_len, self.tokenizer.pad)
    return tf.constant(table.ids), tf.constant(table.valid), tf.constant(index)

  def _choice(self, index: tf.Tensor, ids: tf.Tensor, hashes: tf.Tensor) -> tf.Tensor:
    """Row of the text table per example: a random phrase in training, the first otherwise."""
    rows = tf.gather(index, ids)
    if not self.training:
      return rows[:, 0]
    drawn = hashing.below(hashing.mix_tensor(hashes, 'phrase'), index.shape[1])
    return tf.gather(rows, drawn, batch_dims=1)

  def _pair(self, task: TaskSpec, records: Records, keep: np.ndarray, field: str):
    table, valid, index = self._phrase_table(task, records, keep, field)

    def make(ids, hashes):
      row = self._choice(index, ids, hashes)
      return {'target': tf.gather(table, row), 'target_valid': tf.gather(valid, row), 'text_id': row,
              'weight': tf.ones([tf.size(ids), 1], tf.float32)}
    return make

  def _caption(self, task: TaskSpec, records: Records, keep: np.ndarray, field: str):
    table, valid, index = self._phrase_table(task, records, keep, field)

    def make(ids, hashes):
      row = self._choice(index, ids, hashes)
      words, used = tf.gather(table, row), tf.gather(valid, row)
      return {'text': tf.concat([words, tf.fill(tf.shape(words), self.tokenizer.spe)], axis=1),
              'text_valid': tf.concat([used, used], axis=1), 'label': words, 'weight': tf.cast(used, tf.float32)}
    return make

  def _template(self, task: TaskSpec, records: Records, keep: np.ndarray, field: str):
    names = columns_of(task.template)
    for name in names:
      if name not in records.columns:
        raise UsageError(f'config.{field}.template names column {name!r}; {nearest(name, records.columns)}.')
    tokens = {n: self.tokenizer.encode_batch(records.columns[n][keep].tolist()) for n in names}
    filled = [
        fill_template(self.tokenizer, task.template, {n: tokens[n][i] for n in names}, task.max_len)
        for i in range(len(keep))]
    table = TextTable.of([row for row, _ in filled], task.max_len, self.tokenizer.pad)
    ids_table, valid, slot = tf.constant(table.ids), tf.constant(table.valid), tf.constant([s for _, s in filled])
    return lambda ids, _: {'text': tf.gather(ids_table, ids), 'text_valid': tf.gather(valid, ids),
                           'position': tf.cast(tf.gather(slot, ids), tf.int32)[:, None]}

  def _masked(self, task: TaskSpec, records: Records, keep: np.ndarray, field: str) -> Examples:
    if 'text' not in records.columns:
      raise UsageError(f"config.{field}: source {task.source!r} has no column 'text'; it has "
                       f'{", ".join(sorted(records.columns))}.')
    tokenizer = self.tokenizer
    rows = pack(tokenizer.encode_batch(records.columns['text'][keep].tolist()), task.max_len, tokenizer.eot)
    if not len(rows):
      raise UsageError(f'config.{field}.length={task.max_len}: source {task.source!r} has too little text for one row.')
    table = tf.constant(rows)
    word_start, word_end, ordinary = preprocess.word_tables(tokenizer, self.mask_specials)

    def make(ids, hashes):
      text = tf.gather(table, ids)
      valid = tf.ones_like(text, tf.bool)
      masked = preprocess.mask_words(
          text, valid, hashes, word_start=word_start, word_end=word_end, ordinary=ordinary, spe=tokenizer.spe,
          picks=task.max_predictions, always_mask=not self.training)
      return {'id': tf.cast(ids, tf.int64), 'text_valid': valid, **masked}
    return Examples(len(rows), make)
