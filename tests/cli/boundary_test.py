"""Mistakes at the command line end at once in one sentence without a traceback, and exit code 2."""

import errno
import os
import signal
import subprocess
import sys
from unittest import mock

import jax
import pytest

from tests.helpers import in_process, processes, small_config, tiny
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.tasks import attributes
from uni_moe_jax.train import loop
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.utils.errors import RunError, UsageError


def _usage_error(script: str, *arguments: str) -> str:
  """Return the error, after checks that it is one sentence on stderr with exit code 2."""
  done = in_process.python(f'launch/{script}', *arguments)
  assert done.returncode == 2, done.stderr
  lines = [line for line in done.stderr.splitlines() if line]
  assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
  return lines[0]


def _train(tmp_path, *arguments: str, config: str = 'configs/quickstart.py') -> str:
  return _usage_error('train.py', f'--config={config}', f'--workdir={tmp_path / "run"}', *arguments)


@pytest.mark.parametrize('arguments, message', [
    (['--config.model.widht=3'], "--config.model.widht: the config has no field 'widht'. Did you mean \"width\""),
    (['--config.modle.width=3'], "the config has no field 'modle'. Did you mean \"model\""),
    (['--config.model.width=wide'], 'invalid literal for int'),
    (['--config.moe.router=atribute'], "config.moe.router='atribute' is unknown; did you mean 'attribute'?"),
    (['--config.tasks.text.batch_size=33', '--config.train.grad_accum_steps=2'],
     'batch_size=33 must be a positive multiple of config.train.grad_accum_steps=2; try 32'),
    (['--config=configs/small.py', '--config.seed=3'], 'error: --config is given twice; give it once.'),
    (['--config.model.num_heads=3'], 'config.model.width=128 must be a multiple of config.model.num_heads=3; try 120'),
    (['--config.data.dir=/not/there'], 'Data directory /not/there does not exist. Run: uni-moe prepare-data'),
    (['--workdir=/dev/null/run'], '--workdir=/dev/null/run: /dev/null is not a folder; give another.'),
    (['--stpes=3'], 'stpes'),
    (['steps=3'], "unexpected argument 'steps=3'"),
])
def test_training_reports_what_is_wrong(tmp_path, arguments, message):
  assert message in _train(tmp_path, *arguments)


@pytest.mark.parametrize('argument, message', [
    ('--input=gs://b/x', 'is a URL, but must be a path of a disk; copy its files'),
    ('--workdir=gcs://bucket/x', "has the unknown scheme 'gcs'; did you mean 'gs'"),
    ('--workdir=gs:bucket/x', 'is no address of a bucket; write gs://BUCKET/NAME'),
    ('--workdir=gs://Bucket/x', "has the bucket 'Bucket'")])
@pytest.mark.parametrize('joined', [True, False])
def test_an_address_that_cannot_be_read_is_refused_before_anything_else(argument, message, joined, capsys):
  argv = [argument] if joined else argument.split('=', 1)
  with pytest.raises(SystemExit) as stopped:
    cli._parse(['prepare_data.py', '--name=pets', *argv], local=('input',))
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith(f'error: {argument.partition("=")[0]}=') and message in error and '://' in error


@pytest.mark.parametrize('argv', [
    ['--config=configs/own.py:sources=gs://bucket/own/pets'],
    ['--config.tasks.text.template=a photo of http://pets.org/{name}'],
    ['--config.tasks.text.template', 'http://pets.org/{name}']])
def test_arguments_and_fields_of_a_config_may_contain_a_url(argv):
  argv = ['train.py', *argv]
  with mock.patch.object(cli.flags, 'FLAGS', lambda argv: argv[:1]):
    assert cli._parse(argv) == argv[:1]


@pytest.mark.parametrize('overrides', [(), ('--config.train.steps=3',)])  # an override accesses the config earlier
def test_a_missing_config_file_is_reported_with_the_nearest_names(tmp_path, overrides):
  message = _train(tmp_path, *overrides, config='configs/quikstart.py')
  assert "config file 'configs/quikstart.py' does not exist; did you mean 'quickstart.py'" in message


