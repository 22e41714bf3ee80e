"""Agreement between the processes of a run, so that all take the same steps and end together."""

import atexit
import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uni_moe_jax.io import storage
from uni_moe_jax.parallel import sharding
from uni_moe_jax.utils.errors import RunError, UsageError, chain
from uni_moe_jax.utils.exit_codes import ERROR

# Messages of JAX, its collectives and its coordination service about a process that does not answer. NCCL's may also be
# about this one: its memory, devices or drivers.
_PEER_LOST = re.compile(
    r'.*(\bGloo\b|UNAVAILABLE|DEADLINE_EXCEEDED|[Hh]eartbeat|[Cc]oordination service|[Bb]arrier'
    r'|Connection (reset|closed)'
    r'|\bNCCL\b.*(remote process exited|network error|[Cc]onnection|[Tt]imed ?out|[Tt]imeout|[Aa]bort)).*')


class AnyProcess:
  """Whether a flag is set in any process, with the same answer in all of them, which must call it equally often.

  It does not wait for the running step. With several processes the answer is that of the previous call: its sum, which
  queues behind a step, is ready by then.
  """

  def __init__(self, mesh: Mesh):
    self._split = NamedSharding(mesh, PartitionSpec(sharding.AXES))
    self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))
    self._devices, self._local_devices = mesh.size, len(mesh.local_devices)
    self._several = len({d.process_index for d in mesh.devices.flat}) > 1
    self._pending = None

  def __call__(self, flag: bool) -> bool:
    if not self._several:
      return flag
    flags = jax.make_array_from_process_local_data(self._split, np.full(self._local_devices, flag), (self._devices,))
    previous, self._pending = self._pending, self._any(flags)
    return previous is not None and bool(previous)


def broadcast_from_primary(number: int) -> int:
  """The primary process's number or flag, in all processes."""
  return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def broadcast_bytes_from_primary(content: bytes) -> bytes:
  """The primary process's bytes, in all processes, which give as many."""
  return bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(content, np.uint8)))


def gather_bytes(content: bytes) -> list[bytes]:
  """The bytes of every process, in order; all give as many."""
  return [bytes(row) for row in multihost_utils.process_allgather(np.frombuffer(content, np.uint8))]


def gather_texts(text: str) -> list[str]:
  """The texts of every process, in order; they may differ in length."""
  content = text.encode()
  lengths = [int.from_bytes(length) for length in gather_bytes(len(content).to_bytes(8))]
  rows = gather_bytes(content.ljust(max(lengths)))
  return [row[:length].decode() for row, length in zip(rows, lengths, strict=True)]


def sums_over_processes(numbers: Sequence[int]) -> list[int]:
  """The sums of numbers of 64 bits over all processes, which must call this together, with as many."""
  own = np.array(numbers, np.int64)
  parts = [own.tobytes()] if jax.process_count() == 1 else gather_bytes(own.tobytes())
  return np.sum([np.frombuffer(part, np.int64) for part in parts], axis=0).tolist()


@contextlib.contextmanager
def exit_with_peers(end: Callable[[int], None] = os._exit) -> Iterator[None]:
  """Ends this process at once if it, or another process of the run, fails. end: gets the exit code.

  JAX alone would end the processes, too, but late: one that fails waits up to 300 s at JAX's shutdown barrier, and one
  whose peer died waits there, or up to 100 s for heartbeats, and then aborts. A lost peer is reported in one sentence.
  A UsageError passes: the command reports it and ends this process, see `distributed.initialize`.
  """
  try:
    yield
  except Exception as e:
    if jax.process_count() == 1 or isinstance(e, UsageError):
      raise
    # A store that does not answer is reported in the same words; the command explains it.
    is_other = isinstance(e, RunError) or storage.explain(e, '') is not None
    lost = None if is_other else next(filter(None, map(_PEER_LOST.search, map(str, chain(e)))), None)
    if lost is None:
      atexit.register(_exit, end)  # runs before JAX's own handler, which was registered earlier
      raise
    print(f'error: another process of this run has died or cannot be reached ({lost.group().strip()[:200]}). Its own '
          'log has the reason; the same command, started in every process, continues from the newest checkpoint.',
          file=sys.stderr, flush=True)
    _exit(end)


def _exit(end: Callable[[int], None]) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  end(ERROR)


def check_same_data(*fingerprints: Any) -> None:
  """Raises UsageError in every process if one has other data or tokenizer files.

  fingerprints: `Data.inputs_fingerprint`, and those of what the evaluators read.
  """
  _check_same(fingerprints, 'reads other data than process 0, or has another tokenizer or file of class names. Give '
              'all of them the same config.data.dir, or prepare the data there again (uni-moe prepare-data).')


def check_same_init(init: str, fingerprint: str) -> None:
  """Raises UsageError in every process if one has another checkpoint of the run to start from; its digest is given."""
  _check_same(fingerprint, f'has another checkpoint in config.train.init={init!r} than process 0. Copy that run to all '
              'of them again, or give an address that they share.')


def _check_same(fingerprint: Any, error: str) -> None:
  if jax.process_count() == 1:
    return
  digests = gather_bytes(hashlib.sha256(repr(fingerprint).encode()).digest())
  if others := [str(i) for i, d in enumerate(digests) if d != digests[0]]:
    raise UsageError(f'process {", ".join(others)} of {len(digests)} {error}')
