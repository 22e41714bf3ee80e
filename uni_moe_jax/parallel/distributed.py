"""Many processes as one run: how they find each other, and which of them speaks.

The same command is started once per process. Process 0 prints and writes logs; all of them feed their share of every batch
and write their share of checkpoints. JAX must be told before it looks for devices, so that a command calls `start` before
anything that touches them.
"""

import dataclasses
import os
import re
import sys

from uni_moe_jax.utils.errors import UsageError

OFF, AUTO = 'off', 'auto'
HELP = (f"How this process finds the others of the run: '{OFF}' (there are none), '{AUTO}' (Slurm, Open MPI, GKE or a TPU VM "
        'says), or HOST:PORT,PROCESSES,PROCESS, where HOST:PORT is a free port of process 0.')
_PLACE = re.compile(r'(?P<address>[\w.\-\[\]:]+:\d+),(?P<count>\d+),(?P<index>\d+)')


@dataclasses.dataclass(frozen=True)
class Place:
  """One process among those of a run: the coordinator's HOST:PORT, how many there are, which one this is."""
  address: str
  count: int
  index: int


def parse(value: str) -> Place | str:
  """What --distributed says: 'off', 'auto', or a place.

  Raises:
    UsageError: it says none of these.
  """
  if value in (OFF, AUTO):
    return value
  found = _PLACE.fullmatch(value)
  if not found:
    raise UsageError(f"--distributed={value!r} must be '{OFF}', '{AUTO}', or HOST:PORT,PROCESSES,PROCESS, for example "
                     '127.0.0.1:7733,2,0 for the first of two.')
  place = Place(found['address'], int(found['count']), int(found['index']))
  if place.index >= place.count:
    raise UsageError(f'--distributed={value!r}: there is no process {place.index} of {place.count}; they are counted from 0.')
  return place


def start(value: str) -> bool:
  """Joins the other processes, waits for all of them, and silences this one unless it is the first.

  Args:
    value: as `parse` takes it. With 'auto' JAX finds out who takes part; that nobody says so is an error, because processes
      that train apart would write into one work directory.

  Returns:
    Whether this process speaks. The others' standard output goes nowhere; their errors are heard.

  Raises:
    UsageError: see `parse`, or 'auto' finds no cluster.
  """
  place = parse(value)
  if place == OFF:
    return True
  import jax  # pylint: disable=g-import-not-at-top
  if place == AUTO:
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise UsageError(f"--distributed='{AUTO}': nothing says here who takes part ({error}); start it with srun, mpirun, "
                       'on GKE or on a TPU VM, or give HOST:PORT,PROCESSES,PROCESS.') from error
  else:
    jax.distributed.initialize(place.address, place.count, place.index, cluster_detection_method='deactivate')
  if not is_primary():
    sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # pylint: disable=consider-using-with
  return is_primary()


def is_primary() -> bool:
  """Whether this process is the first: the one that prints, and writes what there is only one of."""
  import jax  # pylint: disable=g-import-not-at-top
  return jax.process_index() == 0
