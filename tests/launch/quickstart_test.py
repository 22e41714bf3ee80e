"""quickstart.sh: its phases, their order, signals and exit codes, with stand-ins for the commands."""

import os
import pwd
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers import stand_in
from tests.helpers.processes import ROOT

# Appends its arguments to `log`, then follows the file with its name: an exit code, 'sleep', or 'wait' (like training:
# exit code 75 on SIGTERM).
_STAND_IN = stand_in.END + '''
name = pathlib.Path(sys.argv[0]).stem
with open('log', 'a') as log:
  log.write(' '.join([name, *sys.argv[1:]]) + '\\n')
end(pathlib.Path(name).read_text() if pathlib.Path(name).exists() else 0)
'''


@pytest.fixture(name='root')
def _root(tmp_path):
  (tmp_path / 'launch').mkdir()
  for name in ('quickstart.sh', 'env.sh'):
    shutil.copy(ROOT / 'launch' / name, tmp_path / 'launch')
  for name in ('prepare_data', 'train', 'evaluate', 'report', 'serve'):
    (tmp_path / 'launch' / f'{name}.py').write_text(_STAND_IN)
  return tmp_path


# A shell cannot trap a signal that it inherits as ignored, for example from nohup or background jobs, such as tests.
_WITH_SIGNALS = '''
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
  signal.signal(number, signal.SIG_DFL)
os.execvp('bash', ['bash', *sys.argv[1:]])
'''


def _start(root, *arguments, **environment):
  inherited = {k: v for k, v in os.environ.items() if k not in ('UNI_MOE_DATA', 'WORKDIR')}
  return subprocess.Popen(
      [sys.executable, '-S', '-c', _WITH_SIGNALS, 'launch/quickstart.sh', *arguments], cwd=root, text=True,
      env=inherited | {'UNI_MOE_PYTHON': sys.executable, 'HOME': str(root)} | environment, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, start_new_session=True)


def _run(root, *arguments, **environment):
  process = _start(root, *arguments, **environment)
  output, errors = process.communicate(timeout=30)
  return process.returncode, output, errors


def test_runs_every_phase_in_order_and_names_the_report(root):
  code, output, errors = _run(root, '--config.seed=3')
  train = ('--config=configs/quickstart.py --workdir=runs/quickstart '
           f'--config.data.dir={root}/.cache/uni_moe_jax --compile_separately --config.seed=3')
  assert (code, errors) == (0, '')
  assert (root / 'log').read_text().splitlines() == [
      f'prepare_data --data_dir={root}/.cache/uni_moe_jax', f'train {train}',
      'evaluate --workdir=runs/quickstart', 'report --workdir=runs/quickstart',
      'serve --workdir=runs/quickstart --export_only']
  durations = [line for line in output.splitlines() if line.endswith(' s')]
  assert [line.split(':')[0] for line in durations] == [
      '== 1 environment', '== 2 data', '== 3 train', '== 4 evaluate', '== 5 report', '== 6 export']
  *_, report, page = output.splitlines()
  assert report.endswith('Report: runs/quickstart/report.html')
  assert page == f'Draw, and the model answers: {sys.executable} launch/serve.py --workdir=runs/quickstart'


def test_folders_come_from_the_environment(root):
  _run(root, UNI_MOE_DATA='/some where', WORKDIR='my run')
  log = (root / 'log').read_text()
  parts = ('data_dir=/some where\n', 'data.dir=/some where', '--workdir=my run')
  assert [log.count(part) for part in parts] == [1, 1, 4]


@pytest.mark.parametrize('name, code, phase', [
    ('prepare_data', 1, '2 data'), ('train', 2, '3 train'), ('evaluate', 1, '4 evaluate')])
def test_a_failed_phase_ends_the_run_with_its_exit_code(root, name, code, phase):
  (root / name).write_text(str(code))
  got, _, errors = _run(root)
  assert (got, errors) == (code, f'Phase {phase} failed with exit code {code}.\n')
  assert (root / 'log').read_text().splitlines()[-1].startswith(name)


def test_preempted_training_is_reported_as_resumable(root):
  (root / 'train').write_text('75')
  assert _run(root)[::2] == (75, 'Stopped in phase 3 train; the same command continues from here.\n')


@pytest.mark.parametrize('number, name', [
    (signal.SIGINT, 'Ctrl-C'), (signal.SIGTERM, 'SIGTERM'), (signal.SIGHUP, 'SIGHUP')])
@pytest.mark.parametrize('send', [os.kill, os.killpg], ids=['to the script', 'to everybody'])
def test_a_signal_reaches_training_once_and_waits_for_it(root, number, name, send):
  (root / 'train').write_text('wait')
  process = _start(root)
  stand_in.wait_for(root / 'started')
  send(process.pid, number)
  _, errors = process.communicate(timeout=30)
  assert process.returncode == 75
  assert errors == f'Stopped by {name} in phase 3 train; the same command continues from here.\n'
  assert (root / 'signals').read_text() == '1'
  assert 'evaluate' not in (root / 'log').read_text()


def test_a_signal_ends_a_phase_that_cannot_save(root):
  (root / 'prepare_data').write_text('sleep')
  process = _start(root)
  stand_in.wait_for(root / 'started')
  process.terminate()
  _, errors = process.communicate(timeout=30)
  assert process.returncode == 75 and 'Stopped by SIGTERM in phase 2 data' in errors


def test_an_unusable_interpreter_is_named(root):
  code, _, errors = _run(root, UNI_MOE_PYTHON='/no/python')
  assert code == 1 and errors.startswith('UNI_MOE_PYTHON=/no/python is not an executable program.')


def test_help_runs_nothing(root):
  code, output, _ = _run(root, '--help')
  assert code == 0 and output.startswith('Usage: ./launch/quickstart.sh') and not (root / 'log').exists()


@pytest.mark.parametrize('home', ['', None])
def test_without_home_the_folder_of_the_user_is_used(root, home):
  (root / 'home.sh').write_text('. launch/env.sh; echo "$HOME $JAX_COMPILATION_CACHE_DIR"')
  environment = {'PATH': os.environ['PATH'], **({} if home is None else {'HOME': home})}
  done = subprocess.run(['bash', '-eu', 'home.sh'], cwd=root, env=environment, capture_output=True, text=True)
  of_user = pwd.getpwuid(os.getuid()).pw_dir
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.startswith(f'{of_user} {of_user}/.cache/uni_moe_jax/jax/')
