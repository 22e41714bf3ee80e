"""Data that is not here: a stand-in with the shapes that a config declares, for programs that are compiled and not run.

Batches have the shapes of real ones because the same builder makes them, from a few invented records. What no config can say
by itself (how many classes a data set has, how many frames a clip) stands in `config.preflight`.
"""

import dataclasses
from collections.abc import Sequence

import ml_collections
import numpy as np

from uni_moe_jax.config.plan import Plan, SetSpec, TaskSpec
from uni_moe_jax.data.pipeline.clip_tokenizer import MOST_MERGES, SPECIALS
from uni_moe_jax.data.pipeline.examples import Builder, Examples
from uni_moe_jax.data.pipeline.records import Records
from uni_moe_jax.data.pipeline.target_sets import TargetSet, bucket_rows
from uni_moe_jax.data.pipeline.templates import columns_of
from uni_moe_jax.utils.errors import UsageError

CLIP_WORDS = 2 * 256 + MOST_MERGES + len(SPECIALS)  # V of the published vocabulary
_WORD = 'word'


class Words:
  """Stands for a `Tokenizer` of V ids: a text becomes as many equal ids as it has words."""
  pad, spe, eot, word = 0, 1, 2, 3
  special_ids = frozenset((pad, spe, eot))

  def __init__(self, size: int):
    self.size = size
    self.word_start = np.ones(size, bool)
    self.word_end = np.zeros(size, bool)

  def encode(self, text: str) -> list[int]:
    return [self.word] * len(text.split())

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids) -> str:
    return ' '.join(_WORD for i in ids if i == self.word)


class DeclaredData:
  """Stands for `assemble.Data`; see there. It has no fingerprint, for nothing was read."""
  fingerprint, tokenizer_file = 'declared', None

  def __init__(self, config: ml_collections.ConfigDict, plan: Plan):
    """Raises UsageError for a set of which nobody says how many entries it has."""
    self._model, self._frames = config.model, dict(config.preflight.num_frames)
    # A prefix that is a word has to be one.
    self.tokenizer = Words(CLIP_WORDS if config.tokenizer.type == 'clip' else config.tokenizer.vocab_size)
    every = (*plan.sets, *plan.probe_sets, *plan.answer_sets)
    self.sets = {s.name: _declared_set(s, config.preflight.target_lengths.get(s.name), self.tokenizer) for s in every}
    classes = {name: (_WORD,) for name in self.sets}
    self._builders = {
        training: Builder(self.tokenizer, classes, config.model.channels, training, config.data.random_special_tokens, config.seed)
        for training in (True, False)}

  def examples(self, task: TaskSpec, split: str | None = None, training: bool = False) -> Examples:
    """Examples with the shapes of a task's; what they show means nothing."""
    # Their source is their own: two tasks of one source may declare clips of different lengths.
    task = dataclasses.replace(task, source=task.name, train_fraction=1.0, shots=0)
    return self._builders[training].build(task, self._records(task))

  def _records(self, task: TaskSpec) -> Records:
    side = self._model.image_size
    columns = {'text': np.array([' '.join([_WORD] * max(1, task.max_len))])}
    for template in (*task.caption_templates, task.template):
      columns |= {name: columns['text'] for name in columns_of(template) if name}
    if task.label_column:
      columns[task.label_column] = np.array([_WORD])
    if task.type.visual:
      columns['pixels'] = np.zeros((1, self._frames.get(task.name, task.num_frames or 1), side, side), np.uint8)
    return Records(columns, {}, self.fingerprint)


def _declared_set(spec: SetSpec, declared: tuple[tuple[int, int], ...] | None, tokenizer: Words) -> TargetSet:
  """A target set of the declared size; texts that the config itself lists take its `length`."""
  if spec.is_vocabulary:
    return TargetSet((), np.arange(tokenizer.size, dtype=np.int32), (), tokenizer.size)
  if declared is None and isinstance(spec.entries, str):
    raise UsageError(f'config.preflight.target_lengths.{spec.name} is missing: without data nobody knows how many entries of which '
                     f'length {spec.entries!r} has; give ((tokens, entries), …), for example (({spec.max_len}, 1000),).')
  declared = declared or ((spec.max_len, len(spec.entries)),)
  rows = [[tokenizer.word] * (tokens - 1) + [tokenizer.eot] for tokens, entries in declared for _ in range(entries)]
  buckets, order = bucket_rows(rows, tokenizer.pad)
  return TargetSet(buckets, order, ('',) * len(rows), len(rows))
