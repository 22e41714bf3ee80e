"""Damage to every file of a checkpoint: the reader must take the previous checkpoint, or refuse if there is none."""

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

from tests.helpers import saved_run
from tests.stress import trainer as trainer_lib
from tests.stress.trainer import Trainer, ending
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.workdir import CHECKPOINTS, saved_steps
from uni_moe_jax.utils.errors import RunError

PREVIOUS, REFUSED, UNCHANGED = 'the previous one was read', 'refused', 'read, bit for bit what was saved'
DAMAGED_ONE_READ = 'THE DAMAGED ONE WAS READ'


def _truncate(path: pathlib.Path, rng: random.Random) -> None:
  path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])


def _flip_bit(path: pathlib.Path, rng: random.Random) -> None:
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def _zero(path: pathlib.Path, _: random.Random) -> None:
  """What some file systems leave of a file that was written just before a power failure."""
  path.write_bytes(bytes(path.stat().st_size))


def _delete(path: pathlib.Path, _: random.Random) -> None:
  path.unlink()


DAMAGES: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
    'truncated': _truncate, 'bit flipped': _flip_bit, 'zeroed': _zero, 'deleted': _delete}
_OF_EMPTY_FILES = ('deleted',)
_PARTLY_UNCHECKED = '_CHECKPOINT_METADATA'  # a flipped bit may change only Orbax's time of day


def damage_every_file(workdir: pathlib.Path, folder: pathlib.Path, seed: int,
                      damages: Sequence[str] = tuple(DAMAGES)) -> tuple[dict[str, int], list[str]]:
  """Damage each file of the newest of two checkpoints, then of a single checkpoint.

  Args:
    workdir: of a run with at least two checkpoints.
    folder: for copies.
    seed: draws the damaged bytes.
    damages: names from `DAMAGES`.

  Returns:
    (count per '<damage>: <outcome>'; findings).
  """
  rng, counts, findings = random.Random(seed), collections.Counter(), []
  newest = saved_steps(workdir)[-1]
  with Checkpoints(workdir, max_to_keep=None) as checkpoints:
    saved = {s: _bytes(saved_run.on_host(checkpoints, s)) for s in checkpoints.steps()}
  checkpoint = workdir / CHECKPOINTS / str(newest)
  for alone in (False, True):
    for name in _files(checkpoint):
      for damage in [d for d in damages if (checkpoint / name).stat().st_size or d in _OF_EMPTY_FILES]:
        copy = folder / 'damaged_copy'
        trainer_lib.clear(copy)
        for step in [newest] if alone else saved_steps(workdir)[-2:]:
          shutil.copytree(workdir / CHECKPOINTS / str(step), copy / CHECKPOINTS / str(step))
        DAMAGES[damage](copy / CHECKPOINTS / str(newest) / name, rng)
        outcome = _read(copy, newest, saved)
        counts[f'{damage}: {outcome}'] += 1
        if outcome not in (REFUSED if alone else PREVIOUS, UNCHANGED):
          findings.append(f'{name} {damage}{", no other checkpoint" if alone else ""}: {outcome}')
  return dict(counts), findings


def train_on_damage(trainer: Trainer, undisturbed: pathlib.Path, seed: int) -> tuple[list[str], list[str]]:
  """Start the trainer once per damage of the newest checkpoint of a finished run. Return (report lines, findings).

  Args:
    trainer: of the run.
    undisturbed: its work directory.
    seed: draws the files and the damaged bytes.
  """
  rng, report, findings = random.Random(seed), [], []
  previous, newest = saved_steps(undisturbed)[-2:]
  for damage, apply in DAMAGES.items():
    workdir = trainer.folder / f'damaged_{damage.replace(" ", "_")}'
    log = workdir.with_suffix('.log')
    trainer_lib.clear(workdir, log)
    shutil.copytree(undisturbed, workdir)
    checkpoint = workdir / CHECKPOINTS / str(newest)
    name = rng.choice([n for n in _files(checkpoint) if n != _PARTLY_UNCHECKED and (checkpoint / n).stat().st_size])
    apply(checkpoint / name, rng)
    code, _ = trainer.run(workdir, log)
    output, what = log.read_text(errors='replace'), f'training with {name} {damage}'
    resumed = f'resumed from step {previous}' in output.splitlines()
    report.append(f'{what}: {ending(code)}, {"" if resumed else "NOT "}resumed from the previous checkpoint')
    findings += [f'{what}: {ending(code)}, see {log}'] if code else trainer_lib.differences(undisturbed, workdir)
    if not resumed:
      findings.append(f'{what}: it did not resume from step {previous}, see {log}')
    if not (f'the checkpoint of step {newest}' in output and trainer_lib.DAMAGED in output):
      findings.append(f'{what}: skipped without a warning')
  return report, findings


def _files(checkpoint: pathlib.Path) -> list[str]:
  return sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob('*') if p.is_file())


def _read(workdir: pathlib.Path, newest: int, saved: dict[int, Any]) -> str:
  """Return the outcome of reading a work directory whose newest checkpoint is damaged."""
  output = io.StringIO()
  try:
    with contextlib.redirect_stderr(output), Checkpoints(workdir, max_to_keep=None) as checkpoints:
      step, state = checkpoints.latest(), _bytes(saved_run.on_host(checkpoints))
  except RunError:
    return REFUSED
  except Exception as e:
    return f'{type(e).__name__} with a traceback'
  if step == newest:
    return UNCHANGED if state == saved[newest] else DAMAGED_ONE_READ
  if trainer_lib.DAMAGED not in output.getvalue():
    return 'skipped without a warning'
  return PREVIOUS if state == saved[step] else 'the previous one was read wrongly'


def _bytes(tree: Any) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
