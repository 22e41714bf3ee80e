"""Handlers of signals, installed for a while, and the signal that a child gets when its parent dies."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

from uni_moe_jax.utils.exit_codes import PREEMPTED

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@contextlib.contextmanager
def handled(handler: Callable, *numbers: signal.Signals) -> Iterator[None]:
  """Handle these signals by `handler(number, frame)` while the body runs."""
  old = {number: signal.signal(number, handler) for number in numbers}
  try:
    yield
  finally:
    for number, previous in old.items():
      signal.signal(number, previous)


def wait(child: subprocess.Popen) -> int:
  """Wait for a child, and pass SIGINT and SIGTERM on to it; return its exit code, 75 if one of them ended it.

  The child needs a session of its own: a terminal's Ctrl-C would reach it twice. Call it from the main thread.
  """
  received = []
  pass_on = lambda number, _: (received.append(number), child.send_signal(number))
  with handled(pass_on, signal.SIGINT, signal.SIGTERM):
    code = child.wait()
  return PREEMPTED if received and code <= 0 else code


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
  """Return the `preexec_fn` of a child that gets a signal when this process dies, even by SIGKILL. Linux only."""
  prctl, parent = getattr(ctypes.CDLL(None), 'prctl', None) if sys.platform == 'linux' else None, os.getpid()

  def set_signal() -> None:
    if prctl is not None:
      prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
      if os.getppid() != parent:  # it has died already
        os._exit(PREEMPTED)

  return set_signal
