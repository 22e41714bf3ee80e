"""Evaluates a trained work directory: python launch/evaluate.py --workdir=runs/quickstart

Runs the evaluators of its config on the newest checkpoint (averaged parameters where the run kept them), prints one table
and writes evaluation.json, samples.json and experts.json. What is evaluated already is not evaluated again without --force.
"""

import json
import pathlib

from absl import flags

from uni_moe_jax import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that launch/train.py wrote.', required=True)
_FORCE = flags.DEFINE_bool('force', False, 'Evaluate again what is evaluated already.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where the prepared data lies, if not where training found it.')


def main() -> int:
  from uni_moe_jax.train import workdir as workdir_lib
  workdir = _WORKDIR.value
  config = workdir_lib.load_config(workdir)  # a wrong folder is told before the libraries below are loaded
  from uni_moe_jax.eval import metrics, suite
  from uni_moe_jax.train import checkpoint
  if _DATA_DIR.value:
    config.data.dir = _DATA_DIR.value
  with checkpoint.Checkpoints(workdir, config.train.keep) as checkpoints:
    step = checkpoints.latest()
    if step is None:
      raise cli.UsageError(f'workdir {workdir} has no checkpoint yet; train it first.')
    if step == suite.evaluated_step(workdir) and not _FORCE.value:
      print(f'step {step} is evaluated already; --force does it again.')
      rows = json.loads(pathlib.Path(workdir, suite.EVALUATION_FILE).read_text())
    else:
      from uni_moe_jax.train import setup
      run = setup.build(config)
      predictor, params = setup.predictor(run, checkpoints)
      suite.write_experts(run.spec.model.spec, params, setup.conditions(run.plan), workdir)
      rows = suite.evaluate(run.plan, run.data, predictor, step, workdir)
  print(metrics.evaluation_table(rows))
  return 0


if __name__ == '__main__':
  cli.run(main)
