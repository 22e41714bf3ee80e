"""Several processes as one run: how they find each other, and which one is primary.

The same command is started once per process. The primary process, number 0, prints and writes logs; each process reads
its share of every batch and writes its share of every checkpoint. JAX must be initialized before anything looks for
devices.
"""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.utils.errors import UsageError

OFF, AUTO = 'off', 'auto'
_GRACE = 5.0  # seconds in which other processes that fail the same way have ended
_ADDRESS = re.compile(r'[\w.\-\[\]:]+:\d+')
flags.disclaim_key_flags()  # --help of a script lists the flags that it defines through this module


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The processes of a run, as seen by one of them; all None: JAX detects them."""
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def define_flags() -> Callable[[], Cluster | None]:
  """Defines the flags of a command that several processes run; returns a function that parses them."""
  mode = flags.DEFINE_enum(
      'distributed', OFF, [OFF, AUTO],
      'auto: Slurm, Open MPI, GKE or a TPU VM describes the processes of the run. off: one process, or several that '
      '--coordinator_address, --num_processes and --process_id describe.')
  address = flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0, with a free port there.')
  count = flags.DEFINE_integer('num_processes', None, 'Number of processes of the run.')
  index = flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')
  return lambda: parse(mode.value, address.value, count.value, index.value)


def parse(mode: str, address: str | None, num_processes: int | None, process_id: int | None) -> Cluster | None:
  """The cluster that the flags describe; None for a single process. Raises UsageError for flags that do not fit."""
  values = {'coordinator_address': address, 'num_processes': num_processes, 'process_id': process_id}
  given = [name for name, value in values.items() if value is not None]
  if not given:
    return Cluster() if mode == AUTO else None
  if mode == AUTO:
    raise UsageError(f"--distributed={AUTO} detects the other processes; leave out --{', --'.join(given)}.")
  if address is None or num_processes is None or process_id is None:
    missing = [name for name in values if name not in given]
    raise UsageError(f"--{', --'.join(given)} also {'needs' if len(given) == 1 else 'need'} --{', --'.join(missing)}.")
  if not _ADDRESS.fullmatch(address):
    raise UsageError(f'--coordinator_address={address!r} must be HOST:PORT, for example 127.0.0.1:7733.')
  if not 0 <= process_id < num_processes:
    raise UsageError(f'--process_id={process_id} must be in [0, {num_processes}), for --num_processes={num_processes}.')
  return Cluster(address, num_processes, process_id)


def initialize(cluster: Cluster | None) -> bool:
  """Joins the other processes of the run. Returns whether this one is primary; the others get no standard output.

  A process whose command fails from here on ends at once, see `_leave`.

  Raises:
    UsageError: no cluster is detected. Going on alone would let several processes write into one work directory.
  """
  if cluster is None:
    return True
  import jax  # pylint: disable=g-import-not-at-top
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM from Python, and nothing uses it
  if cluster == Cluster():
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise UsageError(
          f'--distributed={AUTO}: no cluster is detected ({error}). Start the command with srun, mpirun, on GKE or on '
          'a TPU VM, or give --coordinator_address, --num_processes and --process_id.') from error
  else:
    jax.distributed.initialize(**dataclasses.asdict(cluster), cluster_detection_method='deactivate')
  cli.at_failure(_leave)
  if not is_primary():
    sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # pylint: disable=consider-using-with
  return is_primary()


def _leave(code: int) -> None:
  """Ends this process, which has failed and said why, without JAX's shutdown barrier.

  A process that fails alone, for want of a folder for example, would wait there up to 300 s for the others, and they
  for it. Without it they end at their next collective, see `multihost.exit_with_peers`. Where all fail, JAX would
  abort those that still run when its coordination service ends, which is in the primary process: that one is the last.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  import jax  # pylint: disable=g-import-not-at-top
  if is_primary() and jax.process_count() > 1:
    time.sleep(_GRACE)
  os._exit(code)


def is_primary() -> bool:
  """Whether this is process 0, which prints, and writes files of which there is only one."""
  import jax  # pylint: disable=g-import-not-at-top
  return jax.process_index() == 0
