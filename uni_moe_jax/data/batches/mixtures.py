"""Training batches as a pure function of (seed, step): the data order and the layout of a batch.

Order. There is no shuffle buffer and no iterator state; a resumed run reads exactly what an uninterrupted one would.
For every task:

1. The k-th batch of a task covers positions k · B … (k + 1) · B - 1 of an endless sequence of epochs, B = batch_size.
   With mixture 'all_tasks' step t reads batch k = t of every task. With 'one_task' a hash of (seed, t) draws one task
   with probability proportional to `sampling_weight` (or else `loss_weight`), and its k-th draw reads its k-th batch.
2. A position is (epoch, index); a permutation keyed by (seed, task name, epoch) maps the index to an example id
   (`hashing.shuffled_ids`). Every example occurs once per epoch; a batch may span two epochs.
3. All randomness of an example (caption, mask, crop, …) is a hash of (seed, task name, epoch, id) and of its purpose
   (`hashing.example_hash`).

Layout. The positions of a batch fill micro-steps first, then shards of the mesh, then rows; each process makes the rows
of its own shards. As a set, the batch does not depend on the mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from uni_moe_jax.config.plan import Plan, TaskSpec
from uni_moe_jax.data import hashing
from uni_moe_jax.data.batches import in_flight, mixup
from uni_moe_jax.data.examples.examples import Examples, Features
from uni_moe_jax.utils import cores, splitmix

Batch = dict[str, dict[str, np.ndarray]]
_PREFETCHED = 2**16  # examples of a task whose order decides in which order its files are fetched
_MAX_ROWS = 512  # of small batches that are made together: more are not faster
UNBATCHED_FIELDS = ('temporal_offset',)  # features without an example axis


@dataclasses.dataclass(frozen=True)
class BatchLayout:
  """Layout of a global batch, and the part of it that this process makes."""
  accum_steps: int = 1  # micro-steps per step; 1 omits the leading axis
  num_shards: int = 1  # of a batch on the mesh
  local_shards: tuple[int, ...] = (0,)  # indices of this process's shards, in order


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Training batches of several tasks.

  A batch is {group: features}; a feature is [shards, b, …], or [accum_steps, shards, b, …] with accumulation. The tasks
  of a group are concatenated on axis b, each with batch_size / (accum_steps · shards) rows per shard.
  """
  plan: Plan
  examples: dict[str, Examples]  # by task name
  seed: int
  mode: str  # 'all_tasks' (every task in every step) or 'one_task' (one task per step, drawn by weight)
  max_num_frames: int  # rows of the temporal table: visual groups get one random offset per micro-step
  layout: BatchLayout

  def iterate(self, start: int, stop: int) -> Iterator[tuple[str | None, Batch]]:
    """Yields (task name, batch) of steps start…stop-1; the name is None if a step has every task."""
    if self.mode == 'all_tasks':
      steps = np.arange(start, stop, dtype=np.int64)
      yield from ((None, batch) for batch in self._dataset(self.plan.tasks, steps, steps))
      return
    drawn = draw_tasks(self.plan, self.seed, stop)
    iterators = {}
    for t in self.plan.tasks:
      steps = np.flatnonzero(drawn == t.name)
      remaining = steps >= start
      iterators[t.name] = self._dataset((t,), steps[remaining], np.arange(len(steps))[remaining])
    for name in drawn[start:]:
      yield str(name), next(iterators[name])

  def first_steps(self, stop: int) -> list[int]:
    """Returns the first step of each task that steps 0…stop-1 draw, in order; [0] if a step has every task."""
    if self.mode == 'all_tasks':
      return [0]
    return sorted(np.unique(draw_tasks(self.plan, self.seed, stop), return_index=True)[1].tolist())

  def num_ahead(self, batch: Batch) -> int:
    """Returns how many batches like this one, of every task, are at most made or being made for the consumer."""
    num_bytes = sum(feature.nbytes for fields in batch.values() for feature in fields.values())
    return 2 * cores.batches_at_once() * in_flight.num_together(num_bytes, self._max_together(self.plan.tasks))

  def _max_together(self, tasks: tuple[TaskSpec, ...]) -> int:
    return _MAX_ROWS // sum(len(self._positions(t)) for t in tasks)

  def num_corrupt_examples(self, sums: Callable[[list[int]], list[int]]) -> int:
    """Returns how many examples from files could not be used and were replaced so far. Raises RunError: too many.

    sums: of numbers over all processes, which must call this together.
    """
    counters = [e.corrupt_counter for e in self.examples.values()]
    totals = sums([number for c in counters for number in (c.num_corrupt, c.num_read)])
    for counter, num_corrupt, num_read in zip(counters, totals[::2], totals[1::2], strict=True):
      counter.check_sums(num_corrupt, num_read)
    return sum(totals[::2])

  def _dataset(self, tasks: tuple[TaskSpec, ...], steps: np.ndarray, counts: np.ndarray) -> Iterator[Batch]:
    """Yields batches; counts[i] is the batch number that every task reads at steps[i]."""
    for t in tasks:
      if len(steps) and (prefetch := self.examples[t.name].prefetch):
        prefetch(self._ids(t, counts[:-(-_PREFETCHED // t.batch_size), None])[0].numpy())

    def count(num_read):
      for name, n in num_read.items():
        self.examples[name].corrupt_counter.count(int(n), [])

    make = functools.partial(self._batches, tasks)
    for batch in in_flight.make_ahead(make, (steps, counts), count, max_together=self._max_together(tasks)):
      for e in self.examples.values():
        e.corrupt_counter.check()
      yield batch

  def _batches(
      self, tasks: tuple[TaskSpec, ...], undamaged: bool, steps: tf.Tensor, counts: tf.Tensor,
  ) -> tuple[dict[str, Features], dict[str, tf.Tensor]]:
    """(batches of k steps, features [k, …]; task name → number of their records that are not counted yet)."""
    accum_steps, groups, num_read = self.layout.accum_steps, {}, {}
    for t in tasks:
      fields, num_read[t.name] = self._task_fields(t, counts, undamaged)
      groups.setdefault(t.group, []).append(fields)
    batches = {}
    for group, members in groups.items():
      axis = 2 if accum_steps == 1 else 3
      features = {k: tf.concat([m[k] for m in members], axis=axis) for k in members[0]}
      if 'pixels' in features:
        num_offsets = self.max_num_frames - features['pixels'].shape[axis + 1] + 1
        h = hashing.mix_tensor(hashing.mix_constant(self.seed, group, 'temporal offset'), steps)[:, None]
        offsets = hashing.randint(hashing.mix_tensor(h, tf.range(accum_steps, dtype=tf.int64)), num_offsets)
        features['temporal_offset'] = offsets[:, 0] if accum_steps == 1 else offsets
      batches[group] = features
    return batches, num_read

  def _task_fields(self, t: TaskSpec, counts: tf.Tensor, undamaged: bool) -> tuple[Features, tf.Tensor]:
    """(features [k, …] of a task's batches with numbers [k], number of records that are not counted yet)."""
    layout, examples = self.layout, self.examples[t.name]
    per_shard = t.batch_size // (layout.accum_steps * layout.num_shards)
    ids, epoch = self._ids(t, counts[:, None])
    hashes = hashing.example_hash(self.seed, t.name, epoch, ids)
    features, num_read = examples.make_uncounted(undamaged, ids, hashes)
    if t.mixes:
      features = self._mixed(t, counts, hashes, features)
    features['id'] = tf.cast(features['id'] & 0xFFFFFFFF, tf.uint32)
    micro_steps = [layout.accum_steps] if layout.accum_steps > 1 else []
    leading = [-1, *micro_steps, len(layout.local_shards), per_shard]
    return {k: tf.reshape(v, leading + v.shape[1:].as_list()) for k, v in features.items()}, num_read

  def _positions(self, t: TaskSpec) -> np.ndarray:
    """Positions of this process's rows in a global batch of a task, int [n]."""
    layout = self.layout
    position = np.arange(t.batch_size).reshape(layout.accum_steps, layout.num_shards, -1)
    return position[:, list(layout.local_shards)].reshape(-1)

  def _ids(self, t: TaskSpec, counts: tf.Tensor | np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    """(ids, epochs) of this process's rows, int64 [n], of a task's batches with numbers [k, 1]."""
    positions = tf.reshape(counts * t.batch_size + self._positions(t), [-1])
    return hashing.shuffled_ids(positions, self.examples[t.name].size, self.seed, t.name)

  def _mixed(self, t: TaskSpec, counts: tf.Tensor, hashes: tf.Tensor, features: Features):
    """Mixes rows 2i and 2i + 1 of each global batch; both are on one shard, see `Plan.check_batches`."""
    num_pairs, pair = t.batch_size // 2, self._positions(t) // 2

    def draw(alpha):
      sample = lambda count: tf.gather(mixup.sample_lambda(alpha, num_pairs, self.seed, t.name, count), pair)
      return tf.reshape(tf.map_fn(sample, counts, fn_output_signature=tf.TensorSpec([len(pair)], tf.float32)), [-1])

    mixup_lambda, cutmix_lambda = (draw(alpha) if alpha else None for alpha in (t.mixup_alpha, t.cutmix_alpha))
    h = tf.repeat(hashes[::2], 2)
    box_center = tf.stack([hashing.uniform(hashing.mix_tensor(h, p)) for p in ('box down', 'box right')], 1)
    return mixup.apply(features, mixup_lambda, cutmix_lambda, box_center, h)


def batch_sizes(batch: Batch, layout: BatchLayout = BatchLayout()) -> dict[str, int]:
  """{'images': of a global batch, frames of videos one by one; 'tokens': of its texts, without padding}.

  batch: this process's part; the others' are taken to have as many per shard. Several may have the same shard.
  """
  images = sum(math.prod(fields['pixels'].shape[:-3]) for fields in batch.values() if 'pixels' in fields)
  valid = [fields[k] for fields in batch.values() for k in ('text_valid', 'target_valid') if k in fields]
  sizes = {'images': images, 'tokens': sum(int(np.sum(mask)) for mask in valid)}
  return {name: n * layout.num_shards // len(layout.local_shards) for name, n in sizes.items()}


def draw_tasks(plan: Plan, seed: int, steps: int) -> np.ndarray:
  """Draws the task of each step 0…steps-1 of a 'one_task' mixture: names, unicode [steps]."""
  weights = np.array([t.sampling_weight or t.loss_weight for t in plan.tasks])
  edges = np.cumsum(weights / weights.sum())
  u = [splitmix.uniform(seed, step, 'task') for step in range(steps)]
  names = np.array([t.name for t in plan.tasks])
  return names[np.minimum(np.searchsorted(edges, u, side='right'), len(names) - 1)]


def evaluation_batches(
    examples: Examples, ids: np.ndarray, batch_size: int, layout: BatchLayout = BatchLayout(),
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
  """Yields (features of this process's rows, number of rows of the batch that count) of the given ids, in order.

  A batch has `batch_size` rows, rounded up to a multiple of the layout's shards; the last one is filled up by repeating
  its own. Later batches are made while the caller works on one.
  """
  size = -(-batch_size // layout.num_shards) * layout.num_shards
  starts = np.arange(0, len(ids), size).reshape(-1, 1)
  counts = np.minimum(size, len(ids) - starts)
  rows = (starts + np.arange(size).reshape(1, -1) % counts).reshape(-1, layout.num_shards, size // layout.num_shards)
  rows = rows[:, list(layout.local_shards)].reshape(len(starts), -1)
  if examples.prefetch:
    examples.prefetch(ids[rows.reshape(-1)])
  ids = tf.constant(ids, tf.int64)
  hashes = hashing.example_hash(0, 'evaluation', tf.constant(0, tf.int64), ids)

  def make(undamaged, rows):
    num_rows, rows = rows.shape[1], tf.reshape(rows, [-1])
    features, _ = examples.make_uncounted(undamaged, tf.gather(ids, rows), tf.gather(hashes, rows))
    features['id'] = tf.cast(features['id'] & 0xFFFFFFFF, tf.uint32)
    return {k: tf.reshape(v, [-1, num_rows, *v.shape[1:].as_list()]) for k, v in features.items()}, ()

  for features, count in zip(in_flight.make_ahead(make, [rows], num_waiting=1), counts[:, 0].tolist(), strict=True):
    examples.corrupt_counter.check()
    yield features, count
