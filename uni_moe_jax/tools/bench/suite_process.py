"""Runs a suite in a process of its own, in which nothing that another suite left in memory slows it down.

This module imports nothing slow, so that the new process is prepared before it imports JAX.
"""

import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import Any

import ml_collections

from uni_moe_jax.tools.bench import settings
from uni_moe_jax.tools.bench.settings import Sizes
from uni_moe_jax.utils import signals
from uni_moe_jax.utils.errors import RunError, UsageError


def measure(
    name: str, sizes: Sizes, config: ml_collections.ConfigDict, dtype: str) -> tuple[dict[str, str], list[Any]]:
  """`suites.measure` in a new process, which ends with this one.

  Raises:
    UsageError: of the suite.
    RunError: the process ended without a result.
  """
  spawn = multiprocessing.get_context('spawn')
  receiver, sender = spawn.Pipe(duplex=False)
  # Not a daemon, which may not have processes of its own, as `gpu` has.
  process = spawn.Process(target=_send, args=(sender, name, sizes, config, dtype))
  process.start()
  sender.close()
  try:
    result = receiver.recv()
  except EOFError:
    process.join()
    raise RunError(f'the process of --suites={name} ended with code {process.exitcode}; its output is above.') from None
  finally:
    process.kill()
    process.join()
  if isinstance(result, UsageError):
    raise result
  return result


def _send(sender: Connection, name: str, *arguments: Any) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C, which ends the other process, and it this one
  settings.prepare_heap(name)
  signals.end_with_parent(multiprocessing.parent_process().pid, signal.SIGKILL)
  from uni_moe_jax.tools.bench import suites  # pylint: disable=g-import-not-at-top
  try:
    sender.send(suites.measure(name, *arguments))
  except UsageError as e:
    sender.send(e)