@pytest.mark.parametrize('overrides', [(), ('--config.train.steps=3',)])
def test_a_config_file_that_names_missing_data_reports_the_data(tmp_path, overrides):
  message = _train(tmp_path, *overrides, config='own:sources=pets')
  assert message.startswith('error: source own:pets is not in ') and '--name=pets' in message


def test_arguments_of_a_config_without_any_are_refused(tmp_path):
  name = '--config=configs/quickstart.py'
  message = f'error: {name}:size=base: this config has no arguments; write {name}.'
  assert _train(tmp_path, config='configs/quickstart.py:size=base') == message


def test_a_workdir_of_another_config_is_refused(tmp_path):
  workdir_lib.claim_workdir(tmp_path / 'run', tiny.config('shape'), 'print')
  assert 'belongs to a run with another config' in _train(tmp_path, f'--config.data.dir={tmp_path}')


def test_evaluating_a_folder_without_a_run_explains_how_to_train(tmp_path):
  message = _usage_error('evaluate.py', f'--workdir={tmp_path}')
  assert 'holds no run' in message and 'uni-moe train' in message


def _zero_shot(tmp_path, script: str, argument: str) -> str:
  config = f'--config=configs/zero_shot.py:{argument.format(run=tmp_path / "trained")}'
  return _usage_error(script, config, f'--workdir={tmp_path / "new"}')


@pytest.mark.parametrize('script, argument, message', [
    ('evaluate.py', 'run={run}', "argument 'task' is missing; give run=RUN,task=TASK"),
    ('evaluate.py', 'run={run}x,task=digits',
     "trainedx' is no work directory of a run (config.json is missing); did you mean 'trained'"),
    ('evaluate.py', 'run={run},task=digit', "task 'digit' is unknown; did you mean 'digits'"),
    ('train.py', 'run={run},task=digits', 'every task has batch_size=0, so there is nothing to train; evaluate')])
def test_a_mistyped_run_or_task_is_reported(tmp_path, script, argument, message):
  workdir_lib.claim_workdir(tmp_path / 'trained', tiny.config('shape'), 'print')
  assert message in _zero_shot(tmp_path, script, argument)
  assert not (tmp_path / 'new').exists()


def test_a_defect_keeps_its_traceback(tmp_path):
  config = tmp_path / 'broken.py'
  config.write_text('def get_config():\n  return 3\n')
  done = processes.python('launch/train.py', f'--config={config}', f'--workdir={tmp_path / "run"}')
  assert done.returncode == 1 and 'Traceback' in done.stderr


# Errors that need data and devices are tested in this process, which has imported the libraries.
def _refused(capsys, config, workdir, devices) -> str:
  with mock.patch.object(loop, '_loop', side_effect=AssertionError('it was trained')):
    assert cli.guarded(lambda: loop.train(config, str(workdir), devices)) == 2
  message = capsys.readouterr().err
  assert message.startswith('error: ') and message.count('\n') == 1
  return message


@pytest.mark.parametrize('field, value, devices, message', [
    ('tasks.shape.batch_size', 12, 8, 'config.tasks.shape.batch_size=12 must be a multiple of 8 (8 batch shards of the '
     'mesh × 1 micro-steps); try 8'),
    ('mesh.data', 3, 1, 'needs 3 devices, there are 1; set one axis to -1')])
def test_a_batch_or_a_mesh_that_does_not_fit_the_devices_is_refused(tmp_path, capsys, field, value, devices, message):
  config = tiny.config('shape', data_dir=tiny.data_dir())
  small_config.assign(config, field, value)
  assert message in _refused(capsys, config, tmp_path, jax.devices()[:devices])


def test_a_source_that_is_not_prepared_names_the_command(tmp_path, capsys):
  message = _refused(capsys, tiny.config('shape', data_dir=tmp_path), tmp_path / 'run', jax.devices()[:1])
  assert f'Run: uni-moe prepare-data --data_dir={tmp_path}' in message


def test_a_built_in_error_is_a_defect():
  with pytest.raises(ValueError, match='zip'):  # rows of unequal length: no person's mistake has a sentence for that
    cli.guarded(lambda: attributes.union((1, 2), (1,)))


