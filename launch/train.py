"""Train a config, or continue a run.

  uni-moe train --config=quickstart --workdir=runs/quickstart

On several hosts, start the same command once per process with --distributed=auto, as local_processes.sh, tpu_pod.sh and
slurm.sbatch in the folder launch of the repository do.

Exit codes: 0 finished, 75 stopped by a signal (the same command continues), 1 error, 2 wrong usage.
"""

import contextlib
import sys

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.io import files, storage
from uni_moe_jax.parallel import distributed
from uni_moe_jax.utils import heap
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.exit_codes import PREEMPTED

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder for checkpoints and metrics; a run in it continues.', required=True)
_COMPILE_ONLY = flags.DEFINE_bool(
    'compile_only', False, 'Compile the step into the folder JAX_COMPILATION_CACHE_DIR (environment) and stop.')
_COMPILE_SEPARATELY = flags.DEFINE_bool(
    'compile_separately', False, 'On CPU, compile in another process: compiling slows the later steps of a process. '
    'Ignored on accelerators.')
_CLUSTER = distributed.define_flags()
_ALLOW_VERSION_MISMATCH = flags.DEFINE_bool(
    'allow_version_mismatch', False, 'Continue a run although its package versions have changed.')
flags.mark_flag_as_required('config')


def main() -> int:
  if not _COMPILE_ONLY.value:
    heap.share_arena()
  with cli.exit_on_signals(PREEMPTED), contextlib.ExitStack() as stack:  # signals: until the loop handles them
    from uni_moe_jax.config.plan import make_plan
    from uni_moe_jax.data.shards import file_dataset
    from uni_moe_jax.train import process_checks, workdir
    from uni_moe_jax.train.hang_detection import START, HangDetector
    # Mistakes are reported before the slow libraries below are imported.
    config = cli.config_of(_CONFIG)
    make_plan(config).check_trains()
    cluster = _CLUSTER()
    separately = _COMPILE_SEPARATELY.value and not _COMPILE_ONLY.value
    if separately and cluster is not None:
      raise UsageError('--compile_separately is for a run of one process; remove it.')
    distributed.initialize(cluster)
    buckets = {START: _WORKDIR.value} if storage.is_remote(_WORKDIR.value) else {}
    with HangDetector(config.train.hang_timeout, buckets) as detector, detector.phase(START):  # a disk may hang
      if cluster is None and not _COMPILE_ONLY.value:
        files.check_writable(_WORKDIR.value, '--workdir')
      process_checks.check_folder(cluster, _WORKDIR.value, create=True)
      process_checks.check_config(config, cluster)
      workdir.check_workdir(_WORKDIR.value, config, extends=True)
      workdir.check_versions(_WORKDIR.value, _ALLOW_VERSION_MISMATCH.value, writes=False)
      file_dataset.check_directory(config.data.dir)
      separately = separately and not workdir.is_finished(_WORKDIR.value, config.train.steps)
    compiler = None
    if separately:
      from uni_moe_jax.train import compiler_process
      if compiler := compiler_process.start([sys.executable, __file__, *sys.argv[1:], '--compile_only']):
        stack.enter_context(compiler)
    from uni_moe_jax.train import loop
    if _COMPILE_ONLY.value:
      return loop.compile_steps(config, _WORKDIR.value)
    return loop.train(config, _WORKDIR.value, compiler=compiler,
                      allow_version_mismatch=_ALLOW_VERSION_MISMATCH.value)


if __name__ == '__main__':
  cli.run(main)
