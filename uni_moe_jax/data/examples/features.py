"""From a record to the features of a task type: labels, captions, templates.

Features, with the leading axis n of a batch:

  pixels uint8 [n, T, H, W, C]                     visual segment, see `pixels.py`
  text int32 [n, S], text_valid bool [n, S]        text segment; a caption is [words | queries], S = 2 · max_len
  position int32 [n, M]                            readout positions of a text segment
  label int32 [n, M], weight f32 [n, M]            targets in a set (classification: M = 1)
  target int32 [n, S], target_valid bool [n, S], text_id int32 [n], weight f32 [n, 1]      paired text
"""

import collections
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.shards.record_format import CorruptExample, Record
from uni_moe_jax.data.text.templates import FilledTemplate, fill_template
from uni_moe_jax.data.text.token_rows import encode_texts, pad_tokens
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.data.text.vqa_answers import normalize_answer, soft_score
from uni_moe_jax.data.text.words import IN_FIELD
from uni_moe_jax.utils import splitmix, templates
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

Specs = dict[str, tuple[type, tuple[int, ...]]]  # feature → dtype, shape without the batch axis


class FeatureReader(NamedTuple):
  """Reads features of records."""
  specs: Specs
  read: Callable[[Record, int], Any]  # (record, the example's hash) → its content; raises CorruptExample
  collate: Callable[[list[Any]], dict[str, Any]]  # contents of n examples → features [n, …]


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


def feature_readers(
    task: TaskSpec, records: FileDataset, tokenizer: Tokenizer, keys: Sequence[str], training: bool,
    phrases_are_known: bool) -> list[FeatureReader]:
  """Readers of all features of a task but its pixels and what is known before a record is read.

  keys: what records call the classes of the task's target set, in order.

  Raises:
    UsageError: the config does not fit the source.
  """
  readers = []
  if task.type.has_classes and not _labels_are_known(task, records, training):
    readers.append(_label_reader(task, records, keys, training))
  if has_phrase(task) and not phrases_are_known:
    readers.append(_phrase_reader(task, records, tokenizer, training))
  if task.type.readout == 'slot':
    readers.append(_template_reader(task, records, tokenizer, training))
  return readers


def _labels_are_known(task: TaskSpec, records: FileDataset, training: bool) -> bool:
  """Whether they are before a record is read; with `mirrored_words` a mirrored image may have another class."""
  return task.label_column in records.labels and not (training and task.mirrored_words)


def label_tables(
    task: TaskSpec, records: FileDataset, keys: Sequence[str], keep: np.ndarray, training: bool,
) -> dict[str, np.ndarray]:
  """Features of all examples that are known before any is read, [n, …]: `label` and `weight` of own data's classes.

  keep: ids [n] of the records that are examples, all of which have a class. Raises UsageError for a class that is not
  in the target set.
  """
  if not task.type.has_classes or not _labels_are_known(task, records, training):
    return {}
  index = _class_index(task, records, keys)
  table = np.array([index[name] for name in records.classes[task.label_column]], np.int32)
  labels = table[records.labels[task.label_column][keep]][:, None]
  return {'label': labels, 'weight': np.ones(labels.shape, np.float32)}


def _class_index(task: TaskSpec, records: FileDataset, keys: Sequence[str]) -> dict[str, int]:
  index = {key: i for i, key in enumerate(keys)}
  if unknown := [name for name in records.classes[task.label_column] if name not in index]:
    raise UsageError(
        f'config.tasks.{task.name}: class {unknown[0]!r} of source {task.source!r} is not in the target set; '
        f'{nearest(unknown[0], keys)}.')
  return index


