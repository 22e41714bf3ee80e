"""launch/interference.py: mistakes are one sentence, at once."""

import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('arguments, said', [
    (('--init', '--step=3'), 'error: --init and --step name two sets of parameters; give one.'),
    (('--layers=3,last',), "error: --layers=3,last: 'last' is no index; write --layers=3,7,11."),
    (('--batches=1',), 'flag --batches=1'),
    (('--init',), 'holds no run (config.json is missing)'),
])
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, arguments, said):
  done = subprocess.run(
      [sys.executable, str(_ROOT / 'launch/interference.py'), f'--workdir={tmp_path / "none"}', *arguments],
      env={**os.environ, 'PYTHONPATH': str(_ROOT)}, capture_output=True, text=True, check=False)
  assert done.returncode == 2, done.stderr
  assert said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
  assert not (tmp_path / 'none').exists()
