"""Ends a run that hangs: says in which phase, for how long, where every thread stands, and what to look at.

The exit code is 1: nothing is saved after the last checkpoint, so that it is not the orderly stop that 75 promises; and who
restarts the command should count it, since what hangs once may hang at the same step again.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from uni_moe_jax.utils.exit_codes import ERROR

_TICKS = 20  # per limit
START = 'starting'
BATCH = 'waiting for the batch'
STEP = 'waiting for the result'
SAVE = 'saving'
_FACTORS = {START: 6}  # limits that a phase may take, if it is not one: data are read and programs compiled in it
_LOOK_AT = {
    START: 'Look at the disk or network where the data and the work directory lie, at the devices, and at the logs of the other '
           'processes of this run.',
    BATCH: 'Look at the disk or network where the data lies, and at the memory that is free.',
    STEP: 'Look at the devices, and at the logs of the other processes of this run: one that has died is waited for in vain.',
    SAVE: 'Look at the disk or network where the work directory lies.',
}


def _end(code: int) -> None:
  os._exit(code)  # threads that hang would keep sys.exit waiting


class HangDetector:
  """Watches phases of a loop from a thread of its own; a context manager."""

  def __init__(self, limit: float, end: Callable[[int], None] = _end):
    """limit: seconds that a phase may take, START six times as many; 0: nothing is watched. end: is called with the exit code."""
    self._limit, self._end = limit, end
    self._phase: tuple[str, int | None] | None = None
    self._waited = 0.0
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self) -> 'HangDetector':
    if self._limit:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._stop.set()
    if self._limit:
      self._thread.join()

  @contextlib.contextmanager
  def phase(self, name: str, step: int | None = None) -> Iterator[None]:
    """What the run is doing: START, BATCH, STEP or SAVE, and for which step. What is done outside of a phase may take any time."""
    self._waited, self._phase = 0.0, (name, step)
    try:
      yield
    finally:
      self._phase = None

  def _watch(self) -> None:
    tick, last = self._limit / _TICKS, time.monotonic()
    while not self._stop.wait(tick):
      now = time.monotonic()
      # A process that was stopped and goes on has not waited: no tick counts for more than two.
      self._waited, last = self._waited + min(now - last, 2 * tick), now
      phase = self._phase
      if phase is not None and self._waited > self._limit * _FACTORS.get(phase[0], 1):
        self._complain(*phase)
        return

  def _complain(self, name: str, step: int | None) -> None:
    what, times = name if step is None else f'{name} of step {step}', f'{_FACTORS[name]} times ' if name in _FACTORS else ''
    print(f'\nerror: {what} has taken {self._waited:.0f} s, and {times}config.train.hang_timeout={self._limit:g} is the limit. '
          f'{_LOOK_AT[name]} If it is only slow, raise the limit; 0 switches it off. The same command continues from the newest '
          'checkpoint. Where every thread stands:', file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    self._end(ERROR)