def _label_reader(task: TaskSpec, records: FileDataset, keys: Sequence[str], training: bool) -> FeatureReader:
  """Reader of `label` and `weight`: the class of a record as an index into `keys`, or its answers.

  Of several answers at most M are kept, the most frequent first, each weighted by the share of annotators that gave
  it; in training with `single_answer` one is drawn by its soft score. Answers outside the target set have no weight.
  """
  column, column_type = task.label_column, records.columns.get(task.label_column)
  if column_type not in ('class', 'texts'):
    raise UsageError(
        f'config.tasks.{task.name}.label_column={column!r} is not a column of classes or answers of source '
        f'{task.source!r}; {nearest(column, columns_of_type(records, "class", "texts"))}.')
  is_class = column_type == 'class'
  M, normalize = (1, str) if is_class else (max(1, task.max_predictions), normalize_answer)
  index = _class_index(task, records, keys) if is_class else {normalize(key): i for i, key in enumerate(keys)}
  if is_class and training and task.mirrored_words:
    mirrored = word_mirror(task.mirrored_words)({name: name for name in records.classes[column]})
    if unknown := [(a, b) for a, b in mirrored.items() if b not in index]:
      raise UsageError(
          f'config.tasks.{task.name}.mirrored_words={task.mirrored_words}: with its image, class {unknown[0][0]!r} '
          f'becomes {unknown[0][1]!r}, which is not in config.target_sets.{task.target_set}; add it, or set '
          'mirrored_words=().')

  def draw(counts, N, h):
    """One of the answers, as if all N people had given it."""
    scores = np.cumsum([soft_score(n, N) for _, n in counts])
    i = int(np.searchsorted(scores, splitmix.uniform(h, 'answer') * scores[-1], side='right'))
    return [(counts[min(i, len(counts) - 1)][0], N)]

  def read(record, h):
    if not record[column]:
      raise CorruptExample(f'no {column}')
    values = [record[column]] if is_class else record[column]
    counts = [(v, n) for v, n in collections.Counter(map(normalize, values)).most_common() if v in index]
    counts = draw(counts, len(values), h) if training and task.single_answer and counts else counts[:M]
    padding = [0] * (M - len(counts))
    return [index[v] for v, _ in counts] + padding, [n / len(values) for _, n in counts] + padding
  return FeatureReader({'label': (np.int32, (M,)), 'weight': (np.float32, (M,))}, read,
                       lambda rows: dict(zip(('label', 'weight'), zip(*rows))))


def text_columns(task: TaskSpec) -> set[str]:
  """Columns from which a task takes labels and texts."""
  label = task.label_column or ('text' if task.type.readout == 'masked' else '')
  return {label}.union(*map(templates.columns, (*task.caption_templates, task.template)))


def has_phrase(task: TaskSpec) -> bool:
  """Whether a task's examples have a paired text or a caption to generate."""
  return task.type.target == 'pair' or task.type.readout == 'queries'


def phrase_specs(task: TaskSpec) -> Specs:
  """Of a paired text, whose `text_id` is equal for equal tokens, or of a caption: `text` [words | queries]."""
  S = task.max_len
  if task.type.target == 'pair':
    return {'target': (np.int32, (S,)), 'target_valid': (np.bool_, (S,)), 'text_id': (np.int32, ()),
            'weight': (np.float32, (1,))}
  return {'text': (np.int32, (2 * S,)), 'text_valid': (np.bool_, (2 * S,)), 'label': (np.int32, (S,)),
          'weight': (np.float32, (S,))}


