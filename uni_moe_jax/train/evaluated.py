"""Which checkpoint an evaluation is about."""

import ml_collections

from uni_moe_jax.config.plan import Plan
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.utils.errors import UsageError


def find_step(config: ml_collections.ConfigDict, plan: Plan, checkpoints: Checkpoints, workdir: str, best: bool) -> int:
  """The step of the parameters to evaluate; best: that with the best `train.best_metric` instead of the newest.

  Of a plan without training, which is evaluated zero-shot, it is that of the run in `train.init`.

  Raises:
    UsageError: there is no such checkpoint.
  """
  source, missing = workdir, 'checkpoint yet; train it first'
  if not plan.tasks:
    source, step = config.train.init, workdir_lib.saved_step(config.train.init)
  elif best:
    step = checkpoints.best()
    missing = 'best checkpoint; train it with --config.train.best_metric=loss/total, for example'
  else:
    step = checkpoints.latest()
  if step is None:
    raise UsageError(f'workdir {source} has no {missing}.')
  return step
