"""The blocks of the tutorials run at reduced size, in the order of the page, or say in bold what they need."""

import importlib.util
import pathlib
import re
import shlex
import signal
import sys

import pytest

from tests.data import own_files
from tests.helpers import fast_compile, in_process, processes, saved_run, served, tiny
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.cli import shipped

_PAGES = {page.stem: page for page in (processes.ROOT / 'docs/tutorials').glob('*.md')}
_BLOCK = re.compile(r'(?:^\*\*Needs (.+?)\.\*\*\n\n)?^```(bash|python)\n(.*?)^```', re.MULTILINE | re.DOTALL)
_NEEDS = ('a GPU', 'Slurm', 'a pod and the datasets', 'the datasets', "the authors' checkpoint",
          'a Google Cloud project', 'quota for TPUs', 'Docker')
# tests/launch/installed_test.py installs the package.
_INSTALLS = ('pip install', 'python -m venv', '. ')
_STEPS = ['train.steps=2', 'train.log_every=1']
_MODEL = ['model.num_layers=1', 'model.width=16', 'model.num_heads=2', 'model.mlp_dim=16', 'moe.num_experts=2']
_SMALL = {
    'train': lambda arguments: [f'--config.{field}' for field in (
        _STEPS if any(',run=' in a for a in arguments) else _STEPS + _MODEL)],  # a run has its model
    'sweep': lambda arguments: [f'--override={field}' for field in _STEPS] + (
        ['--variants=dense,task', '--num_batches=2', *(f'--override={field}' for field in _MODEL)]
        if '--sweep=routers' in arguments else ['--tasks=digits', '--recipes=zero-shot,prompts', '--num_seeds=1']),
    'interference': lambda _: ['--num_batches=2'],
    'experts': lambda _: ['--num_batches=2']}


def _blocks(page: str) -> list[tuple[str, str, str]]:
  """(what it needs, its language, its lines) of every block."""
  return _BLOCK.findall(_PAGES[page].read_text())


def _run(line: str) -> None:
  """Runs a command, a launch script in this process."""
  program, *arguments = shlex.split(line, comments=True)
  if program == 'uni-moe':
    command, *arguments = arguments
    if command == 'serve':
      _serve(*arguments)
    else:
      small = _SMALL.get(command, lambda _: [])(arguments)
      assert in_process.run(shipped.scripts()[command], *arguments, *small) == 0, line
  elif program == 'python':
    processes.run([sys.executable, *arguments], folder=pathlib.Path.cwd())
  else:
    processes.run([str(processes.ROOT / program), *arguments])


def _serve(*arguments: str) -> None:
  """Serves until the page opens, then until Ctrl-C."""
  command = [sys.executable, str(shipped.scripts()['serve']), *arguments, '--port=0']
  with served.started(command, pathlib.Path.cwd(), processes.environment(1)) as service:
    assert service.request('GET', '/')[0] == 200
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(served.START_TIMEOUT) == 0, service.output


def _run_page(page: str) -> None:
  for needs, language, code in _blocks(page):
    if needs:
      continue
    if language == 'python':
      exec(compile(code, page, 'exec'), {})
      continue
    for line in code.replace('\\\n', ' ').replace('=/shared', '=shared').splitlines():
      if not line.startswith(_INSTALLS):
        _run(line)


@pytest.fixture(name='home')
def _home(tmp_path, monkeypatch):
  """An empty working directory, and home of data and tokenizers; one device, which divides every batch."""
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('XLA_FLAGS', fast_compile.environment_flags(1))  # of the processes that it starts
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize('page', _PAGES)
def test_a_block_that_does_not_run_here_needs_something_known(page):
  assert {needs for needs, *_ in _blocks(page)} <= {'', *_NEEDS}
  assert len(_blocks(page)) == len(re.findall('^```(?:bash|python)$', _PAGES[page].read_text(), re.MULTILINE)) > 2


def test_no_tutorial_is_missing_here():
  assert sorted(_PAGES) == ['paper', 'photographs', 'quickstart', 'slurm', 'tpu_pod']


def _run_with_long_texts():
  c = tiny.config('shape', 'caption', 'pair', data_dir=tiny.data_dir())
  c.model.max_text_len = 32  # of captions of own data
  return c


@pytest.mark.nightly
def test_photographs_become_a_model_that_is_judged_and_used(home, capfd):
  rows = own_files.write_captioned_images(home / 'photos', 40) / 'data.jsonl'
  rows.write_text(rows.read_text().replace('"color"', '"animal"'))
  saved_run.save('runs/quickstart', _run_with_long_texts(), 1)
  _run_page('photographs')
  output = capfd.readouterr().out
  # Forty images with two captions each, every fifth in the test split.
  assert 'pets 1.0.0: train 32, test 8' in output and 'captions (texts)' in output
  [row] = [line for line in output.splitlines() if 'i2t_R@1' in line.split()]
  assert row.split()[:2] == ['pets', 'retrieval'] and "nearest neighbor's name" in row
  assert pathlib.Path('runs/pets/report.html').exists()


@pytest.mark.nightly
def test_the_quickstart_by_hand(home, capfd):
  _run_page('quickstart')
  output = capfd.readouterr().out
  assert 'trained 2 steps' in output and 'top-1' in output
  assert all(pathlib.Path(name).exists() for name in ('runs/quickstart/report.html', 'exported/example.py'))


@pytest.mark.nightly
def test_the_papers_comparison_at_a_small_size(home):
  _run('uni-moe prepare-data')
  saved_run.save('runs/quickstart', cli.config_from('quickstart', _MODEL), 1)
  _run_page('paper')
  assert all(pathlib.Path(f'runs/{sweep}/results.md').exists() for sweep in ('routers', 'adaptation'))


@pytest.mark.nightly
def test_a_dry_run_of_the_job_file(home, capfd):
  _run_page('slurm')
  assert list(pathlib.Path('shared/data').iterdir())


@pytest.mark.nightly
def test_the_pods_run_is_compiled_before_it_is_rented(home):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed')
  _run_page('tpu_pod')
  assert 'v5e:16x16' in pathlib.Path('base.json').read_text()
