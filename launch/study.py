"""Compares regimes on a trained run: untuned, prompt-tuned, fine-tuned, each on several tasks and seeds.

  python launch/study.py --run=runs/quickstart --workdir=runs/study

`prompt` and `finetune` train on ten examples of every class, or one in a hundred; `finetune-all` on all of them.

Each cell is a work directory that launch/train.py and launch/evaluate.py make; a cell that is evaluated is skipped, so that the
same command continues. Writes study.json and study.md. Seeds of one cell share a compiled step.

Exit codes: 0 finished, 75 stopped by a signal (the same command continues), 1 a regime broke its promise, 2 usage.
"""

import json
import os
import pathlib
import sys

from absl import flags

from uni_moe_jax.utils import cli, exit_codes
from uni_moe_jax.utils.errors import UsageError

_RUN = flags.DEFINE_string('run', None, 'Workdir of the trained run.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the study; its cells are folders in it.', required=True)
_TASKS = flags.DEFINE_list('tasks', 'digits,video_caption,video_name', "Of the run's tasks and those of regimes.py.")
_REGIMES = flags.DEFINE_list('regimes', 'untuned,prompt,finetune,finetune-all', 'Which to compare.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'How many, 0, 1, …: of which examples, their order, fresh parameters.', lower_bound=1)
_OVERRIDE = flags.DEFINE_multi_string('override', [], 'Field of every config, such as --override=train.steps=20.')

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.train import finetuning, workdir
  if unknown := [r for r in _REGIMES.value if r not in finetuning.REGIMES]:
    raise UsageError(f'--regimes={unknown[0]} is unknown; choices: {", ".join(finetuning.REGIMES)}.')
  run, folder = (os.path.abspath(os.path.expanduser(f)) for f in (_RUN.value, _WORKDIR.value))
  for task in _TASKS.value:  # mistakes are told before anything is trained
    for regime in map(finetuning.REGIMES.get, _REGIMES.value):
      make_plan(regime.config(regime.argument(run, task)))
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{folder}/jax')
  from uni_moe_jax.analysis import study_cells, study_process
  every = study_cells.cells(_TASKS.value, _REGIMES.value, range(_SEEDS.value))
  study_cells.claim(folder, {'run': run, 'step': workdir.saved_step(run), 'overrides': _OVERRIDE.value})
  for i, cell in enumerate(every, 1):
    print(f'{i}/{len(every)} {cell.folder}' + (': done' if study_cells.done(folder, cell) else ''), flush=True)
    for command in [] if study_cells.done(folder, cell) else study_cells.commands(cell, run, folder, _OVERRIDE.value):
      if code := study_process.run(command, _ROOT):
        return code
  from uni_moe_jax.analysis import study_results
  found = study_results.collect(every, run, folder)
  pathlib.Path(folder, study_results.RESULTS).write_text(json.dumps(found, indent=1))
  pathlib.Path(folder, study_results.TABLE).write_text(study_results.table(found) + '\n')
  print(study_results.table(found))
  broken = study_results.breaches(found)
  for sentence in broken:
    print(f'error: {sentence}', file=sys.stderr)
  return exit_codes.ERROR if broken else exit_codes.FINISHED


if __name__ == '__main__':
  cli.run(main)
