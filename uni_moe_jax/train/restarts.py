"""Starts a command again until it has finished: soon after a preemption, later and later after crashes, with a limit."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from uni_moe_jax.train.workdir import saved_step
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED, USAGE

LONGEST_WAIT = 600.0  # seconds
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_ENDED_BY_IT = 128 + signal.SIGTERM  # it was asked to stop before it could save


def keep_running(command: Sequence[str], limit: int, wait: float) -> int:
  """Runs a command until it has finished, cannot, or has been started again too often for nothing.

  Args:
    command: program and arguments; its --workdir says where its checkpoints lie; without one every start counts as vain.
    limit: starts in a row that brought no newer checkpoint, after which it is given up.
    wait: seconds before it is started again: once this after a preemption or where there is a newer checkpoint, else doubled
      with every start in a row that brought none.

  Returns:
    The exit code: that of the command; 75 where a signal to this process ended it; 128 + number where a signal to the command did.
  """
  workdir, vain = _workdir(command), 0
  worked = _saved(workdir) is not None  # whether a start has ever got past the checks of its command
  with _Child() as child:
    while True:
      began, before = time.monotonic(), _saved(workdir)
      code = child.run(command)
      after = _saved(workdir)
      newer = after is not None and (before is None or after > before)
      said = f'{_ending(code)} after {time.monotonic() - began:.0f} s, {_progress(workdir, after, newer)}'
      code = code if code >= 0 else 128 - code
      if child.signalled:  # somebody wants the machine: the next start is theirs
        return FINISHED if code == FINISHED else PREEMPTED if code in (PREEMPTED, _ENDED_BY_IT) else code
      if code == FINISHED:
        return code
      # A command that worked before is refused only while something is not there: a disk that is mounted late.
      if code == USAGE and not worked:
        _say(f'{said}: starting it again would not help.')
        return code
      worked |= code != USAGE
      vain = 0 if newer else vain + 1
      if vain >= limit:
        _say(f'{said}; {vain} starts in a row brought no newer checkpoint: given up.')
        return code
      pause = min(LONGEST_WAIT, wait * (1 if code == PREEMPTED else 2 ** max(0, vain - 1)))
      _say(f'{said}; starting it again in {pause:g} s ({vain} of {limit} starts in vain).')
      if child.signalled_within(pause):
        return PREEMPTED


class _Child:
  """Runs one command at a time, in a process group of its own, and asks it to stop once for every signal."""

  def __init__(self):
    self._process: subprocess.Popen | None = None
    self._passed_on = False
    self._signal = threading.Event()

  def __enter__(self) -> '_Child':
    self._old = {s: signal.signal(s, self._pass_on) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    return self

  def __exit__(self, *_) -> None:
    for s, handler in self._old.items():
      signal.signal(s, handler)

  @property
  def signalled(self) -> bool:
    return self._signal.is_set()

  def signalled_within(self, seconds: float) -> bool:
    return self._signal.wait(seconds)

  def run(self, command: Sequence[str]) -> int:
    """Its exit code; minus the number of the signal that killed it."""
    # A terminal's Ctrl-C would reach it a second time otherwise, and the second one means: at once, without saving.
    self._process = subprocess.Popen(command, start_new_session=True, preexec_fn=_ask_to_stop_with(os.getpid()))
    if self.signalled and not self._passed_on:  # just before it began
      self._process.terminate()
    return self._process.wait()

  def _pass_on(self, *_) -> None:
    self._signal.set()
    if self._process is not None and self._process.poll() is None:
      self._process.terminate()
      self._passed_on = True


def _ask_to_stop_with(parent: int) -> Callable[[], None]:
  """For a child: it is asked to stop when its parent dies, which passes signals on to it, even by SIGKILL. Linux only."""
  prctl = getattr(ctypes.CDLL(None), 'prctl', None) if sys.platform == 'linux' else None

  def ask() -> None:
    if prctl is not None:
      prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
      if os.getppid() != parent:  # it has died already
        os._exit(PREEMPTED)

  return ask


def _workdir(command: Sequence[str]) -> str | None:
  for i, argument in enumerate(command):
    name, given, value = argument.partition('=')
    if name in ('--workdir', '-workdir'):
      return value if given else command[i + 1] if i + 1 < len(command) else None
  return None


def _saved(workdir: str | None) -> int | None:
  return None if workdir is None else saved_step(workdir)


def _progress(workdir: str | None, after: int | None, newer: bool) -> str:
  if workdir is None:
    return 'no --workdir in the command that would say how far it came'
  if after is None:
    return 'no checkpoint'
  return f'step {after} saved' if newer else f'no checkpoint after that of step {after}'


def _ending(code: int) -> str:
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  return 'stopped by a signal' if code == PREEMPTED else f'exit code {code}'


def _say(what: str) -> None:
  print(f'keep_running: {what}', flush=True)
