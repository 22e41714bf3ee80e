"""Measures task interference at a checkpoint: python launch/interference.py --workdir=runs/quickstart

Measures how much a step on one task changes the loss of another (uni_moe_jax/analysis/interference.py), over a set of
parameters and for each layer and projection in it. Writes interference.json and two heat maps; with --step or
--at_init, the names of the files include the checkpoint. Before training:

  python launch/interference.py --at_init --config=configs/quickstart.py --workdir=runs/quickstart
"""

from absl import flags

from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Work directory of the run.', required=True)
_CONFIG = cli.define_config()
_STEP = flags.DEFINE_integer('step', None, 'Step of a checkpoint; default: the newest.', lower_bound=0)
_AT_INIT = flags.DEFINE_bool('at_init', False, 'Measure the initial parameters; before training with --config.')
_PARAMETERS = flags.DEFINE_string(
    'parameters', r'ffn_out/kernel$', 'Regular expression for paths such as encoder/blocks/block0/ffn_out/kernel.')
_LAYERS = flags.DEFINE_list('layers', None, 'Indices; default: 3, 7, 11, …, or all layers if there are at most 7.')
_NUM_BATCHES = flags.DEFINE_integer('num_batches', 16, 'Per task; each takes two gradients.', lower_bound=2)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of batches and resampling, independent of training.', lower_bound=0)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Directory of the prepared data, if it has moved since training.')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.train import workdir as workdir_lib
  if _AT_INIT.value and _STEP.value is not None:
    raise UsageError('--at_init and --step name two sets of parameters; give one.')
  if wrong := [i for i in _LAYERS.value or () if not i.isdecimal()]:
    raise UsageError(f'--layers={",".join(_LAYERS.value)}: {wrong[0]!r} is not an index; write --layers=3,7,11.')
  config = workdir_lib.load_config(_WORKDIR.value) if _CONFIG.value is None else cli.config_of(_CONFIG)
  workdir_lib.claim_workdir(_WORKDIR.value, config)  # only checks
  if _DATA_DIR.value:
    config.data.dir = _DATA_DIR.value
  make_plan(config)  # reports mistakes before slow libraries are imported
  from uni_moe_jax.analysis.run_interference import measure_interference
  layers = None if _LAYERS.value is None else [int(i) for i in _LAYERS.value]
  for path in measure_interference(
      config, _WORKDIR.value, _STEP.value, _AT_INIT.value, _PARAMETERS.value, layers, _NUM_BATCHES.value, _SEED.value):
    print(path)
  return 0


if __name__ == '__main__':
  cli.run(main)
