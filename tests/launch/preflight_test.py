"""The command line of preflight: mistakes are told before anything slow is loaded."""

import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('arguments, said', [
    (['--topology=v5e:16'], "--topology='v5e:16' must give 2 sizes of chips, for example v5e:16x16."),
    (['--topology=cpu:2', '--config.model.num_heads=5'], 'config.model.width=128 must be a multiple of config.model.num_heads=5'),
    (['--topology=cpu:2', '--output=/no/where.json'], '--output=/no/where.json: its folder does not exist'),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, said):
  done = subprocess.run(
      [sys.executable, str(_ROOT / 'launch/preflight.py'), '--config=configs/quickstart.py', *arguments],
      env={**os.environ, 'PYTHONPATH': str(_ROOT)}, capture_output=True, text=True, cwd=_ROOT, timeout=60)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith('error: ') and said in done.stderr and done.stderr.count('\n') == 1
