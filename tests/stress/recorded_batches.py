"""A launch script that records the rows of every batch and stops itself at a step, for resharding.py.

  python -m tests.stress.recorded_batches FILE STEP FAULT launch/train.py --config=…

FILE gets one line {step, task, rows} per batch. `rows` are the sorted hashes of this process's rows, so that their
order on the devices does not matter. STEP is the last one to train. FAULT is a name in `FAULTS` or ''.
"""

import collections
import hashlib
import json
import runpy
import signal
import sys
from collections.abc import Callable

import numpy as np


def row_hashes(batch: dict[str, dict[str, np.ndarray]], per_batch: tuple[str, ...]) -> list[str]:
  """Return a hash of each row, sorted: of all its fields, its group, its micro-step and what the micro-step shares.

  Args:
    batch: of one process, see `Mixture`.
    per_batch: names of fields without an example axis.
  """
  hashes = []
  for group, fields in batch.items():
    for index in np.ndindex(fields['id'].shape):  # shard and row, after the micro-step if there are several
      micro_step = index[:-2]
      digest = hashlib.sha256(f'{group} {micro_step}'.encode())
      for name in sorted(fields):
        value = np.ascontiguousarray(fields[name][micro_step if name in per_batch else index])
        digest.update(f'{name} {value.dtype} {value.shape}'.encode() + value.tobytes())
      hashes.append(digest.hexdigest()[:16])
  return sorted(hashes)


def _record(path: str, last_step: int) -> None:
  """Record batches as the training loop takes them, which is later than they are made."""
  import jax

  from uni_moe_jax.data.batches.lookahead import Lookahead
  from uni_moe_jax.data.batches.mixtures import UNBATCHED_FIELDS, Mixture
  iterate, take, made = Mixture.iterate, Lookahead.take, collections.deque()

  def recorded(mixture, start, stop):
    for step, (task, batch) in enumerate(iterate(mixture, start, stop), start + 1):
      made.append(({'step': step, 'task': task, 'rows': row_hashes(batch, UNBATCHED_FIELDS)}, last_step < stop))
      yield task, batch

  def taken(batches):
    if (result := take(batches)) is not None:
      row, stops_early = made.popleft()
      with open(path, 'a') as file:
        file.write(json.dumps(row) + '\n')
      # With several processes, each learns one step later that one of them got the signal (parallel/multihost.py).
      if stops_early and row['step'] == last_step - (jax.process_count() > 1):
        signal.raise_signal(signal.SIGTERM)
    return result

  Mixture.iterate, Lookahead.take = recorded, taken
  # The count of corrupt examples includes those read ahead, so that it differs between any two runs.
  Mixture.num_corrupt_examples = lambda *_: 0


def _shifted_shard() -> None:
  """If a batch has several shards, let the last one read one batch ahead."""
  import tensorflow as tf

  from uni_moe_jax.data.batches.mixtures import Mixture
  original = Mixture._task_fields

  def fields(mixture, task, counts, undamaged):
    layout, (current, num_read) = mixture.layout, original(mixture, task, counts, undamaged)
    if layout.num_shards == 1 or layout.num_shards - 1 not in layout.local_shards:
      return current, num_read
    axis, (later, _) = 1 + int(layout.accum_steps > 1), original(mixture, task, counts + 1, undamaged)
    kept = tf.range(len(layout.local_shards) - 1)
    return {name: tf.concat([tf.gather(value, kept, axis=axis),
                             tf.gather(later[name], [len(layout.local_shards) - 1], axis=axis)], axis)
            for name, value in current.items()}, num_read

  Mixture._task_fields = fields


def _reset_ema() -> None:
  """Reset the parameter averages of a resumed run: no batch and no loss shows it, only the state does."""
  import jax
  import jax.numpy as jnp

  from uni_moe_jax.train.checkpoint import Checkpoints
  original = Checkpoints.restore

  def restore(checkpoints, like, step=None):
    state = original(checkpoints, like, step)
    return state.replace(ema_params=jax.tree.map(jnp.copy, state.params))

  Checkpoints.restore = restore


# name -> (what injects it, words of the finding that detects it)
FAULTS: dict[str, tuple[Callable[[], None], str]] = {
    'shifted_shard': (_shifted_shard, 'rows differ from those of one device'),
    'reset_ema': (_reset_ema, 'arrays differ')}


if __name__ == '__main__':
  file_, last_step_, fault_ = sys.argv[1:4]
  _record(file_, int(last_step_))
  if fault_:
    FAULTS[fault_][0]()
  from tests.stress import resharding_config
  resharding_config.register()
  sys.argv = sys.argv[4:]
  runpy.run_path(sys.argv[0], run_name='__main__')
