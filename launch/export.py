"""Exports a trained work directory as a folder that runs without this package.

  python launch/export.py --workdir=runs/quickstart --output=exported --examples=4
  python exported/example.py

Experts are merged for good where the router allows it; --tasks and --fixed_sets say how much is asked of the model, and so how
many kernels are left. --torch adds the published PyTorch layout of a model of which one is left. README.md in the folder is its
model card.
"""

import json
import pathlib

from absl import flags

from uni_moe_jax.utils import cli
from uni_moe_jax.utils.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that launch/train.py wrote.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write; must not exist.', required=True)
_TASKS = flags.DEFINE_list('tasks', [], 'Tasks of the run; all by default.')
_FIXED_SETS = flags.DEFINE_bool('fixed_sets', False,
                                 'Answers are the entries of target sets alone: only retrieval still encodes texts.')
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], "Of products; by default the run's. Parameters stay float32.")
_EXAMPLES = flags.DEFINE_integer('examples', 0, 'Examples of each task that go along, with the answers; not of retrieval and masked '
                                 'words. Is your data public?', lower_bound=0)
_TORCH = flags.DEFINE_bool('torch', False, 'Adds model.pth, the layout of the published dense model (one condition only).')


def main() -> int:
  from uni_moe_jax.config.plan import make_plan
  from uni_moe_jax.train import workdir as workdir_lib
  workdir = pathlib.Path(_WORKDIR.value)
  config = workdir_lib.load_config(workdir)  # mistakes are told before the libraries below are loaded
  if pathlib.Path(_OUTPUT.value).exists():
    raise UsageError(f'--output={_OUTPUT.value} is there already; give another, or remove it.')
  from uni_moe_jax.eval import suite
  from uni_moe_jax.export import artifact, contents
  from uni_moe_jax.train import checkpoint, loop
  from uni_moe_jax.train import run as train_run
  with checkpoint.Checkpoints(workdir, max_to_keep=None) as checkpoints:
    step = checkpoints.latest() if make_plan(config).tasks else 0
    if step is None:
      raise UsageError(f'workdir {workdir} has no checkpoint yet; train it first.')
    run = train_run.build(config)
    _, params = train_run.predictor(run, checkpoints)
  found = contents.collect(
      run.spec.model.spec, params, run.plan, run.data, tasks=_TASKS.value, fixed_sets=_FIXED_SETS.value, dtype=_DTYPE.value,
      examples=_EXAMPLES.value)
  evaluated = step == suite.evaluated_step(workdir)
  rows = json.loads((workdir / suite.EVALUATION_FILE).read_text()) if evaluated else []
  artifact.write(_OUTPUT.value, found, workdir_lib.provenance(workdir, step) | {'exported by commit': loop.commit()}, rows,
                 _TORCH.value)
  print(f'{_OUTPUT.value}: step {step}, {found.summary()}')
  return 0


if __name__ == '__main__':
  cli.run(main)
