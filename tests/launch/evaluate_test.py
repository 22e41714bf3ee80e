"""uni-moe evaluate: whose scores it prints."""

import json

import pytest

from tests.helpers import in_process, saved_run, tiny
from tests.helpers.processes import ROOT
from uni_moe_jax import config as config_lib
from uni_moe_jax.train import workdir as workdir_lib

_CONFIG = '''
import sys
sys.path.insert(0, {root!r})
from tests.launch import evaluate_test


def get_config():
  return evaluate_test.config({data_dir!r})
'''


def config(data_dir):
  c = tiny.config('package', data_dir=data_dir)
  c.model.num_layers = 1
  c.evaluators.package = config_lib.evaluator('classification', 'package', split='train')
  return c


@pytest.fixture(name='workdir')
def _workdir(tmp_path):
  saved_run.save(tmp_path / 'run', config(tiny.data_dir()), step=2)
  return tmp_path / 'run'


def test_a_tuned_run_is_evaluated_after_its_parent_was_moved(workdir, tmp_path):
  c = config(tiny.data_dir())
  c.train.init = str(workdir)
  saved_run.save(tmp_path / 'tuned', c, step=3)
  workdir.rename(tmp_path / 'moved')
  assert in_process.run(ROOT / 'launch/evaluate.py', f'--workdir={tmp_path / "tuned"}') == 0
  assert json.loads((tmp_path / 'tuned/evaluation.json').read_text())[0]['step'] == 3


def test_a_run_is_evaluated_by_its_own_evaluators_after_an_evaluation_by_others(workdir, tmp_path, capfd):
  file = tmp_path / 'config.py'
  file.write_text(_CONFIG.format(root=str(ROOT), data_dir=tiny.data_dir()))

  def evaluated(*arguments):
    """(Whether it was evaluated now, number of examples of the printed scores)."""
    assert in_process.run(ROOT / 'launch/evaluate.py', f'--workdir={workdir}', *arguments) == 0
    counts = {row['count'] for row in json.loads((workdir / 'evaluation.json').read_text())}
    return 'is already evaluated' not in capfd.readouterr().out, *counts

  few = f'--config={file}', '--config.evaluators.package.num_examples=3'
  assert evaluated(*few) == (True, 3) and evaluated(*few) == (False, 3)
  assert workdir_lib.load_config(workdir).evaluators.package.num_examples == 0  # an evaluation is no restart
  assert evaluated() == (True, 16) and evaluated() == (False, 16)
