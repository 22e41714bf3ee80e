"""Records in files to the text fields of a task kind, one record at a time: labels, captions, templates, running text.

A reader is made once for a task, which checks the config against the source's columns; then `read(row, h)` gives the fields of
one record, without the leading axis of the batch, or raises `CorruptExample`. `h`, an int, is the example's hash.
"""

import collections
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data.files.file_dataset import CorruptExample, FileDataset
from uni_moe_jax.data.pipeline import hashing
from uni_moe_jax.data.pipeline.corrupt_examples import CorruptExampleCounter
from uni_moe_jax.data.pipeline.examples import encode_texts, pad_tokens
from uni_moe_jax.data.pipeline.templates import fill_template, template_columns
from uni_moe_jax.data.pipeline.tokenizer import Tokenizer
from uni_moe_jax.data.pipeline.vqa_answers import normalize_answer
from uni_moe_jax.utils.errors import RunError, UsageError
from uni_moe_jax.utils.suggest import nearest

_PATIENCE = 2  # times as many records as tokens are read for a row of running text, in case that some cannot be

Row = Mapping[str, Any]
Shapes = dict[str, tuple[type, tuple[int, ...]]]  # field → dtype, shape of one example


@dataclasses.dataclass(frozen=True)
class Reader:
  """shapes: of the fields that `read` gives."""
  shapes: Shapes
  read: Callable[[Row, int], dict[str, Any]]


def labels(task: TaskSpec, records: FileDataset, keys: Sequence[str]) -> Reader:
  """label and weight: the class of a record among the entries of the target set; or of its answers, M at most, each with the
  share of the answerers that gave it (answers outside of the set count nothing).

  Raises:
    UsageError: there is no such column, or a class of it is not in the set.
  """
  kind, place = records.columns.get(task.label_column), {key: i for i, key in enumerate(keys)}
  if kind not in ('class', 'texts'):
    fitting = [c for c, k in records.columns.items() if k in ('class', 'texts')]
    raise UsageError(f'config.tasks.{task.name}.label={task.label_column!r} is no column of classes or answers of source '
                     f'{task.source!r}; {nearest(task.label_column, fitting)}.')
  if kind == 'class':
    if unknown := [name for name in records.classes[task.label_column] if name not in place]:
      raise UsageError(f'config.tasks.{task.name}: class {unknown[0]!r} of source {task.source!r} is not in the target set; '
                       f'{nearest(unknown[0], keys)}.')

    def read(row, _):
      if not row[task.label_column]:
        raise CorruptExample(f'no {task.label_column}')
      return {'label': [place[row[task.label_column]]], 'weight': [1.0]}
    return Reader(_label_shapes(1), read)
  M = max(1, task.max_predictions)
  place = {normalize_answer(key): i for key, i in place.items()}

  def read_answers(row, _):
    if not row[task.label_column]:
      raise CorruptExample(f'no {task.label_column}')
    found = [(a, n) for a, n in collections.Counter(map(normalize_answer, row[task.label_column])).most_common() if a in place][:M]
    pad = [0] * (M - len(found))
    share = [n / len(row[task.label_column]) for _, n in found]
    return {'label': [place[a] for a, _ in found] + pad, 'weight': share + pad}
  return Reader(_label_shapes(M), read_answers)


def _label_shapes(M: int) -> Shapes:
  return {'label': (np.int32, (M,)), 'weight': (np.float32, (M,))}


def pair(task: TaskSpec, records: FileDataset, tokenizer: Tokenizer, training: bool) -> Reader:
  """target, target_valid, text_id, weight: a record's own text; equal texts have equal ids."""
  choose, S = phrase_chooser(task, records, training), task.max_len

  def read(row, h):
    text = choose(row, h)
    ids, valid = _padded(tokenizer, *encode_texts([text], tokenizer, S), S)
    return {'target': ids, 'target_valid': valid, 'text_id': zlib.crc32(text.encode()) & 0x7FFFFFFF, 'weight': [1.0]}
  return Reader({'target': (np.int32, (S,)), 'target_valid': (np.bool_, (S,)), 'text_id': (np.int32, ()),
                 'weight': (np.float32, (1,))}, read)


def caption(task: TaskSpec, records: FileDataset, tokenizer: Tokenizer, training: bool) -> Reader:
  """text [words | queries], text_valid, label, weight."""
  choose, S = phrase_chooser(task, records, training), task.max_len

  def read(row, h):
    words, valid = _padded(tokenizer, *encode_texts([choose(row, h)], tokenizer, S), S)
    return {'text': np.concatenate([words, np.full(S, tokenizer.spe)]), 'text_valid': np.concatenate([valid, valid]),
            'label': words, 'weight': valid}
  return Reader({'text': (np.int32, (2 * S,)), 'text_valid': (np.bool_, (2 * S,)), 'label': (np.int32, (S,)),
                 'weight': (np.float32, (S,))}, read)


def slot(task: TaskSpec, records: FileDataset, tokenizer: Tokenizer) -> Reader:
  """text, text_valid, position: a template around the answer's slot."""
  fields, S = template_columns(task.template), task.max_len
  _check_columns(task, records, 'template', fields, ('text', 'class'))

  def read(row, _):
    ids, place = fill_template(tokenizer, task.template, {f: tokenizer.encode(row[f]) for f in fields}, S)
    text, valid = _padded(tokenizer, ids, S)
    return {'text': text, 'text_valid': valid, 'position': [place]}
  return Reader({'text': (np.int32, (S,)), 'text_valid': (np.bool_, (S,)), 'position': (np.int32, (1,))}, read)


