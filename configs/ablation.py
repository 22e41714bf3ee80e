"""Routers compared: model and tasks of configs/embedded.py for a tenth of its steps.

  python launch/prepare_data.py
  python launch/compare.py --workdir=runs/compare     # all six, see there; or one of them:
  python launch/train.py --config=configs/ablation.py:dense --workdir=runs/dense

The argument is the router (attribute by default). Seed and data order are the same for all. 600 steps, fixed
beforehand for two CPU cores: a step of dense, attribute, task and modality takes about 0.8 s there, one of token and
context 2.3 s. Training all six took 84 minutes; compiling, evaluating and measuring interference and experts 56 more
(docs/results/routers). No figures are promised.
"""

import pathlib
import runpy

import ml_collections

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_EMBEDDED = runpy.run_path(str(pathlib.Path(__file__).with_name('embedded.py')))  # a config is read by path
ROUTERS = _EMBEDDED['ROUTERS']


def get_config(arg: str = 'attribute') -> ml_collections.ConfigDict:
  """Ablation: configs/embedded.py with its schedule shrunk to a tenth."""
  if arg not in ROUTERS:
    raise UsageError(f'configs/ablation.py:{arg} is unknown; {nearest(arg, ROUTERS)}.')
  c = _EMBEDDED['get_config'](arg)
  c.optim.warmup_steps = 60
  c.train.steps = 600
  return c
