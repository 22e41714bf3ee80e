"""Every file of a checkpoint cut off, with a bit flipped, and deleted: the one before is read, or nothing, never the damaged one."""

import collections
import contextlib
import io
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from uni_moe_jax import failures
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.workdir import CHECKPOINTS, saved_steps

BEFORE, REFUSED, AS_IT_WAS = 'the one before was read', 'refused', 'read, and bit for bit what was saved'


def _cut(path: pathlib.Path, rng: random.Random) -> None:
  path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])


def _flip(path: pathlib.Path, rng: random.Random) -> None:
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def _delete(path: pathlib.Path, _: random.Random) -> None:
  path.unlink()


HARMS: dict[str, Callable[[pathlib.Path, random.Random], None]] = {'cut off': _cut, 'bit flipped': _flip, 'deleted': _delete}


def every_file(workdir: pathlib.Path, folder: pathlib.Path, seed: int) -> tuple[dict[str, int], list[str]]:
  """Harms each file of the newest of two checkpoints, then of the only one.

  Args:
    workdir: of a run with two checkpoints at least.
    folder: for copies.
    seed: draws where a file is harmed.

  Returns:
    (how often what came of it, by '<harm>: <outcome>'; sentences about what must not happen).
  """
  rng, counts, findings = random.Random(seed), collections.Counter(), []
  newest = saved_steps(workdir)[-1]
  with Checkpoints(workdir, keep=None) as checkpoints:
    before = {s: _bytes(checkpoints.restore_host(s)) for s in checkpoints.steps()}
  there = workdir / CHECKPOINTS / str(newest)
  files = sorted(str(p.relative_to(there)) for p in there.rglob('*') if p.is_file() and p.stat().st_size)
  for alone in (False, True):
    for name in files:
      for harm, apply in HARMS.items():
        copy = folder / 'damaged_copy'
        shutil.rmtree(copy, ignore_errors=True)
        for step in [newest] if alone else saved_steps(workdir)[-2:]:
          shutil.copytree(workdir / CHECKPOINTS / str(step), copy / CHECKPOINTS / str(step))
        apply(copy / CHECKPOINTS / str(newest) / name, rng)
        outcome = _outcome(copy, newest, before)
        counts[f'{harm}: {outcome}'] += 1
        if outcome not in (REFUSED if alone else BEFORE, AS_IT_WAS):
          findings.append(f'{name} {harm}{", no other checkpoint" if alone else ""}: {outcome}')
  return dict(counts), findings


def _outcome(workdir: pathlib.Path, newest: int, before: dict[int, Any]) -> str:
  """What a reader makes of a work directory whose newest checkpoint is damaged."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said), Checkpoints(workdir, keep=None) as checkpoints:
      step, state = checkpoints.latest(), _bytes(checkpoints.restore_host())
  except failures.Failure:
    return REFUSED
  except Exception as e:  # whatever it is: a person sees a traceback
    return f'{type(e).__name__} with a traceback'
  if step == newest:  # a flipped bit of the time of day that Orbax writes down makes another time of day
    return AS_IT_WAS if state == before[newest] else 'THE DAMAGED ONE WAS READ'
  if 'is damaged' not in said.getvalue():
    return 'passed over in silence'
  return BEFORE if state == before[step] else 'the one before was read wrongly'


def _bytes(tree: Any) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
