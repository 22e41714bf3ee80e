"""The front's side of the worker: starts it, sends it batches, replaces it when it dies or takes too long."""

import asyncio
import contextlib
import multiprocessing
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from uni_moe_jax.serve import worker as worker_lib
from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.worker import Facts, Item
from uni_moe_jax.utils.errors import RunError

_MAX_BACKOFF = 30.0  # seconds between two starts
_MAX_EARLY_RESTARTS = 3  # before a worker has been warm; requests may have ended that many


class Supervisor:
  """One worker process at a time.

  Attributes:
    facts: of the model, after `start`.
    failure: raises RunError as soon as a program cannot be compiled, or a worker dies before any has compiled all.
    sizes: (task, program) → the largest batch size that is compiled; those that are missing are not compiled yet.
    on_warm: called when `sizes` changes.
    restarts: of the worker.
  """

  def __init__(self, folder: str, limits: Limits, cache: str, main: Callable[..., None] = worker_lib.main):
    """main: of the worker; it gets its end of the pipe, then the other arguments."""
    self._main, self._folder, self._limits, self._cache = main, folder, limits, cache
    self._context = multiprocessing.get_context('spawn')  # a fork would inherit the front's threads and sockets
    self._sender = ThreadPoolExecutor(1, 'sender')  # a pipe may block
    self._process = self._connection = self._receiver = self._restarting = None
    self._jobs: dict[int, tuple[asyncio.Future, Callable | None]] = {}
    self._next, self._idle, self._closing, self._backoff = 0, asyncio.Event(), False, 1.0
    self._warm = self._once_warm = False
    self.facts: Facts | None = None
    self.failure, self.on_warm = asyncio.get_running_loop().create_future(), lambda: None
    self.sizes: dict[tuple[str, str], int] = {}
    self.restarts = 0

  @property
  def ready(self) -> bool:
    """Whether a worker is alive that has compiled every program."""
    return self._warm and (self._idle.is_set() or bool(self._jobs))

  async def start(self) -> None:
    """Starts the worker and waits until it has loaded the model, which it then compiles.

    Raises:
      RunError: it cannot load the model.
      OSError: the machine has no process for it.
    """
    loop, loaded = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
    self._warm = False
    connection, theirs = self._context.Pipe()
    process = self._context.Process(
        target=self._main, args=(theirs, self._folder, self._limits, self._cache), daemon=True)
    started = loop.run_in_executor(None, process.start)
    try:
      await asyncio.shield(started)
    except asyncio.CancelledError:
      await started  # a thread cannot be stopped, and nobody else would end what it starts
      process.kill()
      connection.close()
      raise
    finally:
      theirs.close()
    self._process, self._connection = process, connection
    self._receiver = threading.Thread(
        target=self._receive, args=(loop, self._process, self._connection, loaded), daemon=True)
    self._receiver.start()
    await loaded

  async def run(
      self, task: str, program: str, items: list[Item],
      on_part: Callable[[dict[int, str]], None] | None = None) -> list[Any]:
    """Returns the output of every item, or the reason why it is refused; one call at a time.

    on_part: called with the texts so far of the items that are answered, by their indices.

    Raises:
      Refused: the worker died, or took too long and was killed.
    """
    while not self._idle.is_set():  # a worker that was loaded may have died before this task woke
      await self._idle.wait()
    self._idle.clear()
    job, future = self._next, asyncio.get_running_loop().create_future()
    self._next += 1
    self._jobs[job] = future, on_part
    process, connection = self._process, self._connection
    try:
      async with asyncio.timeout(self._limits.timeout):
        with contextlib.suppress(OSError):  # then it has died, which `_receive` reports
          await asyncio.get_running_loop().run_in_executor(self._sender, connection.send, (job, task, program, items))
        return await future
    except TimeoutError:
      self.sizes = {}  # before another batch is taken
      process.kill()
      raise Refused(503, f'The model took longer than {self._limits.timeout:g} s for this input and was stopped; send '
                         'a smaller one, or raise --timeout.') from None
    finally:
      self._jobs.pop(job, None)

  async def close(self) -> None:
    """Ends the worker."""
    self._closing = True
    if self._restarting:
      self._restarting.cancel()
      await asyncio.wait([self._restarting])
    self._idle.clear()
    if self._receiver:
      self._process.kill()
      await asyncio.get_running_loop().run_in_executor(None, self._receiver.join)
      self._connection.close()
    self._sender.shutdown(wait=False)

  def _receive(
      self, loop: asyncio.AbstractEventLoop, process: Any, connection: Any, loaded: asyncio.Future) -> None:
    """Passes messages of one worker to the event loop, in a thread."""
    with contextlib.suppress(RuntimeError):  # the loop has ended
      try:
        while True:
          loop.call_soon_threadsafe(self._handle, connection.recv(), loaded)
      except (EOFError, OSError):
        process.join()
        loop.call_soon_threadsafe(self._handle_end, loaded)

  def _handle(self, message: tuple, loaded: asyncio.Future) -> None:
    what, *rest = message
    if what == 'failed':
      self._fail(RunError(rest[0]), self.failure if loaded.done() else loaded)
    elif what == 'loaded':
      if not loaded.done():  # else the service ends
        self.facts = rest[0]
        self._idle.set()
        loaded.set_result(None)
    elif what == 'ready':
      self._backoff, self._warm, self._once_warm = 1.0, True, True
    elif what == 'warm':
      task, program, size = rest
      self.sizes[task, program] = size
      self.on_warm()
    elif rest[0] in self._jobs:
      future, on_part = self._jobs[rest[0]]
      if what == 'part':
        if on_part:
          on_part(rest[1])
      else:
        self._idle.set()
        if not future.done():
          future.set_result(rest[1])

  def _handle_end(self, loaded: asyncio.Future) -> None:
    """The worker has died: fails its jobs and starts another, or ends the service if none has been warm."""
    idle, self.sizes = self._idle.is_set(), {}
    self._idle.clear()
    for future, _ in self._jobs.values():
      if not future.done():
        future.set_exception(Refused(503, 'The worker stopped while computing this answer; send the request again.'))
    error = RunError(f'the worker ended with exit code {self._process.exitcode} before it was ready.')
    if not loaded.done():
      loaded.set_exception(error)
    elif loaded.cancelled() or loaded.exception() or self._closing:
      return
    elif not self._once_warm and (idle or self.restarts >= _MAX_EARLY_RESTARTS):  # else a request may have ended it
      self._fail(error, self.failure)
    else:
      self._restarting = asyncio.get_running_loop().create_task(self._restart())

  async def _restart(self) -> None:
    while not self._closing:
      if not self._warm:
        await asyncio.sleep(self._backoff)
        self._backoff = min(2 * self._backoff, _MAX_BACKOFF)
      self.restarts += 1
      print('The worker stopped; starting another.', file=sys.stderr, flush=True)
      self._process.kill()
      try:  # the sender may still write to the old one
        await asyncio.get_running_loop().run_in_executor(self._sender, self._connection.close)
        return await self.start()
      except (RunError, OSError) as e:  # such as of a machine without memory for a process
        if not self._once_warm:
          return self._fail(RunError(str(e)), self.failure)
        print(f'error: {e}', file=sys.stderr, flush=True)

  @staticmethod
  def _fail(error: RunError, future: asyncio.Future) -> None:
    if not future.done():
      future.set_exception(error)
