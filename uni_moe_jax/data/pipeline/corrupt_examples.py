"""Examples that cannot be used: counted and replaced, until there are too many."""

import threading

from uni_moe_jax.utils.errors import RunError

_SURE = 10  # bad examples: of fewer, a share says little


class Faults:
  """Counts the bad examples of one task; written by the threads of the input pipeline, read by the loop."""

  def __init__(self, field: str, max_fraction: float):
    """field: the config's name of the task. max_fraction: more bad ones among those read are an error; 0: any."""
    self._field, self._max = field, max_fraction
    self._lock = threading.Lock()
    self.read = self.bad = 0
    self._first, self._stuck = '', False
    self._failure: RunError | None = None

  def count(self, read: int, bad: list[str]) -> None:
    """read: examples looked at. bad: where those that cannot be used are, and why."""
    with self._lock:
      self.read += read
      self.bad += len(bad)
      self._first = self._first or (bad[0] if bad else '')

  def give_up(self) -> None:
    """Nothing could take the place of a bad example."""
    self._stuck = True

  def stop(self, failure: RunError) -> None:
    """No example can be read any more; the loop raises the failure."""
    self._failure = failure

  @property
  def stopped(self) -> bool:
    return self._failure is not None

  def check(self) -> None:
    """Raises RunError, with the first bad example, once there are too many; and what `stop` was told."""
    if self._failure:
      raise self._failure
    with self._lock:
      many = self.bad > self._max * self.read and (self.bad >= _SURE or not self._max)
      if many or self._stuck:
        raise RunError(
            f'config.{self._field}: {self.bad} of {self.read} examples could not be used, more than '
            f'config.data.max_corrupt_fraction={self._max}; the first: {self._first}. Prepare the source again, or leave those examples '
            'out.')
