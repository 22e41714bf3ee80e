"""Interleaved rounds and their statistics.

The speed of a shared machine drifts, so candidates are measured in turn, round by round, and compared as a ratio of
medians. Its spread is the interquartile range of the ratios of single rounds, in which both candidates had the same
machine.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

SPREAD = 'spread: quartiles (25 to 75 %) over rounds; of a ratio, those of the ratios of single rounds'


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A figure and its quartiles, which are None for a single measurement."""
  value: float
  low: float | None = None
  high: float | None = None


def estimate(samples: np.ndarray) -> Estimate:
  """Return the median and quartiles of samples [rounds]."""
  samples = np.asarray(samples, float)
  if len(samples) == 1:
    return Estimate(float(samples[0]))
  low, value, high = np.percentile(samples, (25, 50, 75))
  return Estimate(float(value), float(low), float(high))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
  """Return the ratio of medians of samples [rounds], with the quartiles of the rounds' own ratios."""
  numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
  own = estimate(numerator / denominator)
  return dataclasses.replace(own, value=float(np.median(numerator) / np.median(denominator)))


def per_second(count: float, seconds: np.ndarray) -> Estimate:
  """Return the rate of `count` items in each of `seconds` [rounds]."""
  return estimate(count / np.asarray(seconds, float))


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, *, before: Mapping[str, Callable[[], Any]] | None = None,
    clock: Callable[[], float] = time.perf_counter) -> dict[str, np.ndarray]:
  """Return the seconds [rounds] of every call, until its result is computed.

  Each call runs once before the rounds, to compile. The order rotates by one per round, so that no candidate always
  follows the same other.

  Args:
    calls: by name; each returns arrays to wait for. rounds: at least 1. before: untimed preparation of some calls.
  """
  names, seconds = list(calls), {name: [] for name in calls}
  for i in (0, *range(rounds)):
    first = i % len(names)
    for name in names[first:] + names[:first]:
      if before and name in before:
        jax.block_until_ready(before[name]())
      start = clock()
      jax.block_until_ready(calls[name]())
      seconds[name].append(clock() - start)
  return {name: np.array(s[1:]) for name, s in seconds.items()}
