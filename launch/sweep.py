"""Train and evaluate a grid of runs, and compare them.

  uni-moe sweep --sweep=routers --workdir=runs/routers                        # 2 h 20 min on two CPU cores
  uni-moe sweep --sweep=routers --workdir=runs/routers --routers=dense,task   # some of the routers
  uni-moe sweep --sweep=adaptation --run=runs/quickstart --workdir=runs/adaptation

`routers` trains every router on the same data in the same order and measures interference and expert usage.
`adaptation` adapts a trained run to tasks: `prompts` and `finetune` train on ten examples of every class, or on one
example in a hundred; `finetune-all` trains on all examples; `zero-shot` evaluates the run as it is.

Every cell of the grid is a work directory that the other launch scripts make. Rerun the same command to continue:
finished stages are skipped, failed ones are retried. Writes results.json, results.md and figures to `results/`.

Exit codes: 0 finished, 75 stopped by a signal (rerun to continue), 1 a run or a check of the results failed, 2 usage.
"""

import os
import pathlib
import sys

from absl import flags

from uni_moe_jax.utils import cli, exit_codes, storage
from uni_moe_jax.utils.errors import UsageError

_SWEEP = flags.DEFINE_enum('sweep', None, ['routers', 'adaptation'], 'What to compare.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Work directory of the sweep, with those of its cells.', required=True)
_NUM_SEEDS = flags.DEFINE_integer(
    'num_seeds', None, 'Seeds of every cell, from 0; default: 1 for routers, 3 for adaptation.', lower_bound=1)
_OVERRIDE = flags.DEFINE_multi_string('override', [], 'Field of every config, such as --override=train.steps=20')
_OWN_FLAGS = {
    'routers': (
        flags.DEFINE_string('config', 'ablation', 'For routers: config with an argument router=ROUTER.'),
        flags.DEFINE_list('routers', 'dense,modality,task,attribute,token,context', 'For routers: which to compare.'),
        flags.DEFINE_integer('num_batches', 16, 'For routers: batches per task for interference.', lower_bound=2)),
    'adaptation': (
        flags.DEFINE_string('run', None, 'For adaptation: work directory of the trained run.'),
        flags.DEFINE_list('tasks', 'digits,video_caption,video_name', 'For adaptation: these, or tasks of the run.'),
        flags.DEFINE_list('recipes', 'zero-shot,prompts,finetune,finetune-all', 'For adaptation: which to compare.'))}

_FOLDER = pathlib.Path(__file__).resolve().parent  # of the other launch scripts


def main() -> int:
  from uni_moe_jax.analysis.sweep import grid, runner
  folder = storage.absolute(os.path.expanduser(_WORKDIR.value))
  for sweep, own_flags in _OWN_FLAGS.items():
    if wrong := [flag.name for flag in own_flags if flag.present and sweep != _SWEEP.value]:
      raise UsageError(f'--{wrong[0]} is a flag of --sweep={sweep}; remove it.')
  source, *names = (flag.value for flag in _OWN_FLAGS[_SWEEP.value])
  make_grid = grid.router_grid if _SWEEP.value == grid.ROUTERS else grid.adaptation_grid
  cells, settings = make_grid(folder, source, *names, _NUM_SEEDS.value, _OVERRIDE.value)  # checks all configs
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{folder}/jax')
  runner.claim(folder, settings)
  if not runner.run_cells(cells, lambda command: runner.run_command(command, _FOLDER)):
    return exit_codes.PREEMPTED
  from uni_moe_jax.analysis.sweep import results as results_lib
  results = results_lib.collect(_SWEEP.value, cells, source, cli.command_line())
  print(results_lib.write(results, folder))
  for sentence in results['errors']:
    print(f'error: {sentence}', file=sys.stderr)
  return exit_codes.ERROR if results['errors'] else exit_codes.FINISHED


if __name__ == '__main__':
  cli.run(main)
