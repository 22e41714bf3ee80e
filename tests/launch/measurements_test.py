"""launch/interference.py and launch/experts.py report mistakes in one sentence before slow imports."""

import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('script, arguments, message', [
    ('interference', ('--at_init', '--step=3'), 'error: --at_init and --step name two sets of parameters; give one.'),
    ('interference', ('--layers=3,last',), "error: --layers=3,last: 'last' is not an index; write --layers=3,7,11."),
    ('interference', ('--num_batches=1',), 'flag --num_batches=1'),
    ('interference', ('--at_init',), 'holds no run (config.json is missing)'),
    ('experts', ('--at_init', '--step=3'), 'error: --at_init and --step name two sets of parameters; give one.'),
    ('experts', ('--num_batches=0',), 'flag --num_batches=0'),
    ('experts', (), 'holds no run (config.json is missing)'),
])
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, script, arguments, message):
  done = subprocess.run(
      [sys.executable, str(_ROOT / f'launch/{script}.py'), f'--workdir={tmp_path / "none"}', *arguments],
      env={**os.environ, 'PYTHONPATH': str(_ROOT)}, capture_output=True, text=True, check=False)
  assert done.returncode == 2, done.stderr
  assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
  assert not (tmp_path / 'none').exists()
