"""launch/sweep.py: mistakes, failures and signals with stand-ins for the other scripts; nightly, a tiny real sweep."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers import in_process, stand_in, tiny
from tests.helpers.processes import ROOT
from uni_moe_jax.io import storage
from uni_moe_jax.train import workdir

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
  return tmp_path


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


def test_a_failed_command_ends_its_run_the_others_continue_and_a_rerun_repairs_it(root, capfd):
  (root / 'evaluate').write_text('3')
  command = _routers(root, '--variants=dense,task+moe.top_k=1')
  assert in_process.run(*command) == 1
  output, errors = capfd.readouterr()
  folders = ('dense-0', 'task+moe.top_k_1-0')
  assert errors == ''.join(f'error: {folder}: evaluate failed with exit code 3.\n' for folder in folders)
  expected = [f'{name} {folder}' for folder in folders for name in ('train', 'evaluate')]
  assert _stages(root) == expected
  assert _log(root)[2] == (f'train --config={root}/c.py:router=task --config.seed=0 --config.moe.top_k=1 '
                           f'--workdir={root}/out/{folders[1]}')

  (root / 'evaluate').unlink()
  assert in_process.run(*command) == 0
  output, errors = capfd.readouterr()
  assert errors == '' and '| e | top-1 |  | 0.500 ± 0.196 | 0.500 ± 0.196 |' in output
  expected += ['evaluate dense-0', 'interference dense-0', 'report dense-0', f'evaluate {folders[1]}',
               f'interference {folders[1]}', f'experts {folders[1]}', f'report {folders[1]}']
  assert _stages(root) == expected
  assert in_process.run(*command) == 0 and _stages(root) == expected
  assert in_process.run(*command, '--num_batches=3') == 0
  again = [f'{name} {folder}' for folder in folders for name in ('interference', 'report')]
  assert _stages(root) == expected + again  # a report shows the others


def test_more_seeds_repeat_nothing_and_come_after_all_variants_of_the_first(root, capfd):
  assert in_process.run(*_routers(root, '--variants=dense,task', '--measure=evaluate')) == 0
  assert in_process.run(*_routers(root, '--variants=dense,task', '--measure=evaluate', '--num_seeds=2')) == 0
  assert _stages(root) == [f'{name} {router}-{seed}' for seed in (0, 1) for router in ('dense', 'task')
                           for name in ('train', 'evaluate')]
  assert 'Runs: dense 2, task 2.' in capfd.readouterr().out
  [row] = json.loads((root / 'out/results.json').read_text())['rows']
  assert row['columns']['task']['values'] == [.5, .5]


def test_recipes_are_columns_and_only_trained_ones_have_seeds(root, capfd):
  assert in_process.run(*_adaptation(root, '--recipes=zero-shot,prompts', '--num_seeds=2')) == 0
  run, out = root / 'run', root / 'out'
  prompts = [(f'train --config=prompt_tune:run={run},task=digits,data=few --config.seed={seed} '
              f'--workdir={out}/digits-prompts-{seed}', f'evaluate --workdir={out}/digits-prompts-{seed}')
             for seed in (0, 1)]
  assert _log(root) == [f'evaluate --config=zero_shot:run={run},task=digits --config.seed=0 '
                        f'--workdir={out}/digits-zero-shot-0', *prompts[0], *prompts[1]]
  assert '| e | top-1 |  | 0.500 ± 0.196 | 0.600 ± 0.196 |' in capfd.readouterr().out


@pytest.mark.parametrize('send', [os.kill, os.killpg])
def test_a_signal_reaches_the_running_script_once_and_the_sweep_can_be_continued(root, send):
  (root / 'train').write_text('wait')
  process = _start(root, _routers(root, '--variants=dense'))
  stand_in.wait_for(root / 'started', process, seconds=60)
  send(process.pid, signal.SIGINT)
  process.communicate(timeout=30)
  assert process.returncode == 75 and not (root / 'out/results.json').exists()


@pytest.mark.parametrize('command, arguments, message', [
    (_routers, ['--variants=dense,tokens'], "--variants=dense,tokens: 'tokens' is unknown; did you mean 'token'"),
    (_routers, ['--variants=context'], 'error: c.py:context is unknown.'),
    (_routers, ['--variants='], 'the sweep has no runs'),
    (_routers, ['--variants=task+seed=1'], 'seed=1: every run has its own seed; remove it and use --num_seeds.'),
    (_routers, ['--measure=expert'], "--measure=expert: 'expert' is unknown; did you mean 'experts'"),
    (_routers, ['--override=train.stps=20'], "the config has no field 'stps'"),
    (_routers, ['--override=moe.router=task'], 'every run has its own moe.router; remove it and use --variants.'),
    (_adaptation, ['--override=train.init=a'], 'every run has its own train.init; remove it and use --run.'),
    (_routers, ['--recipes=prompts'], '--recipes is a flag of --sweep=adaptation; remove it.'),
    (_adaptation, ['--recipes=prompt'], "--recipes=prompt: 'prompt' is unknown; did you mean 'prompts'"),
    (_adaptation, ['--tasks=digit'], "task 'digit' is unknown; did you mean 'digits'"),
    (_adaptation, ['--run=/not/there'], "'/not/there' is no work directory of a run"),
    (_adaptation, ['--run='], '--sweep=adaptation needs --run')])
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
  rows = {(r['evaluator'], r['metric']): r['columns']
          for r in json.loads((folder / 'results.json').read_text())['rows']}
  assert ('shape', 'top-1') in rows
  assert {name: c['mean'] for name, c in rows['training', 'steps'].items()} == {'dense': 3, 'token': 3}
  total, active = (rows['training', f'{name} parameters'] for name in ('total', 'active'))
  assert total['dense']['mean'] < active['token']['mean'] < total['token']['mean']
  for name in ('dense-0/interference.json', 'token-0/interference.json', 'token-0/experts.json', 'token-0/report.html'):
    assert (folder / name).exists()
