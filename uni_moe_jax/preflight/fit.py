"""The largest batch of a device that fits, between two that were compiled."""

import dataclasses
import functools
import math
from collections.abc import Callable

import ml_collections

from uni_moe_jax.preflight.programs import Program

COMPILES = 4  # the config's own included
_CLOSE = 1.05  # a batch that fits and one that does not are close enough
_LARGEST = 64  # times the config's own batch: beyond, nobody asks


@dataclasses.dataclass(frozen=True)
class Largest:
  """What was found.

  Attributes:
    unit: examples of a device per micro-step at scale 1: every task's batch in the smallest whole numbers that keep their
      proportion. scale: of the largest batch that was compiled and fits; 0: none did.
    too_large: the smallest scale that was compiled and does not fit, or None.
    estimate: scale at which memory would be full, by a straight line through what was compiled; None where it is not known.
    tried: (scale, bytes or None) in the order of compilation.
  """
  unit: int
  scale: int
  too_large: int | None
  estimate: float | None
  tried: tuple[tuple[int, float | None], ...]


def scale_of(config: ml_collections.ConfigDict, shards: int) -> tuple[int, int]:
  """(scale, unit) of a config's batches: per-device micro-batches of all tasks are `scale` times the smallest ones."""
  parts = shards * config.train.accum
  local = [t.batch // parts for t in config.tasks.values() if t.batch]
  scale = functools.reduce(math.gcd, local)
  return scale, sum(local) // scale


def scaled(config: ml_collections.ConfigDict, scale: int, new: int) -> ml_collections.ConfigDict:
  """A copy with batches of another scale."""
  out = config.copy_and_resolve_references()
  for t in out.tasks.values():
    t.batch = t.batch // scale * new
  return out


def largest(
    own: tuple[int, Program], unit: int, fixed: float, memory: float, compile_at: Callable[[int], Program],
    compiles: int = COMPILES) -> Largest:
  """Brackets the largest scale that fits. A program's memory is nearly a straight line in the batch: fixed + slope · scale.

  Args:
    own: the config's scale and its program, already compiled. unit: see `Largest`.
    fixed: bytes that no batch changes (the train state): where the line starts, until two points are known.
    memory: bytes of a device. compile_at: scale → program.
    compiles: how many there may be, `own` included.
  """
  tried = {own[0]: own[1]}
  fits = lambda: max((s for s, p in tried.items() if p.fits(memory)), default=0)
  fails = lambda: min((s for s, p in tried.items() if not p.fits(memory)), default=None)
  estimate = _full(tried, fixed, memory)
  while len(tried) < compiles:
    low, high = fits(), fails()
    if high is not None and (high - low <= 1 or low and high / low <= _CLOSE):
      break
    if estimate is not None:
      wanted = math.floor(estimate)
    elif high is None:  # memory does not grow with the batch
      wanted = _LARGEST * own[0]
    else:  # the compiler did not say how much too large: half
      wanted = (low + high) // 2
    if high is not None:
      wanted = min(wanted, high - 1)
    wanted = min(max(wanted, low + 1), _LARGEST * own[0])
    if wanted in tried:
      break
    tried[wanted] = compile_at(wanted)
    estimate = _full(tried, fixed, memory)
  return Largest(unit, fits(), fails(), estimate, tuple((s, p.needs) for s, p in tried.items()))


def _full(tried: dict[int, Program], fixed: float, memory: float) -> float | None:
  """The scale at which memory is full, by a line through the two points that are nearest to it, or one point and `fixed`."""
  points = sorted(((s, p.needs) for s, p in tried.items() if p.needs is not None), key=lambda p: abs(p[1] - memory))[:2]
  if not points:
    return None
  (s1, m1), (s0, m0) = points if len(points) == 2 else (points[0], (0, fixed))
  slope = (m1 - m0) / (s1 - s0)
  return s0 + (memory - m0) / slope if slope > 0 else None
