"""Measures the expert usage of a checkpoint: python launch/experts.py --workdir=runs/quickstart

Measures for every layer and router how much a condition uses each expert, the effective number of experts, and the
overlap of two tasks (uni_moe_jax/analysis/expert_usage.py). Writes experts.json and experts.png; with --step or
--at_init, the names of the files include the checkpoint. Before training:

  python launch/experts.py --at_init --config=configs/quickstart.py --workdir=runs/quickstart
"""

from absl import flags

from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Work directory of the run.', required=True)
_CONFIG = cli.define_config()
_STEP = flags.DEFINE_integer('step', None, 'Step of a checkpoint; default: the newest.', lower_bound=0)
_AT_INIT = flags.DEFINE_bool('at_init', False, 'Measure the initial parameters; before training with --config.')
_NUM_BATCHES = flags.DEFINE_integer('num_batches', 4, 'Batches to measure routers by token on.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the batches, independent of training.', lower_bound=0)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Directory of the prepared data, if it has moved since training.')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.train import workdir as workdir_lib
  if _AT_INIT.value and _STEP.value is not None:
    raise UsageError('--at_init and --step name two sets of parameters; give one.')
  config = workdir_lib.load_config(_WORKDIR.value) if _CONFIG.value is None else cli.config_of(_CONFIG)
  workdir_lib.claim_workdir(_WORKDIR.value, config)  # only checks
  if _DATA_DIR.value:
    config.data.dir = _DATA_DIR.value
  make_plan(config)  # reports mistakes before slow libraries are imported
  from uni_moe_jax.analysis.run_expert_usage import measure_expert_usage
  for path in measure_expert_usage(
      config, _WORKDIR.value, _STEP.value, _AT_INIT.value, _NUM_BATCHES.value, _SEED.value):
    print(path)
  return 0


if __name__ == '__main__':
  cli.run(main)
