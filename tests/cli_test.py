"""Mistakes at the command line: one sentence, no traceback, exit code 2, and at once."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests import tiny
from uni_moe_jax.train import workdir as workdir_lib

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, str(_ROOT / 'launch' / script), *arguments], env={**os.environ, 'PYTHONPATH': str(_ROOT)},
      capture_output=True, text=True, cwd=_ROOT, timeout=60)


def _complaint(done: subprocess.CompletedProcess) -> str:
  """What was said, once it is sure that it is one sentence on stderr and exit code 2."""
  assert done.returncode == 2, done.stderr
  lines = [line for line in done.stderr.splitlines() if line]
  assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
  return lines[0]


def _train(tmp_path, *arguments: str, config: str = 'configs/quickstart.py') -> str:
  return _complaint(_run('train.py', f'--config={config}', f'--workdir={tmp_path / "run"}', *arguments))


@pytest.mark.parametrize('arguments, said', [
    (['--config.model.widht=3'], "--config.model.widht: the config has no field 'widht'. Did you mean \"width\""),
    (['--config.modle.width=3'], "the config has no field 'modle'. Did you mean \"model\""),
    (['--config.model.width=wide'], 'invalid literal for int'),
    (['--config.moe.router=atribute'], "config.moe.router='atribute' is unknown; did you mean 'attribute'?"),
    (['--config.tasks.text.batch=33', '--config.train.accum=2'], 'batch=33 must be a positive multiple of config.train.accum=2; try 32'),
    (['--config.model.heads=3'], 'config.model.width=128 must be a multiple of config.model.heads=3; try 126'),
    (['--config.data.dir=/not/there'], 'Data directory /not/there is not there. Run: python launch/prepare_data.py'),
    (['--stpes=3'], 'stpes'),
    (['steps=3'], "unexpected argument 'steps=3'"),
])
def test_training_says_what_is_wrong(tmp_path, arguments, said):
  assert said in _train(tmp_path, *arguments)


def test_a_config_file_that_is_not_there_names_the_nearest(tmp_path):
  assert "did you mean 'quickstart.py'?" in _train(tmp_path, config='configs/quikstart.py')


def test_an_argument_that_a_config_refuses_is_told_in_its_own_words(tmp_path):
  assert "embedded.py:tok is unknown; did you mean 'task'?" in _train(tmp_path, config='configs/embedded.py:tok')


def test_a_workdir_of_another_config_is_refused(tmp_path):
  workdir_lib.claim_workdir(tmp_path / 'run', tiny.config('shape'), 'print')
  assert 'belongs to a run with another config' in _train(tmp_path, f'--config.data.dir={tmp_path}')


def test_evaluating_a_folder_without_a_run_says_how_to_train(tmp_path):
  said = _complaint(_run('evaluate.py', f'--workdir={tmp_path}'))
  assert 'holds no run' in said and 'launch/train.py' in said


def test_a_missing_workdir_flag_is_named():
  assert '--workdir' in _complaint(_run('train.py', '--config=configs/quickstart.py'))


def test_a_defect_keeps_its_traceback(tmp_path):
  config = tmp_path / 'broken.py'
  config.write_text('def get_config():\n  return 3\n')
  done = _run('train.py', f'--config={config}', f'--workdir={tmp_path / "run"}')
  assert done.returncode == 1 and 'Traceback' in done.stderr
