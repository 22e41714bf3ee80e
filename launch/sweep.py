"""Train and evaluate a grid of runs, and compare them.

  uni-moe sweep --sweep=routers --workdir=runs/routers
  uni-moe sweep --sweep=adaptation --run=runs/quickstart --workdir=runs/adaptation
  uni-moe sweep --redraw=runs/routers/results/results.json                            # the page and figures beside it

`routers` trains variants, each a router with other fields of the config, on the same data in the same order, evaluates
them and measures interference and expert usage; seed 0 of all variants comes first. `adaptation` adapts a trained run
to tasks: `prompts` and `finetune` train on ten examples of every class, or on one example in a hundred; `finetune-all`
trains on all examples; `zero-shot` evaluates the run as it is.

Every cell of the grid is a work directory that the other commands make. Rerun the same command to continue, also
with more variants, seeds or measurements: finished stages are skipped, failed ones are retried. Writes results.json,
results.md and figures about all cells of the work directory to `results/`; --redraw needs results.json alone.

Exit codes: 0 finished, 75 stopped by a signal (rerun to continue), 1 a run or a check of the results failed, 2 usage.
"""

import os
import pathlib
import sys

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.io import storage
from uni_moe_jax.utils import exit_codes
from uni_moe_jax.utils.errors import UsageError

_SWEEP = flags.DEFINE_enum('sweep', None, ['routers', 'adaptation'], 'What to compare.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Work directory of the sweep; contains those of its cells.')
_REDRAW = flags.DEFINE_string('redraw', None, 'Instead of a sweep: rewrite the page and figures of this results.json.')
_NUM_SEEDS = flags.DEFINE_string('num_seeds', '', 'Seeds per variant or recipe, counted from 0, with exceptions: '
                                 '3,dense=5; default: 1 for routers, 3 for adaptation.')
_OVERRIDE = flags.DEFINE_multi_string('override', [], 'Field of every config, such as --override=train.steps=20')
_OWN_FLAGS = {
    'routers': (
        flags.DEFINE_string('config', 'ablation', 'For routers: config with an argument router=ROUTER.'),
        flags.DEFINE_list('variants', 'dense,modality,task,attribute,token,context', 'For routers: these, dense_wide, '
                          'attribute_every_2, attribute_top_1, attribute_top_4, token_in_4 (docs/guides/analysis.md).'),
        flags.DEFINE_list('measure', 'evaluation,interference,experts,report', 'For routers: what to run after training'
                          " (interference: also before); along: at kept checkpoints; merged: merged models' scores."),
        flags.DEFINE_integer('num_batches', 16, 'For routers: batches per task for interference.', lower_bound=2),
        flags.DEFINE_string('steps', '', "For routers: train.steps, the config's by default, as in 600,token=214.")),
    'adaptation': (
        flags.DEFINE_list('run', [], 'For adaptation: work directory of the trained run, or several.'),
        flags.DEFINE_list('tasks', 'digits,video_caption,video_name', 'For adaptation: these, or tasks of the run.'),
        flags.DEFINE_list('recipes', 'zero-shot,prompts,finetune,finetune-all', 'For adaptation: which to compare.'))}


@cli.exit_on_signals(exit_codes.PREEMPTED)  # where no command of a cell runs
def main() -> int:
  from uni_moe_jax.analysis.sweep import grid, runner
  if _REDRAW.value:
    from uni_moe_jax.analysis.sweep.results import redraw
    return print(redraw(storage.absolute(_REDRAW.value))) or exit_codes.FINISHED
  if missing := [flag.name for flag in (_SWEEP, _WORKDIR) if not flag.value]:
    raise UsageError(f'--{missing[0]} is missing; uni-moe help sweep describes it.')
  folder = storage.absolute(_WORKDIR.value)
  for sweep, own_flags in _OWN_FLAGS.items():
    if wrong := [flag.name for flag in own_flags if flag.present and sweep != _SWEEP.value]:
      raise UsageError(f'--{wrong[0]} is a flag of --sweep={sweep}; remove it.')
  source, *others = (flag.value for flag in _OWN_FLAGS[_SWEEP.value])
  make_grid = grid.router_grid if _SWEEP.value == grid.ROUTERS else grid.adaptation_grid
  cells, settings = make_grid(folder, source, *others, _NUM_SEEDS.value, _OVERRIDE.value)  # checks all configs
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{folder}/jax')
  runner.claim(folder, settings, cells)
  if not runner.run_cells(cells, runner.starter(pathlib.Path(__file__).resolve().parent)):
    return exit_codes.PREEMPTED
  from uni_moe_jax.analysis.sweep import results as results_lib
  cells = runner.claim(folder, settings, cells)  # with those of sweeps that began meanwhile
  results = results_lib.collect(_SWEEP.value, cells, source, cli.command_line())
  print(results_lib.write(results, folder / results_lib.FOLDER))
  sys.stderr.writelines(f'error: {sentence}\n' for sentence in results['errors'])
  return exit_codes.ERROR if results['errors'] else exit_codes.FINISHED


if __name__ == '__main__':
  cli.run(main)
