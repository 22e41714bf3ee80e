"""Ends a run that hangs, with a report: phase, duration, what to check, stack of every thread.

The exit code is 1, not 75: nothing was saved since the last checkpoint, and a restarter must count it, since the run
may hang at the same step again.
"""

import contextlib
import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from uni_moe_jax.utils.exit_codes import ERROR

_TICKS = 20  # per timeout
_NOTE_AFTER = 30.0
START = 'starting'
RESTORE = 'restoring'
BATCH = 'waiting for the batch'
STEP = 'waiting for the result'
SAVE = 'saving'
EVALUATE = 'evaluating the parameters'
_LONG, _LONG_FACTOR = (START, RESTORE, EVALUATE), 6  # they read much, or compile
_CHECKS = {
    START: 'Check the disk or network of the data and the work directory, the devices, and the logs of the other '
           'processes of this run.',
    RESTORE: 'Check the disk or network of the work directory.',
    BATCH: 'Check the disk or network of the data, and the free memory.',
    STEP: 'Check the devices, and the logs of the other processes of this run: one of them may have died.',
    SAVE: 'Check the disk or network of the work directory.',
    EVALUATE: 'Check the disk or network of the data, the devices, and the logs of the other processes of this run.',
}


@dataclasses.dataclass(eq=False)
class _Phase:
  """A phase, and the seconds that it has taken, which only the watching thread counts."""
  name: str
  step: int | None
  noted_after: float
  seconds: float = 0.0

  def __str__(self) -> str:
    return self.name if self.step is None else f'{self.name} of step {self.step}'


class HangDetector:
  """Watches the phases of a loop from a thread of its own; a context manager."""

  def __init__(
      self, timeout: float, buckets: Mapping[str, str] | None = None, note_after: float = _NOTE_AFTER,
      end: Callable[[int], None] = os._exit):
    """Starts when it is entered.

    Args:
      timeout: seconds per phase, six times as many for START, RESTORE and each evaluator; 0 disables.
      buckets: phase → address of the bucket that it reads or writes; its waits are noted.
      note_after: seconds until a wait for a bucket is noted, then after twice as long.
      end: gets the exit code after the report; sys.exit would wait for the hanging threads.
    """
    self._timeout, self._buckets, self._note_after, self._end = timeout, buckets or {}, note_after, end
    self._phase: _Phase | None = None
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='hang detection', daemon=True)

  def __enter__(self) -> 'HangDetector':
    if self._timeout:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._stop.set()
    if self._timeout:
      self._thread.join()

  @contextlib.contextmanager
  def phase(self, name: str, step: int | None = None) -> Iterator[None]:
    """Limits the time of the body: START, …, EVALUATE, of a step. Code outside has no limit."""
    self._phase = _Phase(name, step, self._note_after)
    try:
      yield
    finally:
      self._phase = None

  def _watch(self) -> None:
    tick, last = min(self._timeout / _TICKS, self._note_after), time.monotonic()
    while not self._stop.wait(tick):
      now = time.monotonic()
      # At most two ticks count, so that a process that was suspended for a while does not hang.
      passed, last = min(now - last, 2 * tick), now
      phase = self._phase  # the loop may replace it meanwhile
      if phase is None:
        continue
      phase.seconds += passed
      if phase.name in self._buckets and phase.seconds > phase.noted_after:
        print(f'waiting for {self._buckets[phase.name]}: {phase} has taken {phase.seconds:.0f} s', file=sys.stderr,
              flush=True)
        phase.noted_after = 2 * phase.seconds
      if phase.seconds > self._timeout * (_LONG_FACTOR if phase.name in _LONG else 1):
        self._report(phase)
        return

  def _report(self, phase: _Phase) -> None:
    factor = f'{_LONG_FACTOR} times ' if phase.name in _LONG else ''
    store = f' (waiting for {self._buckets[phase.name]})' if phase.name in self._buckets else ''
    print(f'\nerror: {phase} has taken {phase.seconds:.0f} s{store}; the limit is {factor}'
          f'config.train.hang_timeout={self._timeout:g}. {_CHECKS[phase.name]} If it is just slow, raise hang_timeout '
          '(0: off). The same command continues from the newest checkpoint. Stack of every thread:',
          file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    self._end(ERROR)
