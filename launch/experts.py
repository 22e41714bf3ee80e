"""Measures which experts the tasks of a checkpoint use: python launch/experts.py --workdir=runs/quickstart

Per layer and router (analysis/expert_usage.py): what every row takes of each expert, how many experts that is in effect, and how much
two tasks' use overlaps. Writes experts.json and experts.png; another --step, or --init, gets names of its own. Before training:

  python launch/experts.py --init --config=configs/quickstart.py --workdir=runs/quickstart
"""

from absl import flags

from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that launch/train.py wrote.', required=True)
_CONFIG = cli.define_config()
_STEP = flags.DEFINE_integer('step', None, 'Which checkpoint; the newest by default.', lower_bound=0)
_INIT = flags.DEFINE_bool('init', False, 'Ask the parameters that the run starts from; --config where nothing is trained yet.')
_BATCHES = flags.DEFINE_integer('batches', 4, 'Steps whose batches are looked at, where routers look at tokens.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Draws the batches, independently of training.', lower_bound=0)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where the prepared data lies, if not where training found it.')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.train import workdir as workdir_lib
  if _INIT.value and _STEP.value is not None:
    raise UsageError('--init and --step name two sets of parameters; give one.')
  config = workdir_lib.load_config(_WORKDIR.value) if _CONFIG.value is None else cli.config_of(_CONFIG)
  workdir_lib.claim_workdir(_WORKDIR.value, config)  # only checks
  if _DATA_DIR.value:
    config.data.dir = _DATA_DIR.value
  make_plan(config)  # mistakes are told before slow libraries are loaded
  from uni_moe_jax.analysis import run_expert_usage
  for path in run_expert_usage.experts(config, _WORKDIR.value, _STEP.value, _INIT.value, _BATCHES.value, _SEED.value):
    print(path)
  return 0


if __name__ == '__main__':
  cli.run(main)
