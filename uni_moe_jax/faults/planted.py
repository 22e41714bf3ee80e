"""A launch script with a fault planted in it, which the checks of this package must find: the checks of the checks.

  python -m uni_moe_jax.faults.planted NAME launch/train.py --config=…
"""

import contextlib
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable

from uni_moe_jax.utils.errors import RunError


def _one_bit() -> None:
  """A resumed run has one bit of one parameter changed."""
  import jax
  import numpy as np

  from uni_moe_jax.train.checkpoint import Checkpoints
  plain = Checkpoints.restore

  def restore(checkpoints, like, step=None):
    state = plain(checkpoints, like, step)
    leaves, tree = jax.tree.flatten(state.params)
    value = np.array(leaves[0])
    value.reshape(-1).view(np.uint32)[0] ^= 1
    leaves[0] = jax.device_put(value, leaves[0].sharding)
    return state.replace(params=jax.tree.unflatten(tree, leaves))

  Checkpoints.restore = restore


def _skipped_batch() -> None:
  """A resumed run leaves one batch out."""
  from uni_moe_jax.data.pipeline.mixtures import Mixture
  plain = Mixture.iterate
  Mixture.iterate = lambda mixture, start, stop: plain(mixture, start + (start > 0), stop + (start > 0))


def _lost_checkpoints() -> None:
  """A run starts from the beginning, whatever was saved."""
  from uni_moe_jax.train.checkpoint import Checkpoints
  plain = Checkpoints.latest
  Checkpoints.latest = lambda checkpoints: plain(checkpoints) if checkpoints._own else None


def _no_sums() -> None:
  """Checkpoints are read without a look at their sums."""
  from uni_moe_jax.train import manifest
  manifest.damage = lambda folder: ''


_LATE = 1.5  # seconds


def _late_manifest() -> None:
  """A checkpoint gets its name before its manifest is written."""
  from uni_moe_jax.train import manifest
  plain = manifest.write

  def write(folder, final, metrics):
    del folder
    def later():
      time.sleep(_LATE)
      with contextlib.suppress(FileNotFoundError):  # it has been deleted, for a newer one
        plain(final, final, metrics)
    threading.Thread(target=later).start()

  manifest.write = write


def _one_batch() -> None:
  """Every step gets the first batch: no fault, but what the speed of the data is measured by (soak.py)."""
  from uni_moe_jax.data.pipeline.mixtures import Mixture
  plain = Mixture.iterate

  def iterate(mixture, start, stop):
    first = next(plain(mixture, start, stop))
    for _ in range(start, stop):
      yield first

  Mixture.iterate = iterate


def _after_saves() -> None:
  """Resident memory is written down after every save, when no step runs and the heap's holes have been given back: no fault either
  (soak.py)."""
  from uni_moe_jax.faults import soak
  from uni_moe_jax.utils import heap
  [workdir] = [a.partition('=')[2] for a in sys.argv if a.startswith('--workdir=')]
  plain = heap.give_back

  def give_back():
    import jax  # not before the command has said where it runs
    jax.block_until_ready(jax.live_arrays())  # a step that runs has buffers of its own: more or less of them, by chance
    time.sleep(.5)  # they go a moment after its results have come
    plain()
    with open(soak.after_saves_file(workdir), 'a') as file:
      file.write(f'{soak.resident_megabytes(os.getpid())}\n')

  heap.give_back = give_back


def _stalled_start() -> None:
  """The data cannot be read."""
  from uni_moe_jax.data.assemble import Data
  Data.records = lambda *_: _a_disk_that_does_not_answer()


def _stalled_input() -> None:
  """The sixth batch never comes."""
  from uni_moe_jax.data.pipeline.mixtures import Mixture
  plain = Mixture.iterate

  def iterate(mixture, start, stop):
    for i, batch in enumerate(plain(mixture, start, stop)):
      if i == _GOOD_STEPS:
        _a_disk_that_does_not_answer()
      yield batch

  Mixture.iterate = iterate


def _fails_alone() -> None:
  """The second process cannot read its sixth batch."""
  import jax

  from uni_moe_jax.data.pipeline.mixtures import Mixture
  plain = Mixture.iterate

  def iterate(mixture, start, stop):
    for i, batch in enumerate(plain(mixture, start, stop)):
      if i == _GOOD_STEPS and jax.process_index() == 1:
        raise RunError(ALONE)
      yield batch

  Mixture.iterate = iterate


ALONE = 'its disk is gone.'  # what that process says


def _hung_step() -> None:
  """The sixth step never ends."""
  from uni_moe_jax.train.run import Step
  plain, calls = Step.__call__, []

  def call(step, *arguments):
    calls.append(1)
    if len(calls) > _GOOD_STEPS:
      _a_device_that_does_not_answer()
    return plain(step, *arguments)

  Step.__call__ = call


_GOOD_STEPS = 5


def _a_disk_that_does_not_answer() -> None:
  time.sleep(3600)


def _a_device_that_does_not_answer() -> None:
  time.sleep(3600)


# What the checks of kills and damage must find, with words of the finding: who fails in another way has not been found out.
FAULTS: dict[str, tuple[Callable[[], None], str]] = {
    'one_bit': (_one_bit, 'arrays differ'), 'skipped_batch': (_skipped_batch, 'arrays differ'),
    'lost_checkpoints': (_lost_checkpoints, 'resumed from nothing'), 'late_manifest': (_late_manifest, 'was left damaged'),
    'no_sums': (_no_sums, 'THE DAMAGED ONE WAS READ')}
# name -> seconds of the watchdog, which are few, but enough where much else runs; and what it must say.
HANGS = {'stalled_start': (1., ('starting has taken', '_a_disk_that_does_not_answer')),
         'stalled_input': (6., ('waiting for the batch of step 6', '_a_disk_that_does_not_answer')),
         'hung_step': (6., ('waiting for the result of step 6', '_a_device_that_does_not_answer'))}
_ALL = {**{name: plant for name, (plant, _) in FAULTS.items()}, 'one_batch': _one_batch, 'after_saves': _after_saves,
        'stalled_start': _stalled_start, 'stalled_input': _stalled_input, 'hung_step': _hung_step, 'fails_alone': _fails_alone}


if __name__ == '__main__':
  _ALL[sys.argv[1]]()
  sys.argv = sys.argv[2:]
  runpy.run_path(sys.argv[0], run_name='__main__')
