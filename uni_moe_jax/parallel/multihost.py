"""What the processes of a run must agree on, so that none takes a step that another does not take; and how they end together."""

import atexit
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uni_moe_jax.parallel import sharding
from uni_moe_jax.utils.errors import RunError, UsageError
from uni_moe_jax.utils.exit_codes import ERROR

# What JAX, its collectives and its coordination service say where a process that they talk to is not there any more.
_LOST = re.compile(
    r'\bGloo\b|\bNCCL\b|UNAVAILABLE|DEADLINE_EXCEEDED|[Hh]eartbeat|[Cc]oordination service|[Bb]arrier|Connection (reset|closed)')


class AnyProcess:
  """Whether a flag is up in any process, told to all at the same call; without waiting for the step that runs.

  With several processes the answer is that to the call before: by then its sum, which queues behind a step, is there.
  """

  def __init__(self, mesh: Mesh):
    self._split = NamedSharding(mesh, PartitionSpec(sharding.AXES))
    self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))
    self._devices, self._here = mesh.size, len(mesh.local_devices)
    self._several = len({d.process_index for d in mesh.devices.flat}) > 1
    self._asked = None

  def __call__(self, flag: bool) -> bool:
    """To be called by every process, as often as by the others."""
    if not self._several:
      return flag
    flags = jax.make_array_from_process_local_data(self._split, np.full(self._here, flag), (self._devices,))
    before, self._asked = self._asked, self._any(flags)
    return before is not None and bool(before)


def broadcast_from_primary(flag: bool) -> bool:
  """What the first process says, told to all."""
  return flag if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def total(number: int) -> int:
  """The sum over all processes, which must ask together."""
  return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).sum())


@contextlib.contextmanager
def ends_with_the_others(end: Callable[[int], None] = os._exit) -> Iterator[None]:
  """Ends the process, with one sentence, where an error says that another process of the run cannot be reached.

  It ends at once: who waits for saves and for JAX's farewell to the others waits for the dead one, too. So, once its error is told,
  does a process that fails by itself: the others wait for it elsewhere. All processes detect a `UsageError` together.

  Args:
    end: is called with the exit code.
  """
  try:
    yield
  except Exception as e:
    if jax.process_count() == 1:
      raise
    if isinstance(e, RunError) or not (said := _LOST.search(_chain(e))):
      if not isinstance(e, UsageError):
        atexit.register(_leave, end)  # before JAX's farewell: the last that was registered is the first that is called
      raise
    line = next(line for line in _chain(e).splitlines() if said.group() in line)
    print(f'error: another process of this run has died or cannot be reached ({line.strip()[:200]}). Its own log says why; the '
          'same command, given to all, continues from the newest checkpoint.', file=sys.stderr, flush=True)
    sys.stdout.flush()
    end(ERROR)


def _leave(end: Callable[[int], None]) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  end(ERROR)


def _chain(e: BaseException | None) -> str:
  """What an exception says, and those that it came from."""
  said = []
  while e is not None:
    said.append(str(e))
    e = e.__cause__ or e.__context__
  return '\n'.join(said)


def check_same_data(inputs: str) -> None:
  """Raises UsageError, in every process, where one reads other data or has another tokenizer. inputs: `Data.inputs`."""
  if jax.process_count() == 1:
    return
  prints = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(inputs), np.uint8))
  others = [str(i) for i, p in enumerate(prints) if (p != prints[0]).any()]
  if others:
    raise UsageError(f'process {", ".join(others)} of {len(prints)} reads other data than process 0, or has another tokenizer or '
                     'file of class names: make config.data.dir the same prepared data for all, or build it anew there '
                     '(launch/prepare_data.py).')
