"""Makes the next batch, and brings it to the devices, while the step of the last one runs."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T, U = TypeVar('T'), TypeVar('U')


class Lookahead(Generic[T, U]):
  """Applies a function to items of an iterator, one ahead, in a thread, which `close` ends."""

  def __init__(self, items: Iterator[T], function: Callable[[T], U]):
    """Starts with the first item at once."""
    self._items, self._function = items, function
    self._pool = concurrent.futures.ThreadPoolExecutor(1, 'lookahead')
    self._next = self._pool.submit(self._make)

  def close(self) -> None:
    """Waits for what is being made, and closes the iterator, which may have threads of its own."""
    self._pool.shutdown()
    if hasattr(self._items, 'close'):
      self._items.close()

  @property
  def is_ready(self) -> bool:
    """Whether `take` returns at once."""
    return self._next.done()

  def take(self) -> U | None:
    """The next result; None after the last one. Raises what the iterator or the function raised for it."""
    result = self._next.result()
    self._next = self._pool.submit(self._make)
    return result

  def _make(self) -> U | None:
    for item in self._items:
      return self._function(item)
    return None
