"""The command line of preflight: usage errors come before slow imports."""

import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('arguments, message', [
    (['--topology=v5e:16'], "--topology='v5e:16' must give 2 sizes of chips, for example v5e:16x16."),
    (['--topology=cpu:2', '--config.model.num_heads=5'],
     'config.model.width=128 must be a multiple of config.model.num_heads=5'),
    (['--topology=cpu:2', '--output=/no/where.json'], '--output=/no/where.json: its folder does not exist'),
])
def test_a_usage_error_is_one_sentence_and_exit_code_2(arguments, message):
  process = subprocess.run(
      [sys.executable, str(_ROOT / 'launch/preflight.py'), '--config=configs/quickstart.py', *arguments],
      env={**os.environ, 'PYTHONPATH': str(_ROOT)}, capture_output=True, text=True, cwd=_ROOT, timeout=60)
  assert (process.returncode, process.stdout) == (2, '')
  assert process.stderr.startswith('error: ') and message in process.stderr and process.stderr.count('\n') == 1
