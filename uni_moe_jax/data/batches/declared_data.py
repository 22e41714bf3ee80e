"""Placeholder data with the shapes that a config declares, for programs that are compiled but not run.

Batches have the shapes of real ones because the same builder makes them, from a few made-up records. Sizes that no
config contains (how many classes a dataset has, how many frames a video) are declared in `config.preflight`.
"""

import dataclasses

import ml_collections
import numpy as np

from uni_moe_jax.config.plan import Plan, SetSpec, TaskSpec
from uni_moe_jax.data.batches.target_sets import TargetSet, bucket_by_length, vocabulary_set
from uni_moe_jax.data.examples.examples import ExampleBuilder, Examples
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.text import clip_tokenizer
from uni_moe_jax.data.text.class_names import parse_entries
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.utils import templates
from uni_moe_jax.utils.errors import UsageError

_WORD = 'word'


class PlaceholderTokenizer(Tokenizer):
  """V ids without a vocabulary: every word of a text becomes the same id."""
  pad, spe, eot, word = 0, 1, 2, 3
  special_ids = frozenset((pad, spe, eot))

  def __init__(self, size: int):
    self.size = size
    self.word_start = np.ones(size, bool)
    self.word_end = np.zeros(size, bool)

  def encode(self, text: str) -> list[int]:
    return [self.word] * len(text.split())


class DeclaredData:
  """Replaces `assemble.Data`; see there. It has no fingerprint, because nothing is read."""
  fingerprint, tokenizer_file = 'declared', None

  def __init__(self, config: ml_collections.ConfigDict, plan: Plan):
    """Raises UsageError for a set whose number of entries is not declared."""
    self._model, self._num_frames = config.model, dict(config.preflight.num_frames)
    self.tokenizer = PlaceholderTokenizer(
        clip_tokenizer.VOCAB_SIZE if config.tokenizer.type == 'clip' else config.tokenizer.vocab_size)
    lengths = config.preflight.target_lengths
    self.target_sets = {s.name: _declared_set(s, lengths.get(s.name), self.tokenizer)
                        for s in (*plan.sets, *plan.probe_sets)}
    classes = {name: (_WORD,) for name in self.target_sets}
    self._builder = ExampleBuilder(
        self.tokenizer, classes, config.model.channels, config.model.image_size, False,
        config.data.random_special_tokens, config.seed, 0.0, config.data.resize)

  def examples(self, task: TaskSpec, training: bool = False) -> Examples:
    """Returns examples with the shapes of a task's; their content is meaningless."""
    # Every task gets its own source: two tasks with one source may declare videos of different lengths.
    task = dataclasses.replace(task, source=task.name, train_fraction=1.0, shots=0)
    return dataclasses.replace(self._builder, training=training).build(task, self._records(task))

  def _records(self, task: TaskSpec) -> FileDataset:
    side = self._model.image_size
    text = np.array([' '.join([_WORD] * max(1, task.max_len))])
    columns, classes = {task.label_column or 'text': text}, {}
    for template in (*task.caption_templates, task.template):
      columns |= dict.fromkeys(templates.columns(template), text)
    if task.type.has_classes:
      columns[task.label_column], classes[task.label_column] = np.array([_WORD]), (_WORD,)
    if task.type.visual:
      T = self._num_frames.get(task.name, task.num_frames or 1)
      columns['pixels'] = np.zeros((1, T, side, side), np.uint8)
    return file_dataset.in_memory(task.source, columns, classes)


def _declared_set(
    spec: SetSpec, lengths: tuple[tuple[int, int], ...] | None, tokenizer: PlaceholderTokenizer) -> TargetSet:
  """Makes a target set of ((tokens, entries), …); names of entries in the config have `max_len` tokens."""
  if spec.is_vocabulary:
    return vocabulary_set(tokenizer.size)
  if lengths is None and isinstance(spec.entries, str):
    raise UsageError(f'config.preflight.target_lengths.{spec.name} is missing: the number and length of the entries of '
                     f'{spec.entries!r} are unknown without data; give ((tokens, entries), …), for example '
                     f'(({spec.max_len}, 1000),).')
  row = lambda tokens: [tokenizer.word] * (tokens - 1) + [tokenizer.eot]
  if lengths is not None:
    rows = [[row(tokens)] for tokens, entries in lengths for _ in range(entries)]
  else:
    entries = parse_entries(spec.entries, f'target_sets.{spec.name}.entries')
    rows = [[row(spec.max_len)] * (len(names) if spec.synonyms else 1) for _, names in entries]
  buckets, order = bucket_by_length(rows, tokenizer.pad)
  return TargetSet(buckets, order, ('',) * len(rows))
