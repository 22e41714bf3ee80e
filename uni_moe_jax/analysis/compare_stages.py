"""What every router of a comparison goes through, stage by stage, and the log of it. Nothing slow is imported here.

A stage is a command that a person could type. What finished is not done again; what failed or was stopped is tried anew by
the next call, and every try stays in the log.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED
from uni_moe_jax.utils.files import write_json

LOG = 'stages.json'  # in the folder of a router
BEFORE, COMPILE, TRAIN, EVALUATE, AFTER, EXPERTS, REPORT = (
    'interference before', 'compile', 'train', 'evaluate', 'interference after', 'experts', 'report')


@dataclasses.dataclass(frozen=True)
class Stage:
  """One command of a router. needs: a stage without which it means nothing, or ''."""
  name: str
  command: tuple[str, ...]
  needs: str = ''


def stages(router: str, config: str, folder: str, batches: int, overrides: Sequence[str], dense: bool) -> tuple[Stage, ...]:
  """Every stage of a router, in order.

  Args:
    router: argument of the config file.
    config: its path. folder: of the comparison.
    batches: of the measurement of interference, per task.
    overrides: 'train.steps=20', of fields of the config.
    dense: the model has no experts.
  """
  where = f'--workdir={pathlib.Path(folder) / router}'
  named = (f'--config={config}:{router}', *(f'--config.{o}' for o in overrides))
  found = [
      Stage(BEFORE, ('launch/interference.py', '--init', *named, where, f'--batches={batches}')),
      # A process that has compiled trains more slowly, see `train.loop.compile_steps`.
      Stage(COMPILE, ('launch/train.py', *named, where, '--compile_only')),
      Stage(TRAIN, ('launch/train.py', *named, where)),
      Stage(EVALUATE, ('launch/evaluate.py', where), TRAIN),
      Stage(AFTER, ('launch/interference.py', where, f'--batches={batches}'), TRAIN),
      Stage(EXPERTS, ('launch/experts.py', where), TRAIN),
      Stage(REPORT, ('launch/report.py', where), TRAIN)]
  return tuple(s for s in found if not (dense and s.name == EXPERTS))


def log_of(folder: str | os.PathLike[str], router: str) -> list[dict[str, Any]]:
  """Every try: [{'stage', 'command', 'code', 'seconds'}], in order."""
  path = pathlib.Path(folder) / router / LOG
  return json.loads(path.read_text()) if path.exists() else []


def finished(log: Sequence[dict[str, Any]], stage: str) -> bool:
  """Whether a try of a stage ended well."""
  return any(t['stage'] == stage and t['code'] == FINISHED for t in log)


def run(
    folder: str | os.PathLike[str], router: str, every: Sequence[Stage], start: Callable[[Sequence[str]], int]) -> bool:
  """Runs the stages of a router that are not finished; where one fails, those that do not need it still run.

  Args:
    start: a command → its exit code.

  Returns:
    False where a signal ended one: nothing further was tried.
  """
  for stage in every:
    log = log_of(folder, router)
    if finished(log, stage.name) or stage.needs and not finished(log, stage.needs):
      continue
    began = time.perf_counter()
    code = start(stage.command)
    log.append({'stage': stage.name, 'command': ' '.join(('python', *stage.command)), 'code': code,
                'seconds': round(time.perf_counter() - began, 1)})
    path = pathlib.Path(folder) / router / LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, log)
    if code == PREEMPTED:
      return False
  return True
