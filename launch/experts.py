"""Measure the expert usage of a checkpoint.

  uni-moe experts --workdir=runs/quickstart

Measures, for every layer and router, how much each condition uses each expert, the effective number of experts, and
the overlap of task pairs (uni_moe_jax/analysis/expert_usage.py). Writes experts.json and experts.png; with --step or
--at_init, the names of the files include the checkpoint. Before training:

  uni-moe experts --at_init --config=quickstart --workdir=runs/quickstart
"""

from absl import flags

from uni_moe_jax.analysis import measured_run
from uni_moe_jax.cli import boundary as cli

_RUN = measured_run.define_flags()
_NUM_BATCHES = flags.DEFINE_integer(
    'num_batches', 4, 'Batches for measuring token and context routers; others need none.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the batches, independent of training.', lower_bound=0)


def main() -> int:
  run = _RUN()  # reports mistakes before slow libraries are imported
  from uni_moe_jax.analysis.run_expert_usage import measure_expert_usage
  for path in measure_expert_usage(*run, _NUM_BATCHES.value, _SEED.value):
    print(path)
  return 0


if __name__ == '__main__':
  cli.run(main)
