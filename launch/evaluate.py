"""Evaluate a trained work directory.

  uni-moe evaluate --workdir=runs/quickstart
  uni-moe evaluate --config=zero_shot:run=runs/quickstart,task=digits --workdir=runs/digits

The second command evaluates a run zero-shot on another task, in a work directory of its own.

Runs the evaluators of the config on the newest checkpoint (averaged parameters if the run has them), prints the main
metric of each and writes evaluation.json with all of them, evaluation_examples.npz with the scores of single examples,
samples.json and, for routers by condition, experts.json and experts.png. A finished evaluation is not repeated without
--force. All devices take part; on several hosts run the same command in every process, with --distributed=auto.
"""

from absl import flags

from uni_moe_jax.parallel import distributed, shared_folder
from uni_moe_jax.utils import cli, files, storage
from uni_moe_jax.utils.errors import UsageError

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Work directory of a run; with --config, a new one to write to.', required=True)
_BEST = flags.DEFINE_bool(
    'best', False, 'Evaluate the checkpoint with the best config.train.best_metric, not the newest.')
_FORCE = flags.DEFINE_bool('force', False, 'Repeat a finished evaluation.')
_CLUSTER = distributed.define_flags()
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of the prepared data, if not that of training.')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.train import workdir as workdir_lib
  workdir = _WORKDIR.value
  cluster = _CLUSTER()
  writes = distributed.initialize(cluster)
  shared_folder.check(cluster, workdir, create=_CONFIG.present)
  # Mistakes are reported before the slow libraries below are imported.
  if _CONFIG.present:
    config = cli.config_of(_CONFIG)
    workdir_lib.claim_workdir(workdir, config)
  else:
    config = workdir_lib.load_config(workdir)
  plan = make_plan(config)
  from uni_moe_jax.eval import headline, suite
  from uni_moe_jax.train import checkpoint
  if _DATA_DIR.value:
    config.data.dir = _DATA_DIR.value
  with checkpoint.Checkpoints(workdir, max_to_keep=None, best_metric=config.train.best_metric) as checkpoints:
    missing = 'checkpoint yet; train it first'
    if not plan.tasks:  # zero-shot: the parameters are those of the run in train.init
      source, step = config.train.init, workdir_lib.saved_step(config.train.init)
    elif _BEST.value:
      source, step = workdir, checkpoints.best()
      missing = 'best checkpoint; train it with --config.train.best_metric=loss/total, for example'
    else:
      source, step = workdir, checkpoints.latest()
    if step is None:
      raise UsageError(f'workdir {source} has no {missing}.')
    # An evaluated folder has a config; claim_workdir allows no other difference than the evaluators.
    if (step == suite.evaluated_step(workdir) and not _FORCE.value
        and config.evaluators.to_dict() == workdir_lib.load_config(workdir).evaluators.to_dict()):
      print(f'step {step} is already evaluated; --force repeats it.')
      rows = files.read_json(storage.path(workdir) / suite.EVALUATION_FILE)
    else:
      from uni_moe_jax.analysis import run_expert_usage
      from uni_moe_jax.train import run as train_run
      run = train_run.build(config)
      if _CONFIG.present:
        workdir_lib.claim_workdir(workdir, config, run.data.fingerprint, writes)
      predictor, params = train_run.predictor(run, checkpoints, step if _BEST.value else None)
      step = checkpoints.latest() if plan.tasks and not _BEST.value else step
      run_expert_usage.write_after_evaluation(run, params, step, workdir)
      rows = suite.evaluate(run.plan, run.data, predictor, step, workdir, writes)
  print(headline.table(rows))
  return 0


if __name__ == '__main__':
  cli.run(main)
