"""Measure task interference at a checkpoint.

  uni-moe interference --workdir=runs/quickstart

Measures how much a step on one task changes the loss of another (uni_moe_jax/analysis/interference.py), over a set of
parameters and for each layer and projection in it. Writes interference.json and two heat maps; with --step or
--at_init, the names of the files include the checkpoint. Before training:

  uni-moe interference --at_init --config=quickstart --workdir=runs/quickstart
"""

from absl import flags

from uni_moe_jax.analysis import measured_run
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.utils.errors import UsageError

_RUN = measured_run.define_flags()
_PARAMETERS = flags.DEFINE_string(
    'parameters', r'ffn_out/kernel$',
    'Regular expression for the measured parameters, such as encoder/blocks/block0/ffn_out/kernel.')
_LAYERS = flags.DEFINE_list('layers', None, 'Indices of layers; default: 3,7,11,…, or all if there are at most 7.')
_NUM_BATCHES = flags.DEFINE_integer('num_batches', 16, 'Batches per task; each takes two gradients.', lower_bound=2)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of batches and resampling, independent of training.', lower_bound=0)


def main() -> int:
  if wrong := [i for i in _LAYERS.value or () if not i.isdecimal()]:
    raise UsageError(f'--layers={",".join(_LAYERS.value)}: {wrong[0]!r} is not an index; write --layers=3,7,11.')
  run = _RUN()  # reports mistakes before slow libraries are imported
  from uni_moe_jax.analysis.run_interference import measure_interference
  layers = None if _LAYERS.value is None else [int(i) for i in _LAYERS.value]
  for path in measure_interference(*run, _PARAMETERS.value, layers, _NUM_BATCHES.value, _SEED.value):
    print(path)
  return 0


if __name__ == '__main__':
  cli.run(main)
