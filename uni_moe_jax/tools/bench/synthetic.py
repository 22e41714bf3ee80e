"""Random images, and texts of given lengths, instead of a run's data."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import Plan, TaskSpec
from uni_moe_jax.data.pipeline.examples import Examples
from uni_moe_jax.data.pipeline.target_sets import TargetSet, bucket_by_length, vocabulary_set

_EXAMPLES = 64
# Share of names per length in tokens, `eot` included: an assumption about class names, two to three pieces each.
REALISTIC = {2: 0.15, 3: 0.30, 4: 0.25, 5: 0.15, 6: 0.08, 7: 0.04, 8: 0.03}


@dataclasses.dataclass(frozen=True)
class Ids:
  """The token ids that a step needs; ids from `first` on are words."""
  size: int
  pad: int = 0
  spe: int = 1
  eot: int = 2
  first: int = 3


class SyntheticData:
  """Replaces `data.assemble.Data` for tasks of images with a class or a paired text."""
  fingerprint, tokenizer_file = 'synthetic', None

  def __init__(self, plan: Plan, sizes: tuple[int, int], vocabulary: int, entries: int, lengths: Mapping[int, float]):
    """sizes: pixels per side, channels. vocabulary: V. entries: of every other set. lengths: their shares."""
    self._pixels, self.tokenizer = sizes, Ids(vocabulary)
    self.target_sets = {s.name: vocabulary_set(vocabulary) if s.is_vocabulary else self._names(entries, lengths)
                        for s in plan.sets}

  def _names(self, entries: int, lengths: Mapping[int, float]) -> TargetSet:
    rng = np.random.default_rng(0)
    rows = [[[*rng.integers(self.tokenizer.first, self.tokenizer.size, n - 1).tolist(), self.tokenizer.eot]]
            for n in rng.permutation(spread_lengths(entries, lengths))]
    buckets, order = bucket_by_length(rows, self.tokenizer.pad)
    return TargetSet(buckets, order, ('',) * entries)

  def examples(self, task: TaskSpec, split: str | None = None, training: bool = False) -> Examples:
    """Return random examples; every text has all of the task's tokens."""
    rng, (side, channels) = np.random.default_rng(1), self._pixels
    pixels = tf.constant(rng.integers(0, 256, (_EXAMPLES, 1, side, side, channels), dtype=np.uint8))
    texts = rng.integers(self.tokenizer.first, self.tokenizer.size, (_EXAMPLES, max(1, task.max_len)))
    texts[:, -1] = self.tokenizer.eot
    texts = tf.constant(texts.astype(np.int32))

    def make(ids, hashes):
      fields = {'id': ids, 'pixels': tf.gather(pixels, ids), 'weight': tf.ones([tf.size(ids), 1])}
      if task.type.target == 'pair':
        target = tf.gather(texts, ids)
        return {**fields, 'target': target, 'target_valid': tf.ones_like(target, tf.bool),
                'text_id': tf.cast(ids, tf.int32)}
      return {**fields, 'label': tf.cast(ids % self.target_sets[task.target_set].size, tf.int32)[:, None]}

    return Examples(_EXAMPLES, make)


def spread_lengths(entries: int, lengths: Mapping[int, float]) -> np.ndarray:
  """Return int [entries], ascending: each length in its share, by rounding cumulative shares."""
  edges = np.round(np.cumsum(list(lengths.values())) / sum(lengths.values()) * entries).astype(int)
  return np.repeat(list(lengths), np.diff(edges, prepend=0))
