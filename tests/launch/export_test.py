"""launch/export.py: from a trained run to captions in an environment that has never seen this package."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from tests import tiny
from uni_moe_jax.train import loop

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _export(*arguments: str) -> subprocess.CompletedProcess:
  env = {**os.environ, 'PYTHONPATH': str(_ROOT), 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  return subprocess.run([sys.executable, str(_ROOT / 'launch/export.py'), *arguments], env=env, capture_output=True, text=True,
                        cwd=_ROOT, timeout=600, check=False)


def test_mistakes_end_in_one_sentence(tmp_path):
  for arguments, said in (
      ([f'--workdir={tmp_path}/none', f'--output={tmp_path}/out'], 'holds no run (config.json is missing)'),
      ([f'--workdir={tmp_path}'], 'output'), ([f'--output={tmp_path}/out'], 'workdir')):
    done = _export(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count('\n') == 1 and said in done.stderr, done.stderr
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_the_readmes_five_lines_print_captions_in_a_fresh_environment(tmp_path):
  c = tiny.config('shape', 'caption', data_dir=tiny.data_dir())
  c.train.update(dict(steps=1))
  assert loop.train(c, str(tmp_path / 'run'), jax.devices()[:1]) == loop.FINISHED
  done = _export(f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "exported"}', '--examples=2')
  assert done.returncode == 0, done.stderr
  assert 'step 1, 4 kernels per projection for ' in done.stdout and ' 2 tasks' in done.stdout

  subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'serve'], check=True)
  python = tmp_path / 'serve/bin/python'
  install = subprocess.run(
      [python, '-m', 'pip', 'install', '-q', '-c', _ROOT / 'constraints.txt', 'jax', 'flatbuffers', 'sentencepiece'],
      capture_output=True, text=True, check=False)
  if install.returncode:
    pytest.skip(f'no packages can be installed here: {install.stderr[-300:]}')
  listed = subprocess.run([python, '-m', 'pip', 'list'], capture_output=True, text=True, check=True).stdout
  assert 'flax' not in listed and 'uni-moe-jax' not in listed
  env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
  shown = subprocess.run([python, 'example.py'], capture_output=True, text=True, cwd=tmp_path / 'exported', env=env, check=False)
  assert shown.returncode == 0, shown.stderr
  lines = shown.stdout.splitlines()
  assert sorted(line.partition(':')[0] for line in lines) == ['caption', 'shape']
  assert all(line.endswith('; as at export') for line in lines), lines
