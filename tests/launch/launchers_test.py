"""The scripts that start a run on many hosts: dry runs, errors and signals, with stand-ins for launch/train.py."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers import processes, stand_in
from tests.helpers.processes import ROOT

_SCRIPTS = ('local_processes.sh', 'tpu_pod.sh', 'slurm.sbatch')
_TRAIN = ('--config=configs/quickstart.py:x y', '--workdir=/runs/it\'s "one"')


def _run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
  kept = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM', 'UNI_MOE', 'XLA_FLAGS', 'JAX_PLATFORMS'))}
  return subprocess.run([str(ROOT / 'launch' / script), *arguments], env={**kept, **environment}, capture_output=True,
                        text=True, timeout=30)


def _dry(script: str, *arguments: str, **environment: str) -> list[list[str]]:
  """Return the words of every line of a dry run."""
  done = _run(script, *arguments, **environment)
  assert (done.returncode, done.stderr) == (0, '')
  return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize('script', _SCRIPTS)
def test_bash_can_parse_the_script(script):
  path = ROOT / 'launch' / script
  assert re.match(r'#!/usr/bin/env bash\n.*set -euo pipefail', path.read_text(), re.DOTALL) and os.access(path, os.X_OK)
  assert subprocess.run(['bash', '-n', str(path)], capture_output=True).returncode == 0


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not installed')
@pytest.mark.parametrize('script', _SCRIPTS)
def test_shellcheck_has_no_findings(script):
  done = subprocess.run(['shellcheck', '-x', str(ROOT / 'launch' / script)], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script, arguments, message', [
    ('local_processes.sh', ['--process', '2'], 'unknown option --process'),
    ('local_processes.sh', ['--processes', 'two', '--', 'a'], '--processes two and --devices 1 must be positive'),
    ('local_processes.sh', ['--processes', '2'], 'no arguments; give the arguments of train.py'),
    ('tpu_pod.sh', ['--zone', 'z', '--', '--config=c.py'], 'give --name, --zone and, after --, arguments of train.py'),
    ('tpu_pod.sh', ['--name', 'n', '--zone', 'z', '--create', 'v5litepod-16', '--', 'a'], 'needs --version'),
    ('slurm.sbatch', ['--dry_run'], 'no arguments; give the arguments of train.py'),
    ('slurm.sbatch', ['--evaluate'], 'no arguments; give the arguments of evaluate.py'),
])
def test_a_mistake_is_reported_and_runs_nothing(script, arguments, message):
  done = _run(script, *arguments)
  assert (done.returncode, done.stdout) == (2, '')
  assert message in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('script, options', [
    ('local_processes.sh', ['--processes', '--devices', '--port']),
    ('tpu_pod.sh', ['--name', '--zone', '--project', '--create', '--version', '--service_account', '--before'])])
def test_an_option_without_a_value_is_named(script, options):
  help_text = _run(script, '--help').stdout
  for option in options:
    assert f'{option} ' in help_text
    for rest in ([], ['--'], ['--dry_run', '--', 'a']):
      done = _run(script, option, *rest)
      assert (done.returncode, done.stdout, done.stderr) == (2, '', f'{script}: {option} needs a value. See --help.\n')


@pytest.mark.parametrize('given', ['bin/python', './bin/python', '{folder}/bin/python', 'python-of-this-test'])
def test_the_interpreter_of_local_processes_may_be_relative_to_the_current_folder_or_on_the_path(tmp_path, given):
  for name in ('python', 'python-of-this-test'):
    stand_in.write_program(tmp_path / 'bin' / name, 'exit 0')
  environment = {**os.environ, 'UNI_MOE_PYTHON': given.format(folder=tmp_path),
                 'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'}
  done = subprocess.run([str(ROOT / 'launch/local_processes.sh'), '--devices', '1', '--dry_run', '--', *_TRAIN],
                        cwd=tmp_path, env=environment, capture_output=True, text=True)
  interpreters = [pathlib.Path(shlex.split(line)[3]) for line in done.stdout.splitlines()]
  name = 'python-of-this-test' if 'test' in pathlib.Path(given).name else 'python'
  assert all(p.is_absolute() for p in interpreters)
  assert [p.resolve() for p in interpreters] == [(tmp_path / 'bin' / name).resolve()] * 2


def test_local_processes_refuse_an_interpreter_that_is_missing():
  done = _run('local_processes.sh', '--dry_run', '--', *_TRAIN, UNI_MOE_PYTHON='missing/python')
  message = 'UNI_MOE_PYTHON=missing/python is not an executable program; correct or unset it.'
  assert (done.returncode, done.stdout, done.stderr) == (2, '', f'local_processes.sh: {message}\n')


def test_local_processes_differ_only_in_their_number():
  lines = _dry('local_processes.sh', '--processes', '3', '--devices', '4', '--port', '7733', '--dry_run', '--', *_TRAIN,
               XLA_FLAGS='--a=1', UNI_MOE_PYTHON='/bin/sh')
  flags = '--xla_force_host_platform_device_count'
  assert lines == [  # as they are, they can be typed where JAX_PLATFORMS is not set
      ['env', 'JAX_PLATFORMS=cpu', f'XLA_FLAGS=--a=1 {flags}=4', '/bin/sh', 'launch/train.py', *_TRAIN,
       '--coordinator_address=127.0.0.1:7733', '--num_processes=3', f'--process_id={i}'] for i in range(3)]
  lines = _dry('local_processes.sh', '--dry_run', '--', *_TRAIN, JAX_PLATFORMS='cpu')
  assert [line[2] for line in lines] == [f'XLA_FLAGS={flags}=1'] * 2
  [first, _] = _dry('local_processes.sh', '--evaluate', '--port', '7733', '--dry_run', '--', '--workdir=w')
  assert first[-5:] == ['launch/evaluate.py', '--workdir=w', '--coordinator_address=127.0.0.1:7733',
                        '--num_processes=2', '--process_id=0']


def test_each_local_process_has_an_accelerator_of_its_own():
  lines = _dry('local_processes.sh', '--dry_run', '--', *_TRAIN, UNI_MOE_PYTHON=sys.executable)
  assert [line[1:3] for line in lines] == [[f'JAX_LOCAL_DEVICE_IDS={i}', sys.executable] for i in range(2)]


def test_a_pod_is_created_installed_and_started_on_all_hosts():
  create, archive, copy, install, before, train = _dry(
      'tpu_pod.sh', '--name', 'pod', '--zone', 'zone', '--project', 'mine', '--create', 'v5litepod-256',
      '--version', 'v2', '--spot', '--service_account', 'trainer', '--before', 'mount it', '--dry_run', '--', *_TRAIN)
  tpu_vm, location = ['gcloud', 'compute', 'tpus', 'tpu-vm'], ['--zone', 'zone', '--project', 'mine']
  assert create == [*tpu_vm, 'create', 'pod', *location, '--accelerator-type', 'v5litepod-256', '--version', 'v2',
                    '--spot', '--service-account', 'trainer']
  assert archive[:2] == ['git', 'archive'] and archive[-1] == 'HEAD'
  file = archive[3].removeprefix('--output=')
  assert re.fullmatch(r'/\S*/uni_moe_jax\.\d+\.tar\.gz', file)
  assert copy == [*tpu_vm, 'scp', file, 'pod:uni_moe_jax.tar.gz', *location, '--worker=all']
  for line in (install, before, train):
    assert line[:-1] == [*tpu_vm, 'ssh', 'pod', *location, '--worker=all', '--command']
  for part in ('|| python3 -m pip install -q --target ~/uv uv;', 'uv venv -q --allow-existing --python 3.11 .venv',
               "uv pip install -q --python .venv -c constraints.txt -e '.[tpu,gcs,clip,video]'"):
    assert part in install[-1]
  assert 'launch/train.py' in train[-1] and '--distributed=auto' in train[-1]
  assert before[-1] == '! kill -0 "$(cat ~/run.pid)" 2>/dev/null || exit 0; cd ~/uni_moe_jax && ' + (
      'PATH=$PWD/.venv/bin:$PATH && mount it')
  [installed] = _dry('tpu_pod.sh', *_POD, '--skip_install', '--dry_run', '--', *_TRAIN)
  assert installed[-1] == train[-1]


_POD = ('--name', 'pod', '--zone', 'zone')


def test_arguments_and_exit_code_are_passed_through_to_a_host(tmp_path):
  done = _run('tpu_pod.sh', *_POD, '--skip_install', '--', *_TRAIN, **stand_in.tpu_host(tmp_path))
  # The shells of the host split the command again: one argument must stay one argument.
  assert done.stdout == ''.join(f'<{a}>' for a in ('launch/train.py', *_TRAIN, '--distributed=auto')) + '\n'
  assert done.returncode == 3


def test_a_run_on_a_pod_survives_its_connection_and_is_stopped_by_name(tmp_path):
  host = stand_in.tpu_host(tmp_path)
  (tmp_path / 'wait').touch()
  command, env = [ROOT / 'launch/tpu_pod.sh', *_POD, '--skip_install', '--', 'a'], {**os.environ, **host}
  first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
  assert first.stdout.readline() == '<launch/train.py><a><--distributed=auto>\n'
  os.killpg(first.pid, signal.SIGKILL)
  second = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
  assert second.stdout.readline() == '<launch/train.py><a><--distributed=auto>\n'  # shown again
  assert _run('tpu_pod.sh', *_POD, '--stop', **host).returncode == 0
  assert second.communicate(timeout=10) == ('saved\n', None) and second.returncode == 75
  assert (tmp_path / 'run.log').read_text().count('launch/train.py') == 1  # one run, not two


def test_a_pod_that_trains_keeps_its_code_and_packages(tmp_path):
  host = stand_in.tpu_host(tmp_path)
  (tmp_path / 'wait').touch()
  command, popen = [ROOT / 'launch/tpu_pod.sh', *_POD], dict(env=os.environ | host, stdout=subprocess.PIPE, text=True)
  first = subprocess.Popen([*command, '--skip_install', '--', 'a'], **popen)
  assert first.stdout.readline() == '<launch/train.py><a><--distributed=auto>\n'
  # The archive does not reach this host: installing would fail.
  second = subprocess.Popen([*command, '--before', 'touch ~/before', '--', 'a'], **popen)
  assert second.stdout.readline() == '<launch/train.py><a><--distributed=auto>\n'
  assert _run('tpu_pod.sh', *_POD, '--stop', **host).returncode == 0
  assert [p.communicate(timeout=10)[0] for p in (first, second)] == ['saved\n'] * 2
  assert second.returncode == 75 and not (tmp_path / 'before').exists()
  done = _run('tpu_pod.sh', *_POD, '--', 'a', **host)  # positive control: it installs
  assert done.returncode == 1 and 'tpu-vm delete pod --zone zone' in done.stderr


def test_a_new_start_on_a_pod_keeps_the_output_of_the_last_one(tmp_path):
  host = stand_in.tpu_host(tmp_path)
  for argument in 'ab':
    _run('tpu_pod.sh', *_POD, '--skip_install', '--', argument, **host)
  logs = [(tmp_path / name).read_text() for name in ('run.log.1', 'run.log')]
  assert logs == [f'<launch/train.py><{a}><--distributed=auto>\n' for a in 'ab']


def test_an_archive_is_of_one_start_alone_and_is_removed(tmp_path):
  host = stand_in.tpu_host(tmp_path) | {'TMPDIR': str(tmp_path)}
  files = {_dry('tpu_pod.sh', *_POD, '--dry_run', '--', 'a', **host)[0][3] for _ in range(2)}
  assert len(files) == 2 and all(file.startswith(f'--output={tmp_path}/') for file in files)
  _run('tpu_pod.sh', *_POD, '--', 'a', **host)
  assert 'scp' in (tmp_path / 'called').read_text() and not list(tmp_path.glob('*.tar.gz'))


@pytest.mark.parametrize('state, spot, calls', [
    ('', [], 'create ssh'), ('READY', [], 'ssh'), ('PREEMPTED', ['--spot'], 'delete create --spot ssh'),
    ('PREEMPTED', [], '')])  # one on demand, which costs more, does not replace a spot slice
def test_a_slice_is_created_if_it_does_not_exist_or_was_a_spot_slice(tmp_path, state, spot, calls):
  host = stand_in.tpu_host(tmp_path)
  if state:
    (tmp_path / 'state').write_text(f'{state}\n')
  _run('tpu_pod.sh', *_POD, '--create', 'v5litepod-4', '--version', 'v', *spot, '--skip_install', '--', 'a', **host)
  assert (tmp_path / 'called').read_text().split() == ['describe', *calls.split()]


def test_many_hosts_can_evaluate():
  [pod] = _dry('tpu_pod.sh', *_POD, '--skip_install', '--evaluate', '--dry_run', '--', '--workdir=w')
  assert 'launch/evaluate.py --workdir=w --distributed=auto' in pod[-1]
  lines = _dry('slurm.sbatch', '--dry_run', '--evaluate', '--workdir=w')
  assert lines[-2][-3:] == ['launch/evaluate.py', '--workdir=w', '--distributed=auto']


def test_slurm_runs_one_task_per_gpu_and_requeues_after_preemption():
  lines = _dry('slurm.sbatch', '--dry_run', *_TRAIN, SLURM_JOB_ID='17', SLURM_SUBMIT_DIR=str(ROOT))
  options = dict(line[1].removeprefix('--').partition('=')[::2] for line in lines if line[0] == '#SBATCH')
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert 'gpus-per-task' not in options  # JAX assigns them by the task's number on the node
  assert options['signal'].startswith('B:TERM@') and 'requeue' in options
  assert lines[-2] == [
      'srun', '--kill-on-bad-exit=1', '.venv/bin/python', 'launch/train.py', *_TRAIN, '--distributed=auto']
  assert ' '.join(lines[-1]) == 'after exit code 75 or 143 or a signal, 50 times: scontrol requeue 17'


# A stand-in for srun: exits with a code, or with another one when scancel signals its tasks; SIGTERM kills them.
_SRUN = """
if [[ {code} == wait ]]; then
  sleep 20 &
  trap 'kill "$!"; exit {after_signal}' USR1
  trap 'kill "$!"; exit 9' TERM
  echo "$$" >pid
  touch started
  wait "$!"
