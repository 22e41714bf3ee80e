"""Compiles the steps of a run in another process, while this one starts.

On CPU, a process that has compiled takes steps more slowly. Compiling leaves glibc's heap full of small free blocks.
`malloc` searches them, under the lock of the only arena (`utils/heap.py`), for each buffer that a matrix product needs.
A process that reads compiled programs from JAX's cache has no such heap. docs/results/performance.md has both times.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from uni_moe_jax.utils import heap, signals
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.exit_codes import FINISHED

_CACHE = 'JAX_COMPILATION_CACHE_DIR'
_POLL = 0.2  # seconds


class CompilerProcess:
  """A process that compiles into JAX's cache and ends; it is stopped when this process ends."""

  def __init__(self, command: Sequence[str]):
    # A session of its own: Ctrl-C reaches this process only, which then ends the other one.
    self._child = subprocess.Popen(
        command, start_new_session=True, preexec_fn=signals.terminate_with_parent())

  def wait(self, stops: Callable[[], bool]) -> None:
    """Wait until the programs are in the cache, or `stops()`, which ends the process; without it, this one compiles."""
    while True:
      try:
        code = self._child.wait(timeout=_POLL)
      except subprocess.TimeoutExpired:
        if not stops():
          continue
        self._child.terminate()
        self._child.wait()
        return
      if code != FINISHED:
        print(f'the process that compiles ended with exit code {code}; this one compiles instead', file=sys.stderr,
              flush=True)
      return

  def __enter__(self) -> 'CompilerProcess':
    return self

  def __exit__(self, *_) -> None:
    self._child.terminate()
    self._child.wait()


def start(command: Sequence[str]) -> CompilerProcess | None:
  """Start a command that compiles; None where JAX may find an accelerator, which only one process can open.

  Raises:
    UsageError: JAX has no cache, which is what the processes share.
  """
  if not heap.only_cpu():
    return None
  if not os.environ.get(_CACHE):
    raise UsageError(f'--compile_separately: set the environment variable {_CACHE} to a folder for compiled programs.')
  return CompilerProcess(command)
