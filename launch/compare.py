"""Compares routers: trains each on the same data in the same order, evaluates it, measures interference and use of experts.

  python launch/compare.py --workdir=runs/compare                       # all six, 2 h 20 min on two CPU cores
  python launch/compare.py --workdir=runs/compare --routers=dense,task  # some of them

Every router is a work directory that the other commands make (uni_moe_jax/analysis/compare_stages.py). The same command continues;
what failed is tried again. Writes results.json, results.md and pictures into the folder `results`.

Exit codes: 0 finished, 75 stopped by a signal (the same command continues), 1 a run failed, or is not comparable, 2 usage.
"""

import os
import pathlib
import sys

from absl import flags

from uni_moe_jax.utils import cli, exit_codes
from uni_moe_jax.utils.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the comparison; every router is a folder in it.', required=True)
_CONFIG = flags.DEFINE_string('config', 'configs/ablation.py', 'Config file whose argument is the router.')
_ROUTERS = flags.DEFINE_list('routers', 'dense,modality,task,attribute,token,context', 'Which to compare.')
_BATCHES = flags.DEFINE_integer('batches', 16, 'Of the measurement of interference, per task.', lower_bound=2)
_OVERRIDE = flags.DEFINE_multi_string('override', [], 'Field of every config, such as --override=train.steps=20.')

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  routers, folder = list(dict.fromkeys(_ROUTERS.value)), os.path.abspath(os.path.expanduser(_WORKDIR.value))
  if not routers:
    raise UsageError('--routers is empty: name at least one.')
  file = (_ROOT / os.path.expanduser(_CONFIG.value)).resolve()
  if not file.is_file():
    raise UsageError(f'--config={_CONFIG.value}: there is no such file.')
  dense = {}
  for router in routers:  # mistakes are told before anything is trained
    config = cli.config_from(f'{file}:{router}', _OVERRIDE.value)
    make_plan(config)
    dense[router] = config.moe.router == 'dense'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{folder}/jax')
  from uni_moe_jax.analysis import compare_stages, study_cells, study_process
  study_cells.claim(folder, {'config': _CONFIG.value, 'batches': _BATCHES.value, 'overrides': _OVERRIDE.value})
  for i, router in enumerate(routers, 1):
    print(f'{i}/{len(routers)} {router}', flush=True)
    every = compare_stages.stages(router, str(file), folder, _BATCHES.value, _OVERRIDE.value, dense[router])
    if not compare_stages.run(folder, router, every, lambda command: study_process.run(command, _ROOT)):
      return exit_codes.PREEMPTED
  from uni_moe_jax.analysis import compare_results
  found = compare_results.collect(folder, routers, _CONFIG.value, ' '.join(['python', *sys.argv]))
  print(compare_results.write(found, folder))
  for sentence in found['breaches']:
    print(f'error: {sentence}', file=sys.stderr)
  return exit_codes.ERROR if found['breaches'] else exit_codes.FINISHED


if __name__ == '__main__':
  cli.run(main)
