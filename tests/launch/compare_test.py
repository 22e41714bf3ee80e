"""launch/compare.py: mistakes, failures and signals with stand-ins for the commands; then, slowly, a whole tiny comparison."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import in_process, stand_in, tiny

_ROOT = pathlib.Path(__file__).resolve().parents[2]

# Appends its name and workdir to `log`, and ends with the code in a file that has its name; 'wait' there: until a signal comes.
_STAND_IN = '''
import pathlib, signal, sys, time
name = 'compile' if '--compile_only' in sys.argv else pathlib.Path(sys.argv[0]).stem
root = pathlib.Path(sys.argv[0]).parents[1].absolute()
where = pathlib.Path(next(a for a in sys.argv if a.startswith('--workdir=')).partition('=')[2])
with open(root / 'log', 'a') as log:
  log.write(f'{name} {where.name}\\n')
''' + stand_in.ENDS + '''
sys.exit(int(does))
'''
_CONFIG = '''
from tests.helpers import tiny
from uni_moe_jax import config
def get_config(router):
  if router not in ('dense', 'task', 'token'):
    raise ValueError(f'c.py:{{router}} is unknown.')
  c = tiny.config('shape', 'caption', data_dir={data!r})
  c.moe.router = router
  c.train.steps = 3
  c.evaluators.shape = config.evaluator('classification', 'shape', split='train')
  return c
'''


def _command(root, script, *arguments):
  return [script, f'--workdir={root / "out"}', f'--config={root / "c.py"}', *arguments]


def _start(root, script, *arguments):
  # One device: the batches of these tasks do not divide by more.
  env = {**os.environ, 'PYTHONPATH': str(_ROOT), 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  return subprocess.Popen(
      [sys.executable, *map(str, _command(root, script, *arguments))], cwd=root, env=env,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _run(root, script, *arguments):
  process = _start(root, script, *arguments)
  output, errors = process.communicate(timeout=900)
  return process.returncode, output, errors


@pytest.fixture(name='root')
def _root(tmp_path):
  (tmp_path / 'launch').mkdir()
  shutil.copy(_ROOT / 'launch' / 'compare.py', tmp_path / 'launch')
  for name in ('train', 'evaluate', 'interference', 'experts', 'report'):
    (tmp_path / 'launch' / f'{name}.py').write_text(_STAND_IN)
  (tmp_path / 'c.py').write_text(_CONFIG.format(data=tiny.data_dir()))
  return tmp_path


def test_a_failure_is_reported_others_go_on_and_the_same_command_repairs_it(root, capfd):
  (root / 'evaluate').write_text('3')
  command = _command(root, root / 'launch/compare.py', '--routers=dense,task')
  assert in_process.run(*command) == 1
  output, errors = capfd.readouterr()
  assert errors == ''.join(f'error: {r}: evaluate failed with exit code 3.\n' for r in ('dense', 'task'))
  steps = ['interference', 'compile', 'train', 'evaluate', 'interference', 'report']
  log = [*(f'{s} dense' for s in steps), *(f'{s} task' for s in (*steps[:5], 'experts', 'report'))]
  assert (root / 'log').read_text().splitlines() == log
  assert '| task | 0 |' in output and 'evaluate failed with exit code 3' in output

  (root / 'evaluate').unlink()
  assert in_process.run(*command) == 0
  assert capfd.readouterr().err == ''
  assert (root / 'log').read_text().splitlines() == [*log, 'evaluate dense', 'evaluate task']
  assert in_process.run(*command, '--batches=3') == 2
  assert 'batches: 16 → 3' in capfd.readouterr().err


def test_a_signal_reaches_the_command_and_the_comparison_can_go_on(root):
  (root / 'train').write_text('wait')
  process = _start(root, root / 'launch/compare.py', '--routers=dense')
  end = time.monotonic() + 60
  while not (root / 'started').exists():
    assert time.monotonic() < end and process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=30)
  assert process.returncode == 75 and not (root / 'out/results').exists()


@pytest.mark.parametrize('arguments, said', [
    (['--routers=dense,tokens'], 'error: c.py:tokens is unknown.'), (['--routers='], '--routers is empty'),
    (['--config=configs/none.py'], '--config=configs/none.py: there is no such file'),
    (['--override=train.stps=20'], 'error: --config.train.stps: the config has no field \'stps\'. Did you mean "steps"')])
def test_mistakes_are_told_before_anything_runs(root, arguments, said):
  code, _, errors = _run(root, root / 'launch/compare.py', *arguments)
  assert code == 2 and said in errors and errors.count('\n') == 1, errors
  assert not (root / 'log').exists() and not (root / 'out').exists()


@pytest.mark.nightly
def test_a_whole_comparison(root):
  code, output, errors = _run(root, _ROOT / 'launch/compare.py', '--routers=dense,token', '--batches=2')
  assert code == 0, errors[-3000:] + output[-3000:]
  out = root / 'out/results'
  assert sorted(p.name for p in out.iterdir()) == [
      'experts_token.png', 'interference_dense.png', 'interference_token.png', 'results.json', 'results.md']
  found = json.loads((out / 'results.json').read_text())
  dense, token = found['runs']
  assert [r['steps'] for r in found['runs']] == [3, 3] and not found['breaches']
  assert dense['parameters']['total'] < token['parameters']['active'] < token['parameters']['total']
  for r in found['runs']:
    assert [m['checkpoint'] for m in r['interference'].values()] == ['init', 'step 3']
    assert r['interference']['before']['part'] != r['interference']['after']['part']
    assert {row['evaluator'] for row in r['evaluation']} == {'shape'}
  assert dense['experts'] is None and 1 < token['experts']['effective']['mlp'] <= 4
  typed = (found['command'], found['config'])  # here they hold the folder: a person types shorter ones
  text = (out / 'results.md').read_text()
  assert str(root) not in text.replace(typed[0], '').replace(typed[1], '')
