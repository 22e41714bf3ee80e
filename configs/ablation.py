"""Router ablation: model and tasks of configs/embedded.py for a tenth of its steps.

  uni-moe prepare-data
  uni-moe sweep --sweep=routers --workdir=runs/routers     # all six routers; or one of them:
  uni-moe train --config=ablation:router=dense --workdir=runs/dense

Argument: router=attribute (default), task, modality, token, context or dense. Seed and data order are the same for all.
600 steps, a number chosen in advance for two CPU cores: a step of dense, attribute, task and modality takes about 0.8 s
there, a step of token and context 2.3 s. Training all six took 84 minutes; compilation, evaluation, interference and
expert usage took 56 more. docs/results/routers has the scores of all six.
"""

import pathlib
import runpy

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """configs/embedded.py with a tenth of its schedule."""
  embedded = runpy.run_path(str(pathlib.Path(__file__).with_name('embedded.py')))  # config files are read by path
  c = embedded['get_config'](arg, file=__file__)
  c.optim.warmup_steps = 60
  c.train.steps = 600
  return c