fi
exit {code}
"""


@pytest.mark.parametrize('code, after_signal, count, requeued', [
    ('75', '', '3', True), ('75', '', '50', False),  # the limit
    ('wait', '75', '3', True), ('wait', '143', '3', True), ('wait', '137', '3', True),  # some were killed
    ('wait', '143', '50', False), ('wait', '0', '3', False), ('wait', '2', '3', False),
    ('0', '', '3', False), ('1', '', '3', False), ('2', '', '3', False), ('137', '', '3', False),
    ('143', '', '3', True), ('143', '', '50', False)])  # only the tasks got the signal
def test_slurm_requeues_after_75_or_a_signal_up_to_a_limit(tmp_path, code, after_signal, count, requeued):
  stand_in.write_program(tmp_path / 'srun', _SRUN.format(code=code, after_signal=after_signal))
  stand_in.write_program(tmp_path / 'scontrol', 'echo "$@" >requeued')
  stand_in.write_program(tmp_path / 'scancel', '[[ "$*" == "--signal=TERM 17" ]] && kill -USR1 "$(cat pid)"')
  process = subprocess.Popen(
      ['bash', str(ROOT / 'launch/slurm.sbatch'), *_TRAIN], stderr=subprocess.PIPE, text=True, env={
          'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_SUBMIT_DIR': str(tmp_path), 'SLURM_JOB_ID': '17',
          'SLURM_RESTART_COUNT': count})
  if after_signal:
    stand_in.wait_for(tmp_path / 'started')
    process.terminate()
  message = process.communicate(timeout=20)[1]
  assert process.returncode == int(after_signal or code)
  assert (tmp_path / 'requeued').exists() == requeued
  assert ('the limit of UNI_MOE_REQUEUES=50' in message) == (count == '50')
  assert not requeued or (tmp_path / 'requeued').read_text() == 'requeue 17\n'


@pytest.mark.parametrize('code', ['75', '143', '137'])
def test_slurm_does_not_requeue_after_a_mistake_of_one_task_for_which_srun_killed_the_others(tmp_path, code):
  stand_in.write_program(tmp_path / 'srun', 'touch "$UNI_MOE_MISTAKE_FILE"', f'exit {code}')
  stand_in.write_program(tmp_path / 'scontrol', 'echo "$@" >requeued')
  environment = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID='17')
  assert _run('slurm.sbatch', *_TRAIN, **environment).returncode == 2
  assert not (tmp_path / 'requeued').exists() and not list(tmp_path.glob('.mistake*'))
  # What a start left that was killed is none of the next one's.
  (tmp_path / '.mistake-17-0').touch()
  stand_in.write_program(tmp_path / 'srun', 'exit 75')
  environment['SLURM_RESTART_COUNT'] = '1'
  assert _run('slurm.sbatch', *_TRAIN, **environment).returncode == 75 and (tmp_path / 'requeued').exists()


# Writes its arguments to a file, then ends as the file `does` says; like training, if that is 'wait'.
_STAND_IN = stand_in.END + '''
index = sys.argv[-1].rpartition('=')[2]
pathlib.Path('ran' + index).write_text(' '.join(sys.argv[1:]))
action = pathlib.Path('does' + index).read_text()
if action != 'wait':
  print('failed', file=sys.stderr)
end(action, suffix=index)
'''


def _processes(folder: pathlib.Path, *does: str) -> subprocess.Popen:
  processes.copy_launcher(folder)
  (folder / 'launch/train.py').write_text(_STAND_IN)
  for i, what in enumerate(does):
    (folder / f'does{i}').write_text(what)
  return subprocess.Popen(
      ['bash', 'launch/local_processes.sh', '--processes', str(len(does)), '--', '--config=c.py'], cwd=folder,
      env={**os.environ, 'UNI_MOE_PYTHON': sys.executable}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      start_new_session=True,
      # Tests in the background ignore SIGINT, and bash cannot trap a signal that it inherits as ignored.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_local_processes_share_a_port_and_have_their_own_numbers(tmp_path):
  process = _processes(tmp_path, '0', '0')
  _, errors = process.communicate(timeout=30)
  assert process.returncode == 0
  arguments = [(tmp_path / f'ran{i}').read_text().split() for i in range(2)]
  clusters = [[word.partition('=')[2] for word in words[-3:]] for words in arguments]
  assert [words[0] for words in arguments] == ['--config=c.py'] * 2
  assert clusters[0][0] == clusters[1][0] and clusters[0][0].startswith('127.0.0.1:')
  assert [p[1:] for p in clusters] == [['2', '0'], ['2', '1']]
  assert sorted(errors.splitlines()) == ['[0] failed', '[1] failed']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_local_process_once_and_waits_for_all(tmp_path, number):
  process = _processes(tmp_path, 'wait', 'wait')
  for i in range(2):
    stand_in.wait_for(tmp_path / f'started{i}')
  process.send_signal(number)
  process.communicate(timeout=30)
  assert process.returncode == 75
  assert [(tmp_path / f'signals{i}').read_text() for i in range(2)] == ['1', '1']


def test_if_one_local_process_fails_the_others_are_killed(tmp_path):
  process = _processes(tmp_path, 'wait', '4')
  process.communicate(timeout=15)
  assert process.returncode == 4 and not (tmp_path / 'signals0').exists()


def test_local_processes_need_a_bash_that_names_the_process_that_has_ended(tmp_path):
  (tmp_path / 'bash_5.0').write_text('wait() { echo "wait: -p: invalid option" >&2; return 2; }')
  done = _run('local_processes.sh', '--port', '7733', '--', '--config=c.py', UNI_MOE_PYTHON='/bin/false',
              BASH_ENV=str(tmp_path / 'bash_5.0'))
  assert (done.returncode, done.stdout) == (2, '')
  assert 'is too old; install bash 5.1 or newer' in done.stderr and done.stderr.count('\n') == 1
