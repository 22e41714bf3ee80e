"""Counts examples that cannot be read and were replaced; raises when there are too many of them."""

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.shards.record_format import CorruptExample
from uni_moe_jax.utils.errors import RunError

_MIN_CORRUPT = 10  # the fraction of fewer corrupt examples is not yet meaningful


class CorruptExampleCounter:
  """Counts corrupt examples of one task; input pipeline threads write it, the training loop reads it."""

  def __init__(self, field: str, max_fraction: float):
    """field: Config name of the task. max_fraction: Largest allowed fraction of the examples read; 0 allows none."""
    self._field, self._max_fraction = field, max_fraction
    self._lock = threading.Lock()
    self._first = ''
    self.num_read = self.num_corrupt = 0
    self.has_no_replacement = False  # for a corrupt example
    self.failure: RunError | None = None  # why no example can be read any more

  def count(self, num_read: int, corrupt: list[str]) -> None:
    """Adds examples that were read, and for each corrupt one its location and the reason."""
    with self._lock:
      self.num_read += num_read
      self.num_corrupt += len(corrupt)
      self._first = self._first or (corrupt[0] if corrupt else '')

  def check(self) -> None:
    """Raises `failure`, or RunError with the first corrupt example if none is allowed or one has no replacement."""
    if self.failure:
      raise self.failure
    if self.has_no_replacement or self.num_corrupt and not self._max_fraction:
      self._raise(self.num_corrupt, self.num_read)

  def check_sums(self, num_corrupt: int, num_read: int) -> None:
    """Raises RunError, with the first corrupt example of this process, if there are too many in all processes.

    The few that one process of many has read exceed the fraction by chance.
    """
    if num_corrupt >= _MIN_CORRUPT and num_corrupt > self._max_fraction * num_read:
      self._raise(num_corrupt, num_read)

  def _raise(self, num_corrupt: int, num_read: int) -> NoReturn:
    first = f'the first: {self._first}' if self._first else 'other processes name them'
    raise RunError(
        f'config.{self._field}: {num_corrupt} of {num_read} examples could not be used, more than '
        f'config.data.max_corrupt_fraction={self._max_fraction}; {first}. Prepare the source again, or leave those '
        'examples out.')


def read_or_stop(
    records: FileDataset, ids: np.ndarray, counter: CorruptExampleCounter,
    read: Callable[[np.ndarray], list[Any]] | None = None) -> list[Any | CorruptExample]:
  """Reads records by id. If the source is unreachable, all are corrupt, and the training loop raises.

  read: see `FileDataset.read_valid`.
  """
  if not counter.failure:
    try:
      return records.read_valid(ids, read)
    except RunError as e:  # raised in a thread of TensorFlow it would arrive with an unrelated traceback
      counter.failure = e
  return [CorruptExample('source unreachable')] * len(ids)
