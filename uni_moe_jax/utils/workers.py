"""Tasks of preparation in processes of this machine, with progress.

Processes of multiprocessing would begin the program that started them anew, and wait for a lock that the first one has.
"""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

from uni_moe_jax.utils import module_process
from uni_moe_jax.utils.errors import RunError

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
  with contextlib.ExitStack() as stack:
    idle = [stack.enter_context(contextlib.closing(_Process())) for _ in range(num_workers)]
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(num_workers, 'workers'))

    def run_elsewhere(task: Task) -> int:
      process = idle.pop()  # there are as many as threads
      try:
        return process.run(task)
      finally:
        idle.append(process)

    pending = collections.deque()
    try:
      for task in tasks:
        pending.append(pool.submit(run_elsewhere, task))
        if len(pending) >= _PENDING * num_workers:
          progress.add(pending.popleft().result())
      while pending:
        progress.add(pending.popleft().result())
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


class _Process:
  """A process that runs `main`. It ends with this one, also if this one is killed."""

  def __init__(self):
    self._connection, other = multiprocessing.Pipe()
    with other:
      self._popen = module_process.start(__name__, other.fileno())

  def run(self, task: Task) -> int:
    """Runs a task. Raises what it raises; RunError: the process has ended."""
    message = pickle.dumps(task)
    try:
      self._connection.send_bytes(message)
      answer = self._connection.recv_bytes()
    except (EOFError, ConnectionError):
      raise RunError(
          f'a worker process ended with exit code {self._popen.wait()} (-9: killed, mostly because memory was full). '
          'The same command continues; fewer processes, --num_workers, need less memory.') from None
    num_rows, error = pickle.loads(answer)
    if error is not None:
      raise error
    return num_rows

  def close(self) -> None:
    with self._popen:  # closes its input only when it has ended
      self._connection.close()  # `main` returns
      self._popen.wait()


def main() -> None:
  """Runs the tasks that another process sends, and answers each with (number of rows, error or None)."""
  threading.Thread(target=_end_with_input, daemon=True).start()
  with Connection(int(sys.argv[1])) as connection, contextlib.suppress(EOFError, ConnectionError):
    while True:
      connection.send_bytes(pickle.dumps(_result(connection.recv_bytes())))


def _result(task: bytes) -> tuple[int, Exception | None]:
  try:
    return pickle.loads(task)(), None
  except Exception as e:
    e.add_note(traceback.format_exc())  # an exception is sent without its traceback
    return 0, e


def _end_with_input() -> None:
  os.read(sys.stdin.fileno(), 1)  # the stream would be locked when the interpreter ends
  os._exit(1)


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


if __name__ == '__main__':
  main()
