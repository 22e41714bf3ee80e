"""Flags of uni-moe interference and uni-moe experts: the run that they measure, and at which checkpoint.

This module imports nothing slow, so that mistakes are reported at once.
"""

from collections.abc import Callable

import ml_collections
from absl import flags

from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.train.workdir import check_workdir, load_config
from uni_moe_jax.utils.errors import UsageError

flags.disclaim_key_flags()  # --help of a script lists the flags that it defines through this module


def define_flags() -> Callable[[], tuple[ml_collections.ConfigDict, str, int | None, bool]]:
  """Define --workdir, --config, --step, --at_init and --data_dir; return a function that checks them.

  It returns (config, workdir, step, at_init): the parameters of `step` (None: the newest) or the initial ones.
  """
  workdir = flags.DEFINE_string('workdir', None, 'Work directory of the run.', required=True)
  config = cli.define_config()
  step = flags.DEFINE_integer('step', None, 'Step of a checkpoint; default: the newest.', lower_bound=0)
  at_init = flags.DEFINE_bool('at_init', False, 'Measure the initial parameters; before training with --config.')
  data_dir = flags.DEFINE_string('data_dir', None, 'Directory of the prepared data, if it has moved since training.')

  def parse():
    if at_init.value and step.value is not None:
      raise UsageError('--at_init and --step name two sets of parameters; give one.')
    c = load_config(workdir.value) if config.value is None else cli.config_of(config)
    check_workdir(workdir.value, c)
    if data_dir.value:
      c.data.dir = data_dir.value
    make_plan(c)
    return c, workdir.value, step.value, at_init.value

  return parse
