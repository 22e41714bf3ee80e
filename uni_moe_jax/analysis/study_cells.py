"""The cells of a study: one run, several tasks, regimes and seeds, each a work directory. Nothing slow is imported here.

A cell is what `launch/train.py` and `launch/evaluate.py` make of a config in `regimes.REGIMES`, so that it can be repeated by
hand. A cell that is evaluated is done.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from uni_moe_jax.train import finetuning
from uni_moe_jax.utils.errors import UsageError

SETTINGS = 'settings.json'
EVALUATION = 'evaluation.json'  # `eval.suite` writes it last
UNTUNED = 'untuned'


@dataclasses.dataclass(frozen=True)
class Cell:
  """One work directory of a study."""
  task: str
  regime: str
  seed: int

  @property
  def folder(self) -> str:
    return f'{self.task}-{self.regime}' + (f'-{self.seed}' if self.regime != UNTUNED else '')

  @property
  def trains(self) -> bool:
    return self.regime != UNTUNED


def cells(tasks: Sequence[str], names: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
  """Every cell; seeds come last, so that those of one compiled program follow each other. Untuned ones know no seed."""
  return [Cell(task, regime, seed) for task in tasks for regime in names
          for seed in (seeds[:1] if regime == UNTUNED else seeds)]


def claim(folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
  """Makes a folder this study's, or checks that it already is: cells that are done there must be of the same settings.

  Raises:
    UsageError: they are of others.
  """
  path = pathlib.Path(folder) / SETTINGS
  if path.exists():
    if (old := json.loads(path.read_text())) != settings:
      changed = ', '.join(f'{k}: {old.get(k)!r} → {v!r}' for k, v in settings.items() if old.get(k) != v)
      raise UsageError(f'{folder} holds a study with other settings ({changed}); give another --workdir.')
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(settings, indent=1))


def done(folder: str | os.PathLike[str], cell: Cell) -> bool:
  """Whether a cell is evaluated."""
  return (pathlib.Path(folder) / cell.folder / EVALUATION).exists()


def commands(cell: Cell, run: str, folder: str, overrides: Sequence[str]) -> list[list[str]]:
  """What makes a cell: arguments of the launch scripts, to be run from the repository's root."""
  regime = finetuning.REGIMES[cell.regime]
  where = f'--workdir={pathlib.Path(folder) / cell.folder}'
  config = [f'--config={regime.file}:{regime.argument(run, cell.task)}', where, f'--config.seed={cell.seed}',
            *(f'--config.{o}' for o in overrides)]
  return [['launch/train.py', *config], ['launch/evaluate.py', where]] if cell.trains else [['launch/evaluate.py', *config]]
