"""launch/study.py: every cell once, what is done is skipped, what fails or is stopped ends it; stand-ins train and evaluate."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers import in_process, stand_in, tiny
from uni_moe_jax.train import workdir
from uni_moe_jax.train.checkpoint import Checkpoints

_ROOT = pathlib.Path(__file__).resolve().parents[2]

# Appends its name and arguments to `log`; evaluate.py writes a score. Ends with the code in a file that has its name; 'wait'
# there: waits for a signal and ends as training does when it is preempted.
_STAND_IN = '''
import json, pathlib, signal, sys, time
name = pathlib.Path(sys.argv[0]).stem
root = pathlib.Path(sys.argv[0]).parents[1].absolute()
with open(root / 'log', 'a') as log:
  log.write(' '.join([name, *sys.argv[1:]]) + '\\n')
''' + stand_in.ENDS + '''
if name == 'evaluate' and does == '0':
  where = pathlib.Path(next(a for a in sys.argv if a.startswith('--workdir=')).partition('=')[2])
  where.mkdir(exist_ok=True)
  gained = .1 * (where.name.split('-')[1] == 'prompt')
  row = dict(evaluator='e', metric='top-1', value=.5 + gained, standard_error=.1, chance=.1, floors={}, higher_is_better=True)
  (where / 'evaluation.json').write_text(json.dumps([row]))
sys.exit(int(does))
'''


@pytest.fixture(name='root')
def _root(tmp_path):
  (tmp_path / 'launch').mkdir()
  shutil.copy(_ROOT / 'launch' / 'study.py', tmp_path / 'launch')
  for name in ('train', 'evaluate'):
    (tmp_path / 'launch' / f'{name}.py').write_text(_STAND_IN)
  workdir.claim_workdir(tmp_path / 'run', tiny.config('shape', data_dir=tiny.data_dir()), 'print')
  _save(tmp_path / 'run', 0)
  return tmp_path


def _save(folder, prompts, step=2):
  with Checkpoints(folder, 1) as checkpoints:
    params = {'prompts': {'a': np.full(1, prompts, np.float32)}, 'rest': np.zeros(99, np.float32)}
    checkpoints.save(step, {'params': params, 'ema_params': None})


def _command(root, *arguments):
  return [root / 'launch/study.py', f'--run={root / "run"}', f'--workdir={root / "study"}', '--tasks=digits', *arguments]


def _start(root, *arguments):
  return subprocess.Popen(
      [sys.executable, *map(str, _command(root, *arguments))], cwd=root, env={**os.environ, 'PYTHONPATH': str(_ROOT)},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _run(root, *arguments):
  process = _start(root, *arguments)
  output, errors = process.communicate(timeout=100)
  return process.returncode, output, errors


def test_every_cell_is_made_once_and_a_failure_ends_the_study_until_it_is_started_again(root, capfd):
  (root / 'train').write_text('3')
  command = _command(root, '--regimes=untuned,prompt', '--seeds=2')
  assert in_process.run(*command) == 3
  where = root / 'study'
  log = [f'evaluate --config=configs/zero_shot.py:{root}/run,digits --workdir={where}/digits-untuned --config.seed=0',
         f'train --config=configs/prompt_tune.py:{root}/run,digits,few --workdir={where}/digits-prompt-0 --config.seed=0']
  assert (root / 'log').read_text().splitlines() == log

  (root / 'train').unlink()
  # What training would have left there, so that it can be compared with the run.
  for seed in (0, 1):
    config = _tuned(root, seed)
    workdir.claim_workdir(where / f'digits-prompt-{seed}', config, 'print')
    _save(where / f'digits-prompt-{seed}', 1)
  capfd.readouterr()
  assert in_process.run(*command) == 0
  output, errors = capfd.readouterr()
  assert errors == ''
  assert 'digits-untuned: done' in output and '| e | top-1 | 0.1 |  | 0.500 ± 0.196 | 0.600 ± 0.196 |' in output
  assert '| digits | prompt | 2 | 2 | 100 | 64 | 1 | 1.00% | identical |' in output
  again = [line.split('=')[0] for line in (root / 'log').read_text().splitlines()[2:]]
  assert again == ['train --config', 'evaluate --workdir', 'train --config', 'evaluate --workdir']
  assert json.loads((where / 'study.json').read_text())['cells'][1]['identical'] is True
  assert (where / 'study.md').read_text() == output[output.index('| evaluator'):]

  _save(root / 'run', 3, step=4)
  assert in_process.run(*command) == 2
  assert 'step: 2 → 4' in capfd.readouterr().err  # cells of two checkpoints do not compare


def _tuned(root, seed):
  from uni_moe_jax.train import finetuning
  config = finetuning.prompt_tune(f'{root}/run,digits')
  config.seed = seed
  return config


@pytest.mark.parametrize('send', [os.kill, os.killpg], ids=['to the study', 'to everybody'])
def test_a_signal_reaches_the_command_once_and_the_study_can_go_on(root, send):
  (root / 'train').write_text('wait')
  process = _start(root, '--regimes=finetune', '--seeds=1')
  end = time.monotonic() + 60
  while not (root / 'started').exists():
    assert time.monotonic() < end and process.poll() is None
    time.sleep(0.05)
  send(process.pid, signal.SIGINT)
  process.communicate(timeout=30)
  assert process.returncode == 75


@pytest.mark.parametrize('arguments, said', [
    (['--regimes=prompts'], '--regimes=prompts is unknown; choices: untuned, prompt, finetune, finetune-all'),
    (['--tasks=digit'], "task 'digit' is unknown; did you mean 'digits'"),
    (['--run=/not/there'], "'/not/there' holds no run"),
    (['--seeds=0'], 'seeds')])
def test_mistakes_are_told_before_anything_runs(root, arguments, said):
  code, _, errors = _run(root, *arguments)
  assert code == 2 and said in errors and 'Traceback' not in errors
  assert not (root / 'log').exists() and not (root / 'study').exists()
