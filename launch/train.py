"""Trains a config: python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Exit codes: 0 finished, 75 stopped by a signal (the same command continues), 1 error, 2 usage.
"""

from absl import flags

from uni_moe_jax import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, metrics and the report.', required=True)
_COMPILE_ONLY = flags.DEFINE_bool(
    'compile_only', False, 'Compile the step into JAX_COMPILATION_CACHE_DIR and stop; on CPU the run is then faster.')
flags.mark_flag_as_required('config')


def main() -> int:
  from uni_moe_jax import resolve
  from uni_moe_jax.data import storage
  from uni_moe_jax.train import workdir
  # Mistakes are told before the slow libraries below are loaded.
  config = cli.config_of(_CONFIG)
  resolve.check_trains(resolve.resolve(config))
  workdir.claim_workdir(_WORKDIR.value, config)
  storage.check_directory(config.data.dir)
  from uni_moe_jax.train import loop
  return loop.compile_steps(config, _WORKDIR.value) if _COMPILE_ONLY.value else loop.train(config, _WORKDIR.value)


if __name__ == '__main__':
  cli.run(main)
