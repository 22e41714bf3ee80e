"""Evaluate a trained work directory.

  uni-moe evaluate --workdir=runs/quickstart
  uni-moe evaluate --config=zero_shot:run=runs/quickstart,task=digits --workdir=runs/digits

The second command evaluates a run zero-shot on another task, in a work directory of its own.

Runs the evaluators of the config on the newest checkpoint (averaged parameters if the run has them), prints the main
metric of each and writes evaluation.json with all of them, samples.json and, for routers by condition, experts.json and
experts.png. A step is not evaluated again with the same evaluators and data unless --force is given. Uses all devices;
on several hosts, run it on each with --distributed=auto.
"""

from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.parallel import distributed

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Work directory of a run; with --config, a new one to write to.', required=True)
_BEST = flags.DEFINE_bool(
    'best', False, 'Evaluate the checkpoint with the best config.train.best_metric, not the newest.')
_FORCE = flags.DEFINE_bool('force', False, 'Repeat a finished evaluation.')
_CLUSTER = distributed.define_flags()
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of the prepared data; default: the one of training.')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.train import process_checks
  from uni_moe_jax.train import workdir as workdir_lib
  workdir, cluster = _WORKDIR.value, _CLUSTER()
  writes = distributed.initialize(cluster)
  process_checks.check_folder(cluster, workdir, create=_CONFIG.present)
  # Mistakes are reported before the slow libraries below are imported.
  config = cli.config_of(_CONFIG) if _CONFIG.present else workdir_lib.load_config(workdir)
  process_checks.check_config(config, cluster)
  if _CONFIG.present:
    workdir_lib.check_workdir(workdir, config)
  plan = make_plan(config)
  from uni_moe_jax.eval import headline, suite
  from uni_moe_jax.train import checkpoint
  from uni_moe_jax.train import run as train_run
  config.data.dir = _DATA_DIR.value or config.data.dir
  with checkpoint.Checkpoints(workdir, max_to_keep=None, best_metric=config.train.best_metric) as checkpoints:
    step = train_run.find_step(config, plan, checkpoints, workdir, _BEST.value)
    model = workdir_lib.model_fingerprint(workdir, config.train.init, step)
    rows = [] if _FORCE.value else suite.finished_rows(workdir, plan, step, config, model)
    if rows:
      print(f'step {step} is already evaluated; --force evaluates it again.')
    else:
      from uni_moe_jax.analysis import run_expert_usage
      run = (train_run.build if _CONFIG.present else train_run.build_to_read)(config, workdir=workdir, trains=False)
      if _CONFIG.present:
        workdir_lib.claim_workdir(workdir, config, run.data.fingerprint, writes, extends=not plan.tasks)
      params, step = train_run.read_params(run, checkpoints, step if _BEST.value else None)
      model = workdir_lib.model_fingerprint(workdir, config.train.init, step)
      run_expert_usage.write_after_evaluation(run, params, step, workdir)
      rows = suite.evaluate(run.plan, run.data, run.predictor(params), step, workdir, writes, model)
  print(headline.table(rows))
  return 0


if __name__ == '__main__':
  cli.run(main)
