"""Tasks of preparation in processes of this machine, with progress."""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

Task = Callable[[], int]  # returns a number of rows
_PERIOD = 10.0  # seconds between lines of progress
_PENDING = 4  # tasks per process that wait


def run(tasks: Iterable[Task], num_tasks: int, what: str | None, num_workers: int) -> None:
  """Runs tasks; with one worker in this process.

  Args:
    tasks: that can be pickled.
    num_tasks: how many there are.
    what: 'read', for progress; None: without, for tasks that print their own.
  """
  progress = _Progress(num_tasks, what)
  num_workers = min(num_workers, num_tasks)
  if num_workers <= 1:
    for task in tasks:
      progress.add(task())
    return
  # A forked process would have this one's threads' locks, taken.
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(num_workers, context, _end_with_parent) as pool:
    pending = collections.deque()
    try:
      for task in tasks:
        pending.append(pool.submit(task))
        if len(pending) >= _PENDING * num_workers:
          progress.add(pending.popleft().result())
      while pending:
        progress.add(pending.popleft().result())
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
  """Ends this process with the one that started it, also if that is killed; Ctrl-C is for that one to handle."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def wait() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
  threading.Thread(target=wait, daemon=True).start()


class _Progress:
  """A line now and then."""

  def __init__(self, num_tasks: int, what: str | None):
    self._num_tasks, self._what = num_tasks, what
    self._start = self._shown = time.monotonic()
    self._num_done = self._num_rows = 0

  def add(self, num_rows: int) -> None:
    """Counts a task that is done."""
    self._num_done, self._num_rows = self._num_done + 1, self._num_rows + num_rows
    now = time.monotonic()
    if self._what and now - self._shown >= _PERIOD:
      self._shown, elapsed = now, now - self._start
      left = elapsed / self._num_done * (self._num_tasks - self._num_done)
      print(f'{self._what} {self._num_rows:,} rows, {self._num_rows / elapsed:,.0f} rows/s, part {self._num_done:,} of '
            f'{self._num_tasks:,}, {left / 60:,.1f} min left', flush=True)
