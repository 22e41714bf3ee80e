"""Measures task interference at a checkpoint: python launch/interference.py --workdir=runs/quickstart

How much a step on one task changes the loss of another (analysis/interference.py), over a set of parameters and for each layer and
projection of it. Writes interference.json and two heat maps; another --step, or --init, gets names of its own. Before training:

  python launch/interference.py --init --config=configs/quickstart.py --workdir=runs/quickstart
"""

from absl import flags

from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that launch/train.py wrote.', required=True)
_CONFIG = cli.define_config()
_STEP = flags.DEFINE_integer('step', None, 'Which checkpoint; the newest by default.', lower_bound=0)
_INIT = flags.DEFINE_bool('init', False, 'Ask the parameters that the run starts from; --config where nothing is trained yet.')
_PARAMETERS = flags.DEFINE_string(
    'parameters', r'ffn_out/kernel$', 'Regular expression, searched in paths such as encoder/blocks/block0/ffn_out/kernel.')
_LAYERS = flags.DEFINE_list('layers', None, 'Indices; by default 3, 7, 11, …, and all of a model with at most 7 layers.')
_BATCHES = flags.DEFINE_integer('batches', 16, 'Per task, each asked twice.', lower_bound=2)
_SEED = flags.DEFINE_integer('seed', 0, 'Draws the batches, independently of training, and the resamples.', lower_bound=0)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where the prepared data lies, if not where training found it.')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.train import workdir as workdir_lib
  if _INIT.value and _STEP.value is not None:
    raise UsageError('--init and --step name two sets of parameters; give one.')
  if wrong := [i for i in _LAYERS.value or () if not i.isdecimal()]:
    raise UsageError(f'--layers={",".join(_LAYERS.value)}: {wrong[0]!r} is no index; write --layers=3,7,11.')
  config = workdir_lib.load_config(_WORKDIR.value) if _CONFIG.value is None else cli.config_of(_CONFIG)
  workdir_lib.claim_workdir(_WORKDIR.value, config)  # only checks
  if _DATA_DIR.value:
    config.data.dir = _DATA_DIR.value
  make_plan(config)  # mistakes are told before slow libraries are loaded
  from uni_moe_jax.analysis import run_interference
  layers = None if _LAYERS.value is None else [int(i) for i in _LAYERS.value]
  for path in run_interference.interference(
      config, _WORKDIR.value, _STEP.value, _INIT.value, _PARAMETERS.value, layers, _BATCHES.value, _SEED.value):
    print(path)
  return 0


if __name__ == '__main__':
  cli.run(main)
