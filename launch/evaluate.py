"""Evaluates a trained work directory: python launch/evaluate.py --workdir=runs/quickstart

Or asks a run something that it was not trained for, untuned, and keeps the answers in a work directory of their own:

  python launch/evaluate.py --config=configs/zero_shot.py:run=runs/quickstart,task=digits --workdir=runs/digits

Runs the evaluators of its config on the newest checkpoint (averaged parameters where the run kept them), prints one table
and writes evaluation.json, samples.json and, unless routers look at tokens, experts.json and experts.png. What is evaluated
already is not evaluated again without --force. All devices take part; on several hosts the same command runs in every process,
with --distributed.
"""

import json
import pathlib

from absl import flags

from uni_moe_jax.parallel import distributed
from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that launch/train.py wrote; with --config, one to write to.', required=True)
_BEST = flags.DEFINE_bool('best', False, 'Ask the checkpoint with the lowest loss config.train.best_metric, not the newest.')
_FORCE = flags.DEFINE_bool('force', False, 'Evaluate again what is evaluated already.')
_CLUSTER = distributed.define_flags()
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where the prepared data lies, if not where training found it.')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.train import workdir as workdir_lib
  workdir = _WORKDIR.value
  # Mistakes are told before the libraries below are loaded, and before other processes are waited for.
  cluster = _CLUSTER()
  if _CONFIG.present:
    config = cli.config_of(_CONFIG)
    workdir_lib.claim_workdir(workdir, config)
  else:
    config = workdir_lib.load_config(workdir)
  plan = make_plan(config)
  writes = distributed.initialize(cluster)
  from uni_moe_jax.eval import metrics, suite
  from uni_moe_jax.train import checkpoint
  if _DATA_DIR.value:
    config.data.dir = _DATA_DIR.value
  with checkpoint.Checkpoints(workdir, max_to_keep=None, best_metric=config.train.best_metric) as checkpoints:
    if not plan.tasks:  # it answers with the run that it starts from, which may go on
      answers, step, lacks = config.train.init, workdir_lib.saved_step(config.train.init), 'checkpoint yet; train it first'
    elif _BEST.value:
      answers, step, lacks = workdir, checkpoints.best(), 'best checkpoint; train it with --config.train.best_metric=loss/total, for example'
    else:
      answers, step, lacks = workdir, checkpoints.latest(), 'checkpoint yet; train it first'
    if step is None:
      raise UsageError(f'workdir {answers} has no {lacks}.')
    # The folder has an evaluation, and so a config, of which claim_workdir lets the evaluators alone be others.
    if (step == suite.evaluated_step(workdir) and not _FORCE.value
        and config.evaluators.to_dict() == workdir_lib.load_config(workdir).evaluators.to_dict()):
      print(f'step {step} is evaluated already; --force does it again.')
      rows = json.loads(pathlib.Path(workdir, suite.EVALUATION_FILE).read_text())
    else:
      from uni_moe_jax.analysis import run_expert_usage
      from uni_moe_jax.train import run as train_run
      run = train_run.build(config)
      if _CONFIG.present:
        workdir_lib.claim_workdir(workdir, config, run.data.fingerprint, writes)
      predictor, params = train_run.predictor(run, checkpoints, step)
      run_expert_usage.write_after_evaluation(run, params, step, workdir)
      rows = suite.evaluate(run.plan, run.data, predictor, step, workdir, writes)
  print(metrics.evaluation_table(rows))
  return 0


if __name__ == '__main__':
  cli.run(main)
