"""Compiles the steps of a run in another process, while this one starts.

On CPU, a process that has compiled takes steps more slowly. Compiling leaves glibc's heap full of small free blocks.
`malloc` searches them, under the lock of the only arena (`utils/heap.py`), for each buffer that a matrix product needs.
A process that reads compiled programs from JAX's cache has no such heap. docs/results/performance.md has both times.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from uni_moe_jax.utils import heap, signals
from uni_moe_jax.utils.exit_codes import FINISHED, USAGE

_CACHE = 'JAX_COMPILATION_CACHE_DIR'
_POLL = 0.2  # seconds
_SHOWN = 2000  # last characters of what a process that fails has printed


class CompilerProcess:
  """A process that compiles into JAX's cache and ends; it ends with this one, too.

  Create it before JAX is imported, which reads there where its cache is; without one, programs are kept until the end.
  """

  def __init__(self, command: Sequence[str]):
    self._errors = tempfile.TemporaryFile('w+', errors='replace')
    self._folder = None if os.environ.get(_CACHE) else tempfile.TemporaryDirectory()
    if self._folder:
      os.environ[_CACHE] = self._folder.name
    # SIGKILL, because Python handles no signal while XLA works.
    self._child = signals.start(command, signal.SIGKILL, stderr=self._errors)

  def wait(self, stops: Callable[[], bool]) -> None:
    """Wait until the process has ended, or end it as soon as `stops()`. If it fails, the caller compiles."""
    while True:
      try:
        code = self._child.wait(timeout=_POLL)
      except subprocess.TimeoutExpired:
        if not stops():
          continue
        self._end()
        return
      if code != FINISHED and not stops():
        self._report(code)
      return

  def _report(self, code: int) -> None:
    """Print how the process failed. A mistake of the user is this process's, too, which reports it."""
    self._errors.seek(0)
    printed = '' if code == USAGE else self._errors.read()[-_SHOWN:]
    print(f'{printed}the process that compiles ended with exit code {code}; this one compiles instead',
          file=sys.stderr, flush=True)

  def _end(self) -> None:
    self._child.kill()
    self._child.wait()

  def __enter__(self) -> 'CompilerProcess':
    return self

  def __exit__(self, *_) -> None:
    self._end()
    self._errors.close()
    if self._folder:
      del os.environ[_CACHE]
      self._folder.cleanup()


def start(command: Sequence[str]) -> CompilerProcess | None:
  """Start a command that compiles; None where JAX may find an accelerator, which only one process can open."""
  if heap.only_cpu():
    return CompilerProcess(command)
  print('note: --compile_separately is ignored: it is for CPUs, and JAX may find an accelerator here (by JAX_PLATFORMS '
        'or an installed jax_plugins or libtpu). If there is none, set JAX_PLATFORMS=cpu; steps are faster with it.',
        file=sys.stderr, flush=True)
  return None
