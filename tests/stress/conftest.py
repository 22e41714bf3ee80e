"""Every test in this folder is nightly: it kills, starves and damages runs, or generates bad input.

With UNI_MOE_STRESS=10 in the environment there are ten times as many kills and inputs.
"""

import os
import pathlib

import pytest

from tests.stress import preemption
from tests.stress.trainer import Trainer


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.is_relative_to(pathlib.Path(__file__).parent):
      item.add_marker(pytest.mark.nightly)


@pytest.fixture(scope='session')
def stress() -> int:
  """How often the tests do what they do."""
  return int(os.environ.get('UNI_MOE_STRESS', '1'))


@pytest.fixture(scope='session')
def digits_trainer(tmp_path_factory) -> Trainer:
  """Trains configs/small.py for 60 steps, whose programs are compiled."""
  from uni_moe_jax.config.schema import DataConfig
  from uni_moe_jax.data.embedded import build
  folder = tmp_path_factory.mktemp('stress')
  build.build(DataConfig(dir=str(folder)), 1, ['digits'])
  trainer = Trainer(folder, overrides=('train.steps=60',))
  assert trainer.compile(folder / 'compiled.log') == 0, (folder / 'compiled.log').read_text()
  return trainer


@pytest.fixture(scope='session')
def undisturbed(digits_trainer) -> preemption.Undisturbed:
  """A run without faults."""
  return preemption.undisturbed_run(digits_trainer, 'undisturbed')
