"""A launch script with an injected fault: hangs and failures for the suites, and faults that their checks must detect.

  python -m tests.stress.injected_faults NAME launch/train.py --config=…
"""

import contextlib
import errno
import itertools
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_GOOD_STEPS = 5  # before a fault
_MANIFEST_DELAY = 1.5  # seconds


def _flipped_bit() -> None:
  """Flip one bit of one parameter in a resumed run."""
  import jax
  import numpy as np

  from uni_moe_jax.train.checkpoint import Checkpoints
  original = Checkpoints.restore

  def restore(checkpoints, like, step=None):
    state = original(checkpoints, like, step)
    leaves, tree = jax.tree.flatten(state.params)
    value = np.array(leaves[0])
    value.reshape(-1).view(np.uint32)[0] ^= 1
    leaves[0] = jax.device_put(value, leaves[0].sharding)
    return state.replace(params=jax.tree.unflatten(tree, leaves))

  Checkpoints.restore = restore


def _skipped_batch() -> None:
  """Skip one batch in a resumed run."""
  from uni_moe_jax.data.batches.mixtures import Mixture
  original = Mixture.iterate
  Mixture.iterate = lambda mixture, start, stop: original(mixture, start + (start > 0), stop + (start > 0))


def _ignored_checkpoints() -> None:
  """Start from step 0, whatever was saved."""
  from uni_moe_jax.train.checkpoint import Checkpoints
  original = Checkpoints.latest
  Checkpoints.latest = lambda checkpoints: original(checkpoints) if checkpoints._own else None


def _late_manifest() -> None:
  """Write the manifest of a checkpoint after the checkpoint has its name."""
  from uni_moe_jax.train import manifest
  original = manifest.write

  def write(folder, final, *contents):
    del folder
    def later():
      time.sleep(_MANIFEST_DELAY)
      with contextlib.suppress(FileNotFoundError):  # it was deleted for a newer one
        original(final, final, *contents)
    threading.Thread(target=later).start()

  manifest.write = write


def no_folder_renames(replace: Callable[[Any, str, Any], None] = setattr) -> None:
  """Refuse to rename folders, as gcsfuse does. Not a fault: runs must work there. replace: sets an attribute."""
  for name in ('rename', 'replace'):
    def rename(source, target, *, original=getattr(os, name), **descriptors):
      if os.path.isdir(source):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), os.fspath(source))
      return original(source, target, **descriptors)
    replace(os, name, rename)


def _fast_heartbeats() -> None:
  """Take over the lock of a dead process after two seconds; without it, each restart in a bucket waits a minute."""
  from uni_moe_jax.io import locks
  original = locks.lock
  locks.lock = lambda folder, stack: original(folder, stack, period=0.5)


def _stalled_start() -> None:
  """Never finish reading the data."""
  from uni_moe_jax.data.batches.assemble import Data
  Data.records = lambda *_: _disk_that_does_not_answer()


def _stalled_input() -> None:
  """Never yield the sixth batch."""
  from uni_moe_jax.data.batches.mixtures import Mixture
  original = Mixture.iterate

  def iterate(mixture, start, stop):
    yield from itertools.islice(original(mixture, start, stop), _GOOD_STEPS)
    _disk_that_does_not_answer()

  Mixture.iterate = iterate


def _hung_step() -> None:
  """Never finish the sixth step."""
  from uni_moe_jax.train.step import Step
  original, calls = Step.__call__, []

  def call(step, *arguments):
    calls.append(1)
    if len(calls) > _GOOD_STEPS:
      _device_that_does_not_answer()
    return original(step, *arguments)

  Step.__call__ = call


def _disk_that_does_not_answer() -> None:
  time.sleep(3600)


def _device_that_does_not_answer() -> None:
  time.sleep(3600)


# Faults that the checks of preemption must detect, with words of the right finding.
DETECTED = {'flipped_bit': 'arrays differ', 'skipped_batch': 'arrays differ', 'late_manifest': 'was left damaged',
            'ignored_checkpoints': 'resumed from nothing'}
# name -> (config.train.hang_timeout: short, but long enough on a loaded machine; words of the error).
HANGS = {'stalled_start': (1., ('starting has taken', '_disk_that_does_not_answer')),
         'stalled_input': (6., ('waiting for the batch of step 6', '_disk_that_does_not_answer')),
         'hung_step': (6., ('waiting for the result of step 6', '_device_that_does_not_answer'))}
ALL: dict[str, Callable[[], None]] = {f.__name__.lstrip('_'): f for f in (
    _flipped_bit, _skipped_batch, _ignored_checkpoints, _late_manifest, no_folder_renames, _fast_heartbeats,
    _stalled_start, _stalled_input, _hung_step)}


if __name__ == '__main__':
  ALL[sys.argv[1]]()
  sys.argv = sys.argv[2:]
  runpy.run_path(sys.argv[0], run_name='__main__')
