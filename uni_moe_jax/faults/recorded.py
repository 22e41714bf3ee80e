"""A launch script that writes down the rows of every batch that it takes, and asks itself to stop at a step (moves.py).

  python -m uni_moe_jax.faults.recorded FILE STEP PLANT launch/train.py --config=…

FILE gets a line {step, task, rows} per batch; rows are hashes, sorted: a process has some of a step's rows, and how they lie on
its devices does not count. STEP is the last that is trained. PLANT is one of `PLANTS`; '' plants nothing.
"""

import hashlib
import json
import runpy
import signal
import sys
from collections.abc import Callable

import numpy as np


def row_hashes(batch: dict[str, dict[str, np.ndarray]], per_batch: tuple[str, ...]) -> list[str]:
  """A hash of each row, sorted: of all its fields, its group and micro-step, and of what its micro-step shares.

  Args:
    batch: of a process, see `Mixture`. per_batch: names of fields without an example axis.
  """
  hashes = []
  for group, fields in batch.items():
    for place in np.ndindex(fields['id'].shape):  # shard and row, behind the micro-step if there are several
      micro = place[:-2]
      digest = hashlib.sha256(f'{group} {micro}'.encode())
      for name in sorted(fields):
        value = np.ascontiguousarray(fields[name][micro if name in per_batch else place])
        digest.update(f'{name} {value.dtype} {value.shape}'.encode() + value.tobytes())
      hashes.append(digest.hexdigest()[:16])
  return sorted(hashes)


def _record(path: str, last: int) -> None:
  """Batches are written down as the loop takes them."""
  import jax

  from uni_moe_jax.data.pipeline.mixtures import UNBATCHED_FIELDS, Mixture
  plain = Mixture.iterate

  def iterate(mixture, start, stop):
    # Of several processes, each learns one step later that one was asked (parallel/multihost.py).
    asked = last - (1 if jax.process_count() == 1 else 2)
    with open(path, 'a') as file:
      for step, (task, batch) in enumerate(plain(mixture, start, stop), start):
        file.write(json.dumps({'step': step + 1, 'task': task, 'rows': row_hashes(batch, UNBATCHED_FIELDS)}) + '\n')
        file.flush()
        if step == asked and last < stop:
          signal.raise_signal(signal.SIGTERM)
        yield task, batch

  Mixture.iterate = iterate
  # How many were bad is counted by each process since it began, and it reads ahead: no two runs say the same.
  Mixture.num_corrupt_examples = lambda mixture: 0


def _shifted_shard() -> None:
  """Where a batch is laid out in several shards, the last of them reads what is its turn one batch later."""
  import tensorflow as tf

  from uni_moe_jax.data.pipeline.mixtures import Mixture
  plain = Mixture._task_fields

  def fields(mixture, task, count):
    layout, found = mixture.layout, plain(mixture, task, count)
    if layout.num_shards == 1 or layout.num_shards - 1 not in layout.local_shards:
      return found
    axis, later = int(layout.accum_steps > 1), plain(mixture, task, count + 1)
    kept = tf.range(len(layout.local_shards) - 1)
    return {name: tf.concat([tf.gather(value, kept, axis=axis), tf.gather(later[name], [len(layout.local_shards) - 1], axis=axis)], axis)
            for name, value in found.items()}

  Mixture._task_fields = fields


def _lost_average() -> None:
  """A resumed run begins the averages of its parameters anew: no batch and no loss tells, only the state does."""
  import jax
  import jax.numpy as jnp

  from uni_moe_jax.train.checkpoint import Checkpoints
  plain = Checkpoints.restore

  def restore(checkpoints, like, step=None):
    state = plain(checkpoints, like, step)
    return state.replace(ema_params=jax.tree.map(jnp.copy, state.params))

  Checkpoints.restore = restore


# name -> (what it plants, what must be said of it).
PLANTS: dict[str, tuple[Callable[[], None], str]] = {
    'shifted_shard': (_shifted_shard, 'rows are not those of one device'),
    'lost_average': (_lost_average, 'arrays differ')}


if __name__ == '__main__':
  file_, last_, plant_ = sys.argv[1:4]
  _record(file_, int(last_))
  if plant_:
    PLANTS[plant_][0]()
  from uni_moe_jax.faults import moved_run
  moved_run.register()
  sys.argv = sys.argv[4:]
  runpy.run_path(sys.argv[0], run_name='__main__')
