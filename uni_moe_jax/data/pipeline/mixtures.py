"""The batch of a step as a pure function of (seed, step, mixture): every task's examples, laid out for the mesh.

Nothing is shuffled by a buffer and no iterator has a state: the dataset is a range of steps, mapped. A run that starts
again at step t reads exactly what it would have read.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import Plan, TaskSpec
from uni_moe_jax.data.pipeline import hashing, mixup
from uni_moe_jax.data.pipeline.examples import Examples

Batch = dict[str, dict[str, np.ndarray]]
PER_BATCH = ('temporal_offset',)  # fields without an example axis


@dataclasses.dataclass(frozen=True)
class Feed:
  """Which part of a global batch this process makes.

  Attributes:
    accum: micro-steps per step; 1 leaves the leading axis out.
    shards: into how many parts the mesh lays out the batch.
    mine: those that this process holds, in order.
  """
  accum: int = 1
  shards: int = 1
  mine: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Training batches.

  A batch is {group: fields}; a field is [shards, b, …], or [accum, shards, b, …] with accumulation. The tasks of a group
  lie on axis b one after the other, each with batch / (accum · shards) rows per shard.

  Attributes:
    plan: tasks and groups.
    examples: per task name.
    seed: of the run.
    kind: 'all_tasks' (every task in every step) or 'one_task' (one task a step, drawn by weight).
    max_frames: rows of the temporal table: visual groups get one random offset per micro-step.
    feed: layout.
  """
  plan: Plan
  examples: dict[str, Examples]
  seed: int
  kind: str
  max_frames: int
  feed: Feed

  def iterate(self, start: int, stop: int) -> Iterator[tuple[str | None, Batch]]:
    """(task name or None, batch) of the steps start…stop-1; the name is given when the step holds one task."""
    if self.kind == 'all_tasks':
      steps = np.arange(start, stop, dtype=np.int64)
      for batch in self._dataset(self.plan.tasks, steps, steps):
        yield None, batch
      return
    drawn = draw_tasks(self.plan, self.seed, stop)
    streams = {}
    for t in self.plan.tasks:
      steps = np.flatnonzero(drawn == t.name)
      counts = np.arange(len(steps))  # the k-th draw of a task reads its k-th batch
      wanted = steps >= start
      streams[t.name] = self._dataset((t,), steps[wanted], counts[wanted])
    for name in drawn[start:]:
      yield str(name), next(streams[name])

  def _dataset(self, tasks: tuple[TaskSpec, ...], steps: np.ndarray, counts: np.ndarray):
    dataset = tf.data.Dataset.from_tensor_slices((steps, counts))
    dataset = dataset.map(lambda step, count: self._batch(tasks, step, count), num_parallel_calls=2,
                          deterministic=True)
    return self._checked(dataset.prefetch(2).as_numpy_iterator())

  def _batch(self, tasks: tuple[TaskSpec, ...], step: tf.Tensor, count: tf.Tensor):
    """Fields of all tasks at a step; `count` says which batch of its order a task reads."""
    feed, groups = self.feed, {}
    for t in tasks:
      groups.setdefault(t.group, []).append(self._task_fields(t, count))
    batch = {}
    for group, members in groups.items():
      axis = 1 if feed.accum == 1 else 2
      fields = {k: tf.concat([m[k] for m in members], axis=axis) for k in members[0]}
      if 'pixels' in fields:
        rows = self.max_frames - fields['pixels'].shape[axis + 1] + 1
        h = hashing.mix_tensor(tf.constant(np.uint64(hashing.mix(self.seed, group, 'temporal offset'))), step)
        offsets = hashing.below(hashing.mix_tensor(h, tf.range(feed.accum, dtype=tf.int64)), rows)
        fields['temporal_offset'] = offsets[0] if feed.accum == 1 else offsets
      batch[group] = fields
    return batch

  def _mixed(self, t: TaskSpec, count: tf.Tensor, place: np.ndarray, hashes: tf.Tensor, fields: dict[str, tf.Tensor]):
    """Rows 2k and 2k + 1 of the global batch mixed: both of them are rows of one shard, see `Plan.check_batches`."""
    pair = place // 2
    blended, boxed = (tf.gather(mixup.shares(alpha, t.batch_size // 2, self.seed, t.name, count), pair) if alpha else None
                      for alpha in (t.mixup_alpha, t.cutmix_alpha))
    h = tf.repeat(hashes[::2], 2)
    box = tf.stack([hashing.uniform(hashing.mix_tensor(h, purpose)) for purpose in ('box down', 'box right')], 1)
    return mixup.mix(fields, blended, boxed, box, h)

  def corrupt_examples(self) -> int:
    """How many examples of files could not be used and were replaced, up to now."""
    return sum(e.faults.bad for e in self.examples.values() if e.faults)

  def _checked(self, batches: Iterator) -> Iterator:
    """The batches, as long as few enough examples are bad."""
    for batch in batches:
      for e in self.examples.values():
        if e.faults:
          e.faults.check()
      yield batch

  def _task_fields(self, t: TaskSpec, count: tf.Tensor) -> dict[str, tf.Tensor]:
    feed, examples = self.feed, self.examples[t.name]
    per_shard = t.batch_size // (feed.accum * feed.shards)
    # Position in the global batch: micro-step, then shard, then row; this process makes the rows of its shards.
    place = np.arange(t.batch_size).reshape(feed.accum, feed.shards, per_shard)[:, list(feed.mine)].reshape(-1)
    ids, epoch = hashing.permuted(count * t.batch_size + place, examples.size, self.seed, t.name)
    hashes = hashing.example_hash(self.seed, t.name, epoch, ids)
    fields = examples.make(ids, hashes)
    if t.mixes:
      fields = self._mixed(t, count, place, hashes, fields)
    fields['id'] = tf.cast(fields['id'] & 0xFFFFFFFF, tf.uint32)
    lead = [len(feed.mine), per_shard] if feed.accum == 1 else [feed.accum, len(feed.mine), per_shard]
    return {k: tf.reshape(v, lead + v.shape[1:].as_list()) for k, v in fields.items()}


def draw_tasks(plan: Plan, seed: int, steps: int) -> np.ndarray:
  """Task name of each step 0…steps-1 of a sampled mixture: unicode [steps], by sampling weight."""
  weights = np.array([t.sampling_weight or t.loss_weight for t in plan.tasks])
  edges = np.cumsum(weights / weights.sum())
  u = np.array([hashing.mix(seed, step, 'task') / 2**64 for step in range(steps)])
  names = np.array([t.name for t in plan.tasks])
  return names[np.minimum(np.searchsorted(edges, u, side='right'), len(names) - 1)]


def evaluation_batches(examples: Examples, ids: np.ndarray, batch: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
  """Fields [batch, …] of the given ids in order, and how many rows count (the last batch is filled up with its own)."""
  zero = hashing.example_hash(0, 'evaluation', tf.constant(0, tf.int64), tf.constant(ids, tf.int64))
  for start in range(0, len(ids), batch):
    part = np.arange(start, min(start + batch, len(ids)))
    rows = np.resize(part, batch)
    fields = examples.make(tf.constant(ids[rows], tf.int64), tf.gather(zero, rows))
    fields['id'] = tf.cast(fields['id'] & 0xFFFFFFFF, tf.uint32)
    if examples.faults:
      examples.faults.check()
    yield {k: v.numpy() for k, v in fields.items()}, len(part)
