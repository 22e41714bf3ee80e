"""Handlers of signals, installed for a while, and the signal that a child gets when its parent dies."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from uni_moe_jax.utils.exit_codes import PREEMPTED

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_PRCTL = getattr(ctypes.CDLL(None), 'prctl', None) if sys.platform == 'linux' else None


@contextlib.contextmanager
def handled(handler: Callable, *numbers: signal.Signals) -> Iterator[None]:
  """Handle these signals by `handler(number, frame)` while the body runs."""
  old = {number: signal.signal(number, handler) for number in numbers}
  try:
    yield
  finally:
    for number, previous in old.items():
      signal.signal(number, previous)


def start(command: Sequence[Any], number: signal.Signals = signal.SIGTERM, **options: Any) -> subprocess.Popen:
  """Start a child in a session of its own, which gets a signal when this process dies. options: of `Popen`.

  A terminal's Ctrl-C reaches this process only, see `wait`.
  """
  with warnings.catch_warnings():
    # Of JAX, since `preexec_fn` forks; the child makes one system call and becomes another program.
    warnings.filterwarnings('ignore', r'os\.fork\(\) was called', RuntimeWarning)
    return subprocess.Popen(command, start_new_session=True, **options,
                            preexec_fn=functools.partial(end_with_parent, os.getpid(), number))


def wait(child: subprocess.Popen) -> int:
  """Wait for a child, and pass SIGINT and SIGTERM on to it; return its exit code, 75 if one of them ended it.

  Without a session of its own, see `start`, Ctrl-C would reach the child twice. Call this from the main thread.
  """
  received = []
  pass_on = lambda number, _: (received.append(number), child.send_signal(number))
  with handled(pass_on, signal.SIGINT, signal.SIGTERM):
    code = child.wait()
  return PREEMPTED if received and code <= 0 else code


def end_with_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
  """Let this process get a signal when the one that has started it, of this number, dies, even by SIGKILL. Linux only.

  The function for `preexec_fn`, too: a process that was forked makes one system call here.
  """
  if _PRCTL is not None:
    _PRCTL(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it has died already
      os._exit(PREEMPTED)
