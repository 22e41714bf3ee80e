"""launch/sweep.py: mistakes, failures and signals with stand-ins for the other scripts; nightly, a tiny real sweep."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import in_process, stand_in, tiny
from tests.helpers.processes import ROOT
from uni_moe_jax.io import storage
from uni_moe_jax.train import adaptation, workdir
from uni_moe_jax.train.checkpoint import Checkpoints

# Appends its name and arguments to `log`; evaluate.py writes a score, which is better after prompt tuning. The script
# exits with the code in the file that has its name; 'wait' there means: until a signal comes.
_STAND_IN = stand_in.END + '''
import json
name = pathlib.Path(sys.argv[0]).stem
root = pathlib.Path(sys.argv[0]).parents[1].absolute()
with open(root / 'log', 'a') as log:
  log.write(' '.join([name, *sys.argv[1:]]) + '\\n')
action = (root / name).read_text() if (root / name).exists() else '0'
if name == 'evaluate' and action == '0':
  workdir = pathlib.Path(next(a for a in sys.argv if a.startswith('--workdir=')).partition('=')[2])
  workdir.mkdir(parents=True, exist_ok=True)
  value = .6 if 'prompt' in workdir.name else .5
  row = dict(evaluator='e', metric='top-1', value=value, standard_error=.1, chance=.1,
            baselines={}, higher_is_better=True)
  (workdir / 'evaluation.json').write_text(json.dumps([row]))
end(action, root, number=signal.SIGINT)
'''
_CONFIG = '''
from tests.helpers import tiny
from uni_moe_jax import config
def get_config(arg):
  router = arg.removeprefix('router=')
  if router not in ('dense', 'task', 'token'):
    raise ValueError(f'c.py:{{router}} is unknown.')
  c = tiny.config('shape', 'caption', data_dir={data!r})
  c.moe.router = router
  c.train.steps = 3
  c.evaluators.shape = config.evaluator('classification', 'shape', split='train')
  return c
'''


@pytest.fixture(name='root')
def _root(tmp_path):
  """A repository with stand-ins for all launch scripts but sweep.py, and a trained run."""
  (tmp_path / 'launch').mkdir()
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  shutil.copy(ROOT / 'launch' / 'sweep.py', tmp_path / 'launch')
  for name in ('train', 'evaluate', 'interference', 'experts', 'report'):
    (tmp_path / 'launch' / f'{name}.py').write_text(_STAND_IN)
  (tmp_path / 'c.py').write_text(_CONFIG.format(data=tiny.data_dir()))
  workdir.claim_workdir(tmp_path / 'run', tiny.config('shape', data_dir=tiny.data_dir()), 'print')
  _save(tmp_path / 'run', 0)
  return tmp_path


def _save(folder, prompts, step=2):
  with Checkpoints(folder, 1) as checkpoints:
    params = {'prompts': {'a': np.full(1, prompts, np.float32)}, 'rest': np.zeros(99, np.float32)}
    checkpoints.save(step, {'params': params, 'ema_params': None})


def _routers(root, *arguments, script=None):
  return [script or root / 'launch/sweep.py', '--sweep=routers', f'--workdir={root / "out"}',
          f'--config={root / "c.py"}', *arguments]


def _adaptation(root, *arguments):
  return [root / 'launch/sweep.py', '--sweep=adaptation', f'--run={root / "run"}', f'--workdir={root / "out"}',
          '--tasks=digits', *arguments]


def _start(root, command):
  # One device: the batches of these tasks do not divide by more.
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  return subprocess.Popen([sys.executable, *map(str, command)], cwd=root, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, start_new_session=True)


def _run(root, command):
  process = _start(root, command)
  output, errors = process.communicate(timeout=900)
  return process.returncode, output, errors


def _log(root):
  return (root / 'log').read_text().splitlines()


def _stages(root):
  """'train token-0' for every script that was run."""
  return [f'{line.split()[0]} {line.partition("--workdir=")[2].split()[0].rpartition("/")[2]}' for line in _log(root)]


def test_a_failed_router_is_reported_the_others_continue_and_a_rerun_repairs_it(root, capfd):
  (root / 'evaluate').write_text('3')
  command = _routers(root, '--variants=dense,task')
  assert in_process.run(*command) == 1
  output, errors = capfd.readouterr()
  assert errors == ''.join(f'error: {r}-0: evaluate failed with exit code 3.\n' for r in ('dense', 'task'))
  stages = ['interference', 'train', 'evaluate', 'interference', 'report']
  expected = [*(f'{s} dense-0' for s in stages), *(f'{s} task-0' for s in (*stages[:4], 'experts', 'report'))]
  assert _stages(root) == expected
  assert '| task-0 | 0 |' in output and 'evaluate failed with exit code 3' in output

  (root / 'evaluate').unlink()
  assert in_process.run(*command) == 0
  assert capfd.readouterr().err == ''
  assert _stages(root) == [*expected, 'evaluate dense-0', 'report dense-0', 'evaluate task-0', 'report task-0']
  assert in_process.run(*command, '--num_batches=3') == 2
  assert 'num_batches: 16 → 3' in capfd.readouterr().err


def test_a_sweep_continues_with_more_variants_and_seeds_and_reports_all_cells(root, capfd):
  assert in_process.run(*_routers(root, '--variants=task', '--measure=evaluation')) == 0
  (root / 'train').write_text('3')
  assert in_process.run(*_routers(root, '--variants=dense', '--measure=evaluation')) == 1
  (root / 'train').unlink()
  capfd.readouterr()
  begun = len(_log(root))
  code = in_process.run(*_routers(root, '--variants=task', '--measure=evaluation', '--num_seeds=task=2'))
  assert code == 1 and _stages(root)[begun:] == ['train task-1', 'evaluate task-1']
  output, errors = capfd.readouterr()
  assert errors == 'error: dense-0: train failed with exit code 3.\n'  # it stays, though this call does not run it
  cells = json.loads((root / 'out/results/results.json').read_text())['cells']
  assert [(c['name'], c['status']) for c in cells] == [
      ('dense-0', 'train failed with exit code 3'), ('task-0', 'finished'), ('task-1', 'finished')]
  assert '| e | top-1 | 0.1 |  |  | 0.500 ±' in output
  assert in_process.run(*_routers(root, '--variants=task', '--measure=evaluation', '--steps=2')) == 2
  assert 'task-0: as the config → train.steps=2' in capfd.readouterr().err


def test_a_failed_recipe_is_reported_and_a_rerun_repeats_no_finished_cell(root, capfd):
  (root / 'train').write_text('3')
  command = _adaptation(root, '--recipes=zero-shot,prompts', '--num_seeds=2')
  assert in_process.run(*command) == 1
  out = root / 'out'
  prompt = [f'train --config=prompt_tune:run={root}/run,task=digits,data=few --config.seed={seed} '
            f'--workdir={out}/digits-prompts-{seed}' for seed in (0, 1)]
  untuned = (f'evaluate --config=zero_shot:run={root}/run,task=digits --config.seed=0 '
             f'--workdir={out}/digits-zero-shot')
  assert _log(root) == [untuned, *prompt]
  assert 'error: digits-prompts-1: train failed with exit code 3.' in capfd.readouterr().err

  (root / 'train').unlink()
  for seed in (0, 1):  # what training would have left there
    config = adaptation.prompt_tune(f'run={root}/run,task=digits')
    config.seed = seed
    workdir.claim_workdir(out / f'digits-prompts-{seed}', config, 'print')
    _save(out / f'digits-prompts-{seed}', 1)
  assert in_process.run(*command) == 0
  output, errors = capfd.readouterr()
  assert errors == ''
  assert 'digits-zero-shot: done' in output and '| e | top-1 | 0.1 |  | 0.500 ± 0.196 | 0.600 ± 0.196 |' in output
  assert '| digits | prompts | 2 | 2 | 100 | 64 | 1 | 1.00% | identical |' in output
  assert [line.split('=')[0] for line in _log(root)[3:]] == [
      'train --config', 'evaluate --workdir', 'train --config', 'evaluate --workdir']
  assert json.loads((out / 'results/results.json').read_text())['cells'][1]['training']['identical'] is True
  assert (out / 'results/results.md').read_text() == output[output.index('# Adaptation study'):]

  _save(root / 'run', 3, step=4)
  assert in_process.run(*command) == 2
  assert 'steps: [2] → [4]' in capfd.readouterr().err  # cells of two checkpoints cannot be compared


@pytest.mark.parametrize('command, send', [
    (lambda root: _routers(root, '--variants=dense'), os.kill),
    (lambda root: _adaptation(root, '--recipes=finetune', '--num_seeds=1'), os.kill),
    (lambda root: _adaptation(root, '--recipes=finetune', '--num_seeds=1'), os.killpg),
], ids=['routers', 'adaptation', 'adaptation, to the process group'])
def test_a_signal_reaches_the_running_script_once_and_the_sweep_can_be_continued(root, command, send):
  (root / 'train').write_text('wait')
  process = _start(root, command(root))
  stand_in.wait_for(root / 'started', process, seconds=60)
  send(process.pid, signal.SIGINT)
  process.communicate(timeout=30)
  assert process.returncode == 75 and not (root / 'out/results').exists()


def test_a_signal_stops_a_sweep_that_waits_for_another(root):
  (root / 'out/dense-0').mkdir(parents=True)
  with open(root / 'out/dense-0/.sweep', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = _start(root, _routers(root, '--variants=dense'))
    assert any('waiting for another process' in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
  assert process.returncode == 75 and errors.splitlines()[-1] == 'SIGINT: stopped; the same command continues.'


@pytest.mark.parametrize('command, arguments, message', [
    (_routers, ['--variants=dense,tokens'], "--variants=dense,tokens: 'tokens' is unknown; did you mean 'token'"),
    (_routers, ['--variants=context'], 'error: c.py:context is unknown.'),
    (_routers, ['--variants='], '--variants is empty'),
    (_routers, ['--variants=task', '--num_seeds=2,tasks=3'],
     "--num_seeds=2,tasks=3: 'tasks' is unknown; did you mean 'task'"),
    (_routers, ['--variants=task', '--steps=0'], "--steps=0: '0' must be a number of at least 1, or NAME=NUMBER."),
    (_routers, ['--measure=expert'], "--measure=expert: 'expert' is unknown; did you mean 'experts'"),
    (_routers, ['--config=configs/none.py'], "config file 'configs/none.py' does not exist"),
    (_routers, ['--override=train.stps=20'],
     "error: --config.train.stps: the config has no field 'stps'. Did you mean \"steps\""),
    (_routers, ['--override=seed=10'],
     'error: --override=seed=10: each cell has its own seed; remove it and use --num_seeds.'),
    (_routers, ['--override=moe.router=task'], 'each cell has its own moe.router; remove it and use --variants.'),
    (_adaptation, ['--override=train.init=a'], 'each cell has its own train.init; remove it and use --run.'),
    (_adaptation, ['--override=seed=1'], 'each cell has its own seed; remove it and use --num_seeds.'),
    (_routers, ['--recipes=prompts'], '--recipes is a flag of --sweep=adaptation; remove it.'),
    (_adaptation, ['--recipes=prompt'],
     '--recipes=prompt is unknown; choices: zero-shot, prompts, finetune, finetune-all'),
    (_adaptation, ['--tasks=digit'], "task 'digit' is unknown; did you mean 'digits'"),
    (_adaptation, ['--run=/not/there'], "'/not/there' is no work directory of a run"),
    (_adaptation, ['--run='], '--sweep=adaptation needs --run'),
    (_adaptation, ['--override=train.stps=20'], "the config has no field 'stps'"),
    (_adaptation, ['--num_seeds=0'], '--num_seeds=0')])
def test_mistakes_are_one_sentence_before_anything_runs(root, command, arguments, message):
  done = in_process.python(*command(root, *arguments))
  assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1, done.stderr
  assert not (root / 'log').exists() and not (root / 'out').exists()


@pytest.mark.nightly
@pytest.mark.parametrize('store', ['disk', 'gcs'])
def test_a_tiny_router_ablation(root, store, request):
  folder = root / 'out' if store == 'disk' else storage.path(f'{request.getfixturevalue(store).address}/out')
  code, output, errors = _run(root, _routers(
      root, '--variants=dense,token', '--num_batches=2', f'--workdir={folder}', script=ROOT / 'launch/sweep.py'))
  assert code == 0, errors[-3000:] + output[-3000:]
  out = folder / 'results'
  assert list(storage.files_in(out)) == [
      'curves.png', 'experts_token.png', 'interference.png', 'interference_dense.png', 'interference_token.png',
      'results.json', 'results.md', 'scores.png']
  results = json.loads((out / 'results.json').read_text())
  dense, token = results['cells']
  assert [r['steps'] for r in results['cells']] == [3, 3] and not results['errors']
  assert dense['parameters']['total'] < token['parameters']['active'] < token['parameters']['total']
  for r in results['cells']:
    assert [m['checkpoint'] for m in r['interference'].values()] == ['init', 'step 3']
    assert r['interference']['init']['subset'] != r['interference']['final']['subset']
    assert {row['evaluator'] for row in r['evaluation']} == {'shape'}
  assert dense['experts'] is None and 1 < np.mean(token['experts']['effective_experts']) <= 4
  [pair] = results['account']['paired']
  assert (pair['evaluator'], pair['seeds']) == ('shape', 1)
  assert pair['gain'] == pytest.approx(
      token['evaluation'][0]['value'] - dense['evaluation'][0]['value'], abs=1e-5)
  typed = (results['command'], results['sources'][0])  # both contain the temporary directory here
  text = (out / 'results.md').read_text()
  assert str(root) not in text.replace(typed[0], '').replace(typed[1], '')