def fetched(records: FileDataset, ids: np.ndarray, corrupt_counter: CorruptExampleCounter) -> list[Row | CorruptExample]:
  """Records by id; once the source is out of reach, which the loop is told by `corrupt_counter`, none can be used."""
  out_of_reach = [CorruptExample('out of reach')] * len(ids)
  if corrupt_counter.failed:
    return out_of_reach
  try:
    return records.fetched(ids)
  except RunError as e:  # what is raised in a thread of TensorFlow would arrive as another's traceback
    corrupt_counter.fail(e)
    return out_of_reach


@dataclasses.dataclass(frozen=True)
class Running:
  """Running text for masked language modelling: row i starts in record i, and takes those after it until it is full.

  So a row is found without packing everything first, and every record begins one. Of a long record one of its windows is
  taken, another in every epoch. A record that cannot be read is passed over for the one after it.

  Attributes:
    records: with the column `column`. length: S. hashes choose the window.
    corrupt_counter: counts the records that are read.
  """
  records: FileDataset
  column: str
  tokenizer: Tokenizer
  length: int
  training: bool
  corrupt_counter: CorruptExampleCounter

  @classmethod
  def of(cls, task: TaskSpec, records: FileDataset, tokenizer: Tokenizer, training: bool, corrupt_counter: CorruptExampleCounter) -> 'Running':
    column = task.label_column or 'text'
    if records.columns.get(column) != 'text':
      raise UsageError(f"config.tasks.{task.name}: source {task.source!r} has no column of texts {column!r} (label names it, 'text' "
                       f'by default); {nearest(column, [c for c, k in records.columns.items() if k == "text"])}.')
    return cls(records, column, tokenizer, task.max_len, training, corrupt_counter)

  def rows(self, ids: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """int32 [n, S]."""
    out = np.zeros((len(ids), self.length), np.int32)
    filled, nxt = np.zeros(len(ids), int), np.asarray(ids) % self.records.size
    for turn in range(_PATIENCE * self.length):  # every record that can be read gives a token, its `eot`, at least
      open_ = np.flatnonzero(filled < self.length)
      if not len(open_):
        return out
      found = fetched(self.records, nxt[open_], self.corrupt_counter)
      self.corrupt_counter.count(len(found), [
          f'{self.records.where(int(i))}: {row}' for i, row in zip(nxt[open_], found) if isinstance(row, CorruptExample)])
      for i, row in zip(open_, found):
        if isinstance(row, CorruptExample):
          continue
        text = row[self.column]
        if turn == 0:
          text = self._window(text, int(hashes[i]))
        tokens = [*self.tokenizer.encode(text), self.tokenizer.eot][:self.length - filled[i]]
        out[i, filled[i]:filled[i] + len(tokens)] = tokens
        filled[i] += len(tokens)
      nxt[open_] = (nxt[open_] + 1) % self.records.size
    self.corrupt_counter.fail_replacement()
    return out

  def _window(self, text: str, h: int) -> str:
    """Of a text that is much longer than a row, some of it from the beginning of a word on."""
    most = 12 * self.length  # characters: of any language more than S tokens
    if len(text) <= 2 * most:
      return text
    start = hashing.mix(h, 'window') % (len(text) - most) if self.training else 0
    start = text.find(' ', start) + 1 if start else 0
    return text[start:start + most]


def phrase_chooser(task: TaskSpec, records: FileDataset, training: bool) -> Callable[[Row, int], str]:
  """(row, h) → one phrase: in training of a random template with random entries of lists, else the first of everything."""
  names = [template_columns(t) for t in task.caption_templates]
  for fields in names:
    _check_columns(task, records, 'captions', fields, ('text', 'texts', 'class'))

  def choose(row, h):
    which = hashing.mix(h, 'phrase') % len(task.caption_templates) if training else 0
    values = {}
    for f in names[which]:
      value = row[f]
      if not isinstance(value, str):
        if not value:
          raise CorruptExample(f'no {f}')
        value = value[hashing.mix(h, f) % len(value) if training else 0]
      values[f] = value
    text = task.caption_templates[which].format(**values)
    if not text.strip():
      raise CorruptExample('empty text')
    return text
  return choose


def references(task: TaskSpec, row: Row) -> tuple[str, ...]:
  """All texts that are right for a record under the task's first template: one per entry of its list of texts."""
  template = task.caption_templates[0]
  lists = [f for f in template_columns(template) if not isinstance(row[f], str)]
  if not lists:
    return (template.format(**{f: row[f] for f in template_columns(template)}),)
  return tuple(template.format(**{f: row[f] if f != lists[0] else entry for f in template_columns(template)}) for entry in row[lists[0]])


def _check_columns(task: TaskSpec, records: FileDataset, where: str, names: Sequence[str], kinds: tuple[str, ...]) -> None:
  fitting = [c for c, k in records.columns.items() if k in kinds]
  for name in names:
    if name not in fitting:
      raise UsageError(f'config.tasks.{task.name}.{where} names column {name!r} of source {task.source!r}; '
                       f'{nearest(name, fitting)}.')


def _padded(tokenizer: Tokenizer, row: list[int], S: int) -> tuple[np.ndarray, np.ndarray]:
  """(ids int32 [S], valid bool [S]) of one text's tokens."""
  ids, valid = pad_tokens([row], S, tokenizer.pad)
  return ids[0], valid[0]