@pytest.mark.parametrize('error, message', [
    (RunError('every checkpoint\n  is damaged.'), 'error: every checkpoint is damaged.\n'),
    (OSError(errno.ENOSPC, 'No space left on device', 'metrics.jsonl'),
     'error: the disk is full: metrics.jsonl could not be written'),
    (PermissionError(errno.EACCES, 'Permission denied', '/data/own'),
     'error: /data/own: Permission denied. Check that'),
    (OSError(errno.ENAMETOOLONG, 'File name too long', 'x' * 9999), f'error: {"x" * 200}: File name too long. Check'),
    (RuntimeError('RESOURCE_EXHAUSTED: writing: No space left on device [a C++ trace]'),
     'error: the disk is full. Free some space')])
def test_a_failure_of_a_run_is_one_sentence_and_exit_code_1(capsys, error, message):
  def main():
    raise error

  assert cli.guarded(main) == 1
  assert (got := capsys.readouterr().err).startswith(message) and got.count('\n') == 1


def test_a_usage_error_of_a_launch_script_is_reported(capsys):
  def main():
    raise UsageError('--a and --b\n  exclude each other')

  assert cli.guarded(main) == 2
  assert capsys.readouterr().err == 'error: --a and --b exclude each other\n'


@pytest.mark.parametrize('error, code', [(UsageError('a mistake'), 2), (RunError('a failure'), 1)])
def test_an_error_ends_what_was_to_end_with_it_after_its_report_and_a_mistake_leaves_a_file_if_one_is_named(
    tmp_path, monkeypatch, capsys, error, code):
  def main():
    raise error

  ended = []
  monkeypatch.setenv('UNI_MOE_MISTAKE_FILE', str(tmp_path / 'mistake'))
  cli.at_failure(lambda code: ended.append((code, capsys.readouterr().err)))
  try:
    assert cli.guarded(lambda: 1) == 1 and not ended  # all processes return a code together
    assert cli.guarded(main) == code and ended == [(code, f'error: {error}\n')]
  finally:
    cli._endings.pop()
  assert (tmp_path / 'mistake').exists() == (code == 2)


_SLOW_START = """
import sys, time
from uni_moe_jax.cli import boundary as cli
with cli.exit_on_signals(75):
  print('importing', flush=True)
  time.sleep(20)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_begins_is_an_orderly_stop(number):
  process = subprocess.Popen(
      [sys.executable, '-c', _SLOW_START], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  process.stdout.readline()
  process.send_signal(number)
  assert process.communicate(timeout=10)[1] == f'\n{number.name}: stopped; the same command continues.\n'
  assert process.returncode == 75


def test_ctrl_c_ends_any_other_command_by_its_signal_and_in_one_sentence():
  # It does not wait for threads that compute.
  raised = 'threading.Thread(target=time.sleep, args=(60,)).start(); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)'
  for body, code, report in ((raised, -signal.SIGINT, '\nSIGINT: stopped.\n'), ('1 / 0', 1, 'ZeroDivisionError')):
    main = f'def main():\n  {body}\n\ncli.run(main)'
    imports = 'import os, signal, threading, time\nfrom uni_moe_jax.cli import boundary as cli'
    done = subprocess.run([sys.executable, '-c', f'{imports}\n{main}'], capture_output=True, text=True, timeout=40,
                          # Tests in the background ignore SIGINT, which Python inherits.
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert done.returncode == code and report in done.stderr
    assert ('Traceback' in done.stderr) == (code == 1)


@pytest.mark.parametrize('body, code', [
    ('print(1, flush=True); print(2, file=sys.stderr); print(3); return 0', 0),
    ('with cli.exit_on_signals(75): signal.raise_signal(signal.SIGTERM)', 75)])
def test_a_command_whose_output_nobody_reads_any_more_ends_as_otherwise(body, code):
  reader, writer = os.pipe()
  os.close(reader)
  program = f'import signal, sys\nfrom uni_moe_jax.cli import boundary as cli\ndef main():\n  {body}\ncli.run(main)'
  try:
    assert subprocess.run([sys.executable, '-c', program], stdout=writer, stderr=writer, timeout=40).returncode == code
  finally:
    os.close(writer)


def test_signal_handlers_are_restored():
  old = signal.getsignal(signal.SIGTERM)
  with cli.exit_on_signals(75):
    assert signal.getsignal(signal.SIGTERM) != old
  assert signal.getsignal(signal.SIGTERM) == old
