"""Train and evaluate a list of runs, one after the other, and compare their scores in one table.

  uni-moe sweep --sweep=routers --workdir=runs/routers --num_seeds=3
  uni-moe sweep --sweep=routers --workdir=runs/routers --variants=dense,attribute+moe.placement=every_2
  uni-moe sweep --sweep=adaptation --run=runs/quickstart --workdir=runs/adaptation

`routers` trains variants, each a router with other fields of the config, on the same data in the same order, evaluates
them and measures interference and expert usage; seed 0 of all variants comes first. `adaptation` adapts a trained run
to tasks: `prompts` and `finetune` train on ten examples of every class, or on one example in a hundred; `finetune-all`
trains on all examples; `zero-shot` evaluates the run as it is.

Every run is a work directory that the other commands make. Rerun the same command to continue, also with more variants
or seeds: what has finished is skipped, what failed is tried again. Prints results.md and writes it and results.json to
the work directory; they have the runs that the command names.

Exit codes: 0 finished, 75 stopped by a signal (rerun to continue), 1 a run failed, 2 usage.
"""

import collections
import pathlib

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import write_json
from uni_moe_jax.utils import exit_codes
from uni_moe_jax.utils.errors import UsageError

_SWEEP = flags.DEFINE_enum('sweep', None, ['routers', 'adaptation'], 'What to compare.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Work directory of the sweep; contains those of its runs.',
                               required=True)
_NUM_SEEDS = flags.DEFINE_integer('num_seeds', None, 'Seeds of each run, counted from 0; default: 1 for routers, 3 for '
                                  'adaptation.', lower_bound=1)
_OVERRIDE = flags.DEFINE_multi_string('override', [], 'Field of every config, such as --override=train.steps=20')
_OWN_FLAGS = {
    'routers': (
        flags.DEFINE_string('config', 'ablation', 'For routers: config with an argument router=ROUTER.'),
        flags.DEFINE_list('variants', 'dense,modality,task,attribute,token,context', 'For routers: these, each with '
                          'fields of its own, such as token+moe.top_k=1+train.steps=214.'),
        flags.DEFINE_list('measure', 'evaluate,interference,experts,report', 'For routers: commands after training.'),
        flags.DEFINE_integer('num_batches', 16, 'For routers: batches per task for interference.', lower_bound=2)),
    'adaptation': (
        flags.DEFINE_list('run', [], 'For adaptation: work directory of the trained run, or several.'),
        flags.DEFINE_list('tasks', 'digits,video_caption,video_name', 'For adaptation: these, or tasks of the run.'),
        flags.DEFINE_list('recipes', 'zero-shot,prompts,finetune,finetune-all', 'For adaptation: which to compare.'))}


@cli.exit_on_signals(exit_codes.PREEMPTED)  # where no command of a run is running
def main() -> int:
  from uni_moe_jax.analysis import score_table, sweep
  folder = storage.absolute(_WORKDIR.value)
  for name, own_flags in _OWN_FLAGS.items():
    if wrong := [flag.name for flag in own_flags if flag.present and name != _SWEEP.value]:
      raise UsageError(f'--{wrong[0]} is a flag of --sweep={name}; remove it.')
  values = [flag.value for flag in _OWN_FLAGS[_SWEEP.value]]
  make_runs, num_seeds = (sweep.router_runs, 1) if _SWEEP.value == 'routers' else (sweep.adaptation_runs, 3)
  runs = make_runs(folder, *values, _NUM_SEEDS.value or num_seeds, _OVERRIDE.value)  # checks all configs
  storage.make_folder(folder)
  code = sweep.run_all(runs, sweep.starter(pathlib.Path(__file__).resolve().parent, folder / 'jax'))
  if code == exit_codes.PREEMPTED:
    return code
  columns = collections.defaultdict(list)
  for run in runs:
    columns[run.column].append(run.folder)
  table = score_table.tabulate(columns)
  text = f'`{cli.command_line()}`\n\n{score_table.markdown(table, list(columns))}\n'
  write_json(folder / 'results.json', {'command': cli.command_line(), 'columns': list(columns), 'rows': table})
  storage.write_bytes(folder / 'results.md', text.encode())
  print(text)
  return code


if __name__ == '__main__':
  cli.run(main)
