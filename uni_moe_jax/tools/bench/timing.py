"""Interleaved rounds and their statistics.

The speed of a shared machine drifts, so candidates are measured in turn, round by round, and compared within rounds:
all candidates of a round had the same machine. A round in which other processes took more than a tenth of a core is
measured again.
"""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

SPREAD = "figure: median over rounds; spread: quartiles (25 to 75 %); of a ratio, those of the rounds' own ratios"
QUIET_CORES = 0.1  # that other processes may take during a round


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A figure and its quartiles, which are None for a single measurement."""
  value: float
  low: float | None = None
  high: float | None = None
  discarded: int = 0  # rounds in which other processes disturbed the measurement
  judged: bool = True  # False: too few rounds were quiet, so all of them are behind the figure


def estimate(samples: np.ndarray) -> Estimate:
  """Return the median and quartiles of samples [rounds]."""
  samples = np.asarray(samples, float)
  if len(samples) == 1:
    return Estimate(float(samples[0]))
  low, value, high = np.percentile(samples, (25, 50, 75))
  return Estimate(float(value), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Rounds:
  """Seconds [rounds] of every candidate, by its name."""
  seconds: Mapping[Any, np.ndarray]
  discarded: int = 0
  judged: bool = True

  def __getitem__(self, name: Any) -> np.ndarray:
    return self.seconds[name]

  def figure(self, samples: np.ndarray) -> Estimate:
    """Return the estimate of samples [rounds] that are computed from seconds, such as `r['a'] / r['b']`."""
    return dataclasses.replace(estimate(samples), discarded=self.discarded, judged=self.judged)


def _cpu_seconds() -> tuple[float, float] | None:
  """CPU seconds of (the whole machine, this process and its children); None on a system that does not tell."""
  try:
    user, nice, system, _, _, *interrupts_and_steal = map(int, pathlib.Path('/proc/stat').read_text().split()[1:9])
  except (OSError, ValueError):
    return None
  machine = (user + nice + system + sum(interrupts_and_steal)) / os.sysconf('SC_CLK_TCK')
  return machine, sum(os.times()[:4]) + _seconds_of_live_children()  # `os.times` has those that have ended


def _seconds_of_live_children() -> float:
  """CPU seconds of processes that this one has started, such as those that read videos, and that still run."""
  ticks = 0
  for path in pathlib.Path('/proc/self/task').glob('*/children'):
    for child in _text(path).split():
      ticks += sum(map(int, _text(pathlib.Path(f'/proc/{child}/stat')).rpartition(')')[2].split()[11:15]))
  return ticks / os.sysconf('SC_CLK_TCK')


def _text(path: pathlib.Path) -> str:
  """Text of a file of a process or thread; '' if that has just ended."""
  try:
    return path.read_text()
  except OSError:
    return ''


class OtherProcesses:
  """Cores that other processes used since the last call; 0 on a system that does not tell."""

  def __init__(self, read: Callable[[], tuple[float, float] | None] = _cpu_seconds,
               clock: Callable[[], float] = time.perf_counter):
    self._read, self._clock = read, clock
    self._last = read(), clock()

  def __call__(self) -> float:
    (before, start), self._last = self._last, (self._read(), self._clock())
    after, end = self._last
    if before is None or after is None or end <= start:
      return 0.0
    return ((after[0] - before[0]) - (after[1] - before[1])) / (end - start)


def interleaved(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, *, before: Mapping[Any, Callable[[], Any]] | None = None,
    clock: Callable[[], float] = time.perf_counter, other_cores: Callable[[], float] | None = None) -> Rounds:
  """Measure every call, until its result is computed, in rounds that other processes leave undisturbed.

  Each call runs once before the rounds, to compile. The order rotates by one per round, so that no candidate always
  follows the same other. A disturbed round is replaced, up to twice the number of rounds in all; with less than half of
  them quiet (and less than three), no budget is judged.

  Args:
    calls: by name; each returns arrays to wait for. rounds: at least 1. before: untimed preparation of some calls.
    other_cores: cores that other processes used since its last call; default: `OtherProcesses`.
  """
  names, other_cores = list(calls), other_cores or OtherProcesses()

  def measure(i: int) -> dict[Any, float]:
    first, seconds = i % len(names), {}
    for name in names[first:] + names[:first]:
      if before and name in before:
        jax.block_until_ready(before[name]())
      start = clock()
      jax.block_until_ready(calls[name]())
      seconds[name] = clock() - start
    return seconds

  measure(0)
  quiet, disturbed = [], []
  for i in range(2 * rounds):
    other_cores()  # starts the round
    seconds = measure(i)
    (disturbed if other_cores() > QUIET_CORES else quiet).append(seconds)
    if len(quiet) == rounds:
      break
  judged = len(quiet) >= min(rounds, max(3, math.ceil(rounds / 2)))
  used = quiet if judged else quiet + disturbed
  return Rounds({name: np.array([s[name] for s in used]) for name in names}, len(disturbed), judged)