def phrase_features(
    task: TaskSpec, tokenizer: Tokenizer, tokens: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
  """Features of `phrase_specs` from phrases: int32 [n, S], bool [n, S]."""
  if task.type.target == 'pair':
    return {'target': tokens, 'target_valid': valid, 'weight': 1.0, 'text_id': _text_ids(tokens)}
  return {'text': np.concatenate([tokens, np.full_like(tokens, tokenizer.spe)], 1),
          'text_valid': np.concatenate([valid, valid], 1), 'label': tokens, 'weight': valid}


def _text_ids(tokens: np.ndarray) -> np.ndarray:
  """Numbers below 2**31 [n], equal for equal rows: texts may differ in their case, or where they are cut.

  A multilinear hash (Lemire, Kaser: Strongly universal string hashing is fast, 2014), which is an eighth of the time of
  CRC-32 row by row.
  """
  factors = splitmix.mix(np.arange(tokens.shape[1], dtype=np.uint64), 'text_id')
  return (tokens.astype(np.uint64) @ factors >> 33).astype(np.int32)


def _phrase_reader(task: TaskSpec, records: FileDataset, tokenizer: Tokenizer, training: bool) -> FeatureReader:
  S = task.max_len

  def collate(texts):
    tokens, valid = pad_tokens(encode_texts(texts, tokenizer, S), S, tokenizer.pad)
    return phrase_features(task, tokenizer, tokens, valid)
  return FeatureReader(phrase_specs(task), _phrase_chooser(task, records, training), collate)


def _template_reader(task: TaskSpec, records: FileDataset, tokenizer: Tokenizer, training: bool) -> FeatureReader:
  """Reader of filled templates, see `template_features`."""
  S = task.max_len
  _check_columns(task, records, 'template', templates.columns(task.template), 'text', 'class')
  specs = {'text': (np.int32, (S,)), 'text_valid': (np.bool_, (S,)), 'position': (np.int32, (1,))}
  if training and task.word_dropout:
    specs[IN_FIELD] = np.bool_, (S,)
  return FeatureReader(specs, lambda record, _: fill_template(tokenizer, task.template, record, S),
                       lambda filled: template_features(filled, task, tokenizer, training))


def template_features(
    filled: Sequence[FilledTemplate], task: TaskSpec, tokenizer: Tokenizer, training: bool) -> dict[str, np.ndarray]:
  """Features of filled templates: those of a text segment, and what `words.drop_words` needs if it will leave out."""
  text, valid = pad_tokens([f.ids for f in filled], task.max_len, tokenizer.pad)
  features = {'text': text, 'text_valid': valid, 'position': np.array([f.slot for f in filled], np.int32)[:, None]}
  if training and task.word_dropout:
    features[IN_FIELD] = pad_tokens([f.in_field for f in filled], task.max_len, False)[0].astype(bool)
  return features


def word_mirror(pairs: Sequence[Sequence[str]]) -> Callable[[Record], Record]:
  """Record → the record with the words of every pair exchanged in its texts.

  Words are whole, also beside an underscore, and keep their case.
  """
  other = {a.lower(): b for left, right in pairs for a, b in ((left, right), (right, left))}
  pattern = re.compile(rf'(?<![^\W_])(?:{"|".join(map(re.escape, other))})(?![^\W_])', re.IGNORECASE)

  def exchange(match):
    word = other[match[0].lower()]
    return word.upper() if match[0].isupper() else word.capitalize() if match[0][0].isupper() else word.lower()

  def mirror(value):
    if isinstance(value, (tuple, list)):
      return tuple(map(mirror, value))
    return pattern.sub(exchange, value) if isinstance(value, str) else value
  return lambda record: {column: mirror(value) for column, value in record.items()}


def _phrase_chooser(task: TaskSpec, records: FileDataset, training: bool) -> Callable[[Record, int], str]:
  """(record, h) → phrase: random template and entries of lists in training, else the first ones."""
  for template in task.caption_templates:
    _check_columns(task, records, 'caption_templates', templates.columns(template), 'text', 'texts', 'class')
  draw = lambda items, *purpose: items[splitmix.mix(*purpose) % len(items) if training else 0]

  def choose(record, h):
    template, values = draw(task.caption_templates, h, 'phrase'), {}
    for column in templates.columns(template):
      values[column] = record[column]
      if not isinstance(record[column], str):
        if not record[column]:
          raise CorruptExample(f'no {column}')
        values[column] = draw(record[column], h, column)
    text = templates.fill(template, values)
    if not text.strip():
      raise CorruptExample('empty text')
    return text
  return choose


def references(task: TaskSpec, record: Record) -> tuple[str, ...]:
  """The correct texts of a record under the task's first template: one per entry of a list of texts, of two per pair.

  They have the order of `phrases`.
  """
  template = task.caption_templates[0]
  values = {column: record[column] for column in templates.columns(template)}
  entries = ([value] if isinstance(value, str) else value for value in values.values())
  return tuple(templates.fill(template, dict(zip(values, chosen))) for chosen in itertools.product(*entries))


def columns_of_type(records: FileDataset, *types: str) -> list[str]:
  return [c for c, column_type in records.columns.items() if column_type in types]


def _check_columns(task: TaskSpec, records: FileDataset, field: str, names: Sequence[str], *types: str) -> None:
  choices = columns_of_type(records, *types)
  for name in names:
    if name not in choices:
      raise UsageError(
          f'config.tasks.{task.name}.{field} names column {name!r} of source {task.source!r}; '
          f'{nearest(name, choices)}.')
