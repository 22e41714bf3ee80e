"""Every file of a checkpoint cut off, with a bit flipped, full of zeros, deleted: the one before is read, or nothing, never it."""

import collections
import contextlib
import io
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from uni_moe_jax.faults import kills
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.workdir import CHECKPOINTS, saved_steps
from uni_moe_jax.utils.errors import RunError

BEFORE, REFUSED, AS_IT_WAS = 'the one before was read', 'refused', 'read, and bit for bit what was saved'


def _cut(path: pathlib.Path, rng: random.Random) -> None:
  path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])


def _flip(path: pathlib.Path, rng: random.Random) -> None:
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def _zero(path: pathlib.Path, _: random.Random) -> None:
  """What some file systems leave of a file that was written just before the power failed."""
  path.write_bytes(bytes(path.stat().st_size))


def _delete(path: pathlib.Path, _: random.Random) -> None:
  path.unlink()


HARMS: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
    'cut off': _cut, 'bit flipped': _flip, 'zeros': _zero, 'deleted': _delete}
_OF_EMPTY = ('deleted',)  # the harms that change an empty file
_PARTLY_UNIMPORTANT = '_CHECKPOINT_METADATA'  # a bit of its time of day may be another without harm


def every_file(workdir: pathlib.Path, folder: pathlib.Path, seed: int,
               harms: Sequence[str] = tuple(HARMS)) -> tuple[dict[str, int], list[str]]:
  """Harms each file of the newest of two checkpoints, then of the only one.

  Args:
    workdir: of a run with two checkpoints at least.
    folder: for copies.
    seed: draws where a file is harmed.
    harms: names of those that are tried.

  Returns:
    (how often what came of it, by '<harm>: <outcome>'; sentences about what must not happen).
  """
  rng, counts, findings = random.Random(seed), collections.Counter(), []
  newest = saved_steps(workdir)[-1]
  with Checkpoints(workdir, max_to_keep=None) as checkpoints:
    before = {s: _bytes(checkpoints.restore_host(s)) for s in checkpoints.steps()}
  there = workdir / CHECKPOINTS / str(newest)
  for alone in (False, True):
    for name in _files(there):
      for harm in [h for h in harms if (there / name).stat().st_size or h in _OF_EMPTY]:
        copy = folder / 'damaged_copy'
        shutil.rmtree(copy, ignore_errors=True)
        for step in [newest] if alone else saved_steps(workdir)[-2:]:
          shutil.copytree(workdir / CHECKPOINTS / str(step), copy / CHECKPOINTS / str(step))
        HARMS[harm](copy / CHECKPOINTS / str(newest) / name, rng)
        outcome = _outcome(copy, newest, before)
        counts[f'{harm}: {outcome}'] += 1
        if outcome not in (REFUSED if alone else BEFORE, AS_IT_WAS):
          findings.append(f'{name} {harm}{", no other checkpoint" if alone else ""}: {outcome}')
  return dict(counts), findings


def trained_on(trainer: kills.Trainer, whole: pathlib.Path, seed: int) -> tuple[list[str], list[str]]:
  """Starts the trainer once per harm where the newest checkpoint of a finished run is damaged: (what was seen, findings).

  Args:
    trainer: of the run.
    whole: its work directory.
    seed: draws the files, and where they are harmed.
  """
  rng, seen, findings = random.Random(seed), [], []
  before, newest = saved_steps(whole)[-2:]
  for harm, apply in HARMS.items():
    workdir, log = trainer.folder / f'damaged_{harm.replace(" ", "_")}', trainer.folder / f'damaged_{harm.replace(" ", "_")}.log'
    shutil.rmtree(workdir, ignore_errors=True)
    log.unlink(missing_ok=True)
    shutil.copytree(whole, workdir)
    there = workdir / CHECKPOINTS / str(newest)
    name = rng.choice([n for n in _files(there) if n != _PARTLY_UNIMPORTANT and (there / n).stat().st_size])
    apply(there / name, rng)
    code, _ = trainer.run(workdir, log)
    said, what = log.read_text(errors='replace'), f'trained on, {name} {harm}'
    resumed = f'resumed from step {before}' in said.splitlines()
    seen.append(f'{what}: {kills.ending(code)}, {"resumed from the one before" if resumed else "NOT resumed from the one before"}')
    findings += [f'{what}: {kills.ending(code)}, see {log}'] if code else kills.differences(whole, workdir)
    findings += [] if resumed else [f'{what}: it did not resume from step {before}, see {log}']
    findings += [] if f'the checkpoint of step {newest}' in said and 'is damaged' in said else [f'{what}: passed over in silence']
  return seen, findings


def _files(checkpoint: pathlib.Path) -> list[str]:
  return sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob('*') if p.is_file())


def _outcome(workdir: pathlib.Path, newest: int, before: dict[int, Any]) -> str:
  """What a reader makes of a work directory whose newest checkpoint is damaged."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said), Checkpoints(workdir, max_to_keep=None) as checkpoints:
      step, state = checkpoints.latest(), _bytes(checkpoints.restore_host())
  except RunError:
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
