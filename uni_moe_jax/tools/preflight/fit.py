"""The largest batch of a device that fits, between two that were compiled."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import ml_collections

from uni_moe_jax.tools.preflight.compiled_programs import Program

COMPILES = 4  # the config's own included
_CLOSE = 1.05  # a batch that fits and one that does not are close enough
_LARGEST = 64  # times the config's own batch: beyond, nobody asks


@dataclasses.dataclass(frozen=True)
class Largest:
  """What was found, in examples of a device per micro-step.

  Attributes:
    examples: of the largest batch that was compiled and fits; 0: none did.
    too_large: of the smallest that was compiled and does not fit, or None.
    estimate: where memory would be full, by a straight line through what was compiled; None where it is not known.
    tried: (examples, bytes or None) in the order of compilation.
  """
  examples: int
  too_large: int | None
  estimate: float | None
  tried: tuple[tuple[int, float | None], ...]


def unit(config: ml_collections.ConfigDict, task: str, shards: int) -> int:
  """What a task's batch must be a multiple of: micro-steps × batch shards, × 2 where examples of a shard are mixed in pairs."""
  t = config.tasks[task]
  return shards * config.train.grad_accum_steps * (2 if t.mixup_alpha or t.cutmix_alpha else 1)


def examples(config: ml_collections.ConfigDict, shards: int, tasks: Iterable[str]) -> int:
  """Examples of these tasks that a device has in a micro-step."""
  return sum(config.tasks[name].batch_size for name in tasks) // (shards * config.train.grad_accum_steps)


def scaled(config: ml_collections.ConfigDict, shards: int, factor: float) -> ml_collections.ConfigDict:
  """A copy whose batches are as near to `factor` times these as the mesh allows, and nowhere zero."""
  out = config.copy_and_resolve_references()
  for name, t in out.tasks.items():
    if t.batch_size:
      whole = unit(config, name, shards)
      t.batch_size = max(1, round(t.batch_size * factor / whole)) * whole
  return out


def largest(
    own: tuple[int, Program], fixed: float, memory: float, sized: Callable[[int], int], compile_at: Callable[[int], Program],
    may_go_on: Callable[[], bool] = lambda: True) -> Largest:
  """Brackets the largest batch that fits. A program's memory is nearly a straight line in the batch: fixed + slope · examples.

  Args:
    own: the config's examples and its program, already compiled.
    fixed: bytes that no batch changes (the train state): where the line starts, until two points are known.
    memory: bytes of a device.
    sized: wanted examples → those of the nearest batch that there is. compile_at: wanted examples → the program of that batch.
    may_go_on: asked before each compile.
  """
  tried = {own[0]: own[1]}
  fits = lambda: max((n for n, p in tried.items() if p.fits(memory)), default=0)
  fails = lambda: min((n for n, p in tried.items() if not p.fits(memory)), default=None)
  estimate = _full(tried, fixed, memory)
  while len(tried) < COMPILES:
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
    # Batches are coarse: the nearest one may be known, or lie outside of what is asked.
    if not low < sized(wanted) < (high or math.inf) or not may_go_on():
      break
    tried[sized(wanted)] = compile_at(wanted)
    estimate = _full(tried, fixed, memory)
  return Largest(fits(), fails(), estimate, tuple((n, p.needs) for n, p in tried.items()))


def _full(tried: dict[int, Program], fixed: float, memory: float) -> float | None:
  """The batch at which memory is full, by a line through the two points that are nearest to it, or one point and `fixed`."""
  points = sorted(((n, p.needs) for n, p in tried.items() if p.needs is not None), key=lambda p: abs(p[1] - memory))[:2]
  if not points:
    return None
  (n1, m1), (n0, m0) = points if len(points) == 2 else (points[0], (0, fixed))
  slope = (m1 - m0) / (n1 - n0)
  return n0 + (memory - m0) / slope if slope > 0 else None
