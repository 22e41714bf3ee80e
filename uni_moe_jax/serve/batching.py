"""Batches across requests: those of one program that arrive within milliseconds are answered by one call."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.supervisor import Supervisor
from uni_moe_jax.serve.worker import Item, batch_sizes, programs_of

_MAX_BATCH_BYTES = 2**25  # of media, so that the pipe is never full for long


@dataclasses.dataclass
class _Waiting:
  item: Item
  future: asyncio.Future
  on_part: Callable[[str], None] | None
  since: float


class Batcher:
  """Queues by (task, program). One batch runs at a time; meanwhile others fill up.

  on_batch: called with (program, number of requests) of every batch.
  """

  def __init__(self, supervisor: Supervisor, limits: Limits, on_batch: Callable[[str, int], None] = lambda *_: None):
    self._supervisor, self._limits, self._on_batch = supervisor, limits, on_batch
    self._programs = programs_of(supervisor.facts.manifest)
    supervisor.on_warm = lambda: self._arrived.set()
    self._queues: dict[tuple[str, str], collections.deque[_Waiting]] = collections.defaultdict(collections.deque)
    self._served: dict[tuple[str, str], float] = {}
    self._arrived, self._task = asyncio.Event(), asyncio.get_running_loop().create_task(self._run())

  @property
  def waiting(self) -> int:
    """Requests in all queues."""
    return sum(map(len, self._queues.values()))

  async def submit(self, task: str, program: str, item: Item, on_part: Callable[[str], None] | None = None) -> Any:
    """Returns the output of an item. Raises Refused, also if it is not there in time."""
    future = asyncio.get_running_loop().create_future()
    self._queues[self._programs[task, program]].append(_Waiting(item, future, on_part, time.monotonic()))
    self._arrived.set()
    try:
      async with asyncio.timeout(self._limits.timeout):
        output = await future
    except TimeoutError:
      raise Refused(503, f'No answer within {self._limits.timeout:g} s: other requests are ahead or the worker is '
                         'starting; send the request again later, or raise --timeout.') from None
    if isinstance(output, Refused):
      raise output
    return output

  async def close(self) -> None:
    """Stops. What waits stays unanswered."""
    self._task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await self._task

  async def _run(self) -> None:
    while True:
      for queue in self._queues.values():  # requests that gave up
        while queue and queue[0].future.done():
          queue.popleft()
      if not (due := self._due()):
        self._arrived.clear()
        await self._arrived.wait()
        continue
      key, delay = due
      if delay > 0:
        self._arrived.clear()
        with contextlib.suppress(TimeoutError):
          async with asyncio.timeout(delay):
            await self._arrived.wait()
        continue
      batch = self._take(key)
      if batch:
        await self._answer(key, batch)

  def _due(self) -> tuple[tuple[str, str], float] | None:
    """(queue, seconds until it leaves) of the next batch; of several that are due the one that was served longest ago.

    A queue is due when it fills a batch, or when its first request has waited long enough; one whose program is not
    compiled yet has to wait.
    """
    now, delays = time.monotonic(), {}
    for key, queue in self._queues.items():
      if queue and key in self._supervisor.sizes:
        full = len(queue) >= self._size(key)
        delays[key] = 0.0 if full else max(0.0, queue[0].since + self._limits.batch_wait_ms / 1000 - now)
    if not delays:
      return None
    key = min(delays, key=lambda key: (delays[key], self._served.get(key, 0.0)))
    return key, delays[key]

  def _size(self, key: tuple[str, str]) -> int:
    return min(self._supervisor.sizes[key], batch_sizes(self._limits.max_batch)[-1])

  def _take(self, key: tuple[str, str]) -> list[_Waiting]:
    queue, batch, size = self._queues[key], [], 0
    # What was computed when a worker ended is computed alone, so that it ends no others with it.
    joins = lambda item: size + item.size <= _MAX_BATCH_BYTES and not item.ended and not batch[0].item.ended
    while queue and len(batch) < self._size(key) and (not batch or joins(queue[0].item)):
      waiting = queue.popleft()
      if not waiting.future.done():
        batch.append(waiting)
        size += waiting.item.size
    return batch

  async def _answer(self, key: tuple[str, str], batch: list[_Waiting]) -> None:
    def on_part(texts: dict[int, str]) -> None:
      for i, text in texts.items():
        if batch[i].on_part and not batch[i].future.done():
          batch[i].on_part(text)

    self._on_batch(key[1], len(batch))
    self._served[key] = time.monotonic()
    try:
      outputs = await self._supervisor.run(*key, [w.item for w in batch], on_part)
    except Refused as e:
      outputs = [e] * len(batch)
      for waiting in batch:
        waiting.item.ended += 1
    self._queues[key].extendleft(reversed([w for w, output in zip(batch, outputs) if output is None]))
    for waiting, output in zip(batch, outputs):
      if output is not None and not waiting.future.done():
        waiting.future.set_result(output)
