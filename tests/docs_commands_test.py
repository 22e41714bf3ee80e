"""Command lines of pages and docstrings: scripts, flags and extras exist, and configs have a plan. Nothing runs."""

import itertools
import pathlib
import re
import shlex

import pytest
from absl import flags

from tests.helpers import in_process, own_data, processes
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.cli import shipped
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.train import workdir

_ROOT = processes.ROOT
# Programs whose arguments are not checked, and why.
_PROGRAMS = {
    **dict.fromkeys(('mkdir', 'awk', 'cd', '.', 'ruff', 'basedpyright', 'pre-commit', 'mkdocs', 'venv', 'gcloud',
                     'docker', 'git'), 'not of this repository'),
    **dict.fromkeys(('serve/bin/pip', '../serve/bin/python', 'exported/example.py'),
                    'tests/launch/export_test.py runs the commands'),
    **dict.fromkeys(('./launch/quickstart.sh', './launch/test.sh'), 'without arguments, or with those of pytest')}
# Parts of commands whose config has no plan here, and why.
_NO_PLAN = {'own:sources=gs://': 'needs the bucket', **dict.fromkeys(
    ('runs/image_word', 'runs/stripes', 'runs/side'), 'tests/contributing_test.py runs the command with its diff')}


def _commands():
  """(file, command) of fenced blocks of pages, and of indented lines and ends of lines of docstrings."""
  for page in (_ROOT / 'README.md', _ROOT / 'CONTRIBUTING.md', *sorted((_ROOT / 'docs').rglob('*.md'))):
    blocks = ''.join(re.findall(r'^```bash\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL))
    for line in blocks.replace('\\\n', ' ').splitlines():
      yield from ((page.name, command) for command in line.split(' && ') if not line.startswith('#'))
  for script in sorted(path for folder in ('launch', 'configs') for path in (_ROOT / folder).glob('*.py')):
    doc = script.read_text().split('"""')[1].replace('\\\n', ' ')
    yield from ((script.name, line) for line in re.findall(r'(?:^  |: +)(uni-moe \S.*)$', doc, re.MULTILINE))


@pytest.fixture(scope='module', autouse=True)
def home(tmp_path_factory):
  """A home, and the working directory, with the runs and the data that commands name."""
  folder = tmp_path_factory.mktemp('home')
  own_data.write(folder / '.cache/uni_moe_jax')  # the default data directory
  config = cli.config_from('quickstart', [])
  for name in ('quickstart', 'embedded', 'converted'):
    workdir.claim_workdir(folder / 'runs' / name, config, 'fingerprint')
  for name in ('configs', 'launch', 'tests', 'setup.py'):
    (folder / name).symlink_to(_ROOT / name)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HOME', str(folder))
    patch.chdir(folder)
    yield


def _check(program: str, *arguments: str) -> None:
  script, dashes = pathlib.Path(program), arguments.index('--') if '--' in arguments else len(arguments)
  own, rest = arguments[:dashes], arguments[dashes + 1:]
  if program in _PROGRAMS:
    assert script.exists() or not program.startswith('./launch')
  elif program == 'uni-moe':
    _check(f'launch/{shipped.scripts()[arguments[0]].name}', *arguments[1:])
  elif program == 'python' and arguments[:1] == ('-m',) and arguments[1].startswith('benchmarks.'):
    assert (_ROOT / arguments[1].replace('.', '/')).with_suffix('.py').exists()
  elif program == 'python':
    _check(*(arguments[1:] if arguments[0] == '-m' else arguments))
  elif program == 'sbatch':
    _check(*itertools.dropwhile(lambda argument: argument.startswith('-'), arguments))  # its own options
  elif program == 'pip':
    extras = re.findall(r'\w+', ''.join(re.findall(r'\[.*\]', ' '.join(arguments))))
    assert all(f"'{extra}': " in pathlib.Path('setup.py').read_text() for extra in extras), extras
  elif script.suffix == '.py' and script.parts[0] == 'launch':
    # A config that would read a bucket when it is loaded, or that stands for the reader's, is replaced.
    local = [re.sub('^--config=(.*://.*|…)', '--config=quickstart', a) for a in own]
    with in_process.loaded(script, *local):
      config = flags.FLAGS.flag_values_dict().get('config')
      if config is not None and not any(part in argument for part in _NO_PLAN for argument in arguments):
        assert shipped.config_path(config) if isinstance(config, str) else make_plan(config)
      if rest:
        _check(*rest)
  else:
    assert script.suffix in ('.sh', '.sbatch', '.py') and script.exists(), (
        f'{program} is no script of this repository, nor in _PROGRAMS')
    options = [argument.lstrip('-') for argument in own if argument.startswith('--') and '=' not in argument]
    assert all(re.search(rf"(--{option}\)|'{option}')", script.read_text()) for option in options), options
    of_training = rest or [argument for argument in own if '=' in argument]
    if script.suffix != '.py' and of_training:
      _check('launch/train.py', *of_training)


@pytest.mark.parametrize('command', [pytest.param(command, id=f'{file}: {command}') for file, command in _commands()])
def test_a_command_names_what_exists(command):
  _check(*shlex.split(command, comments=True))


@pytest.mark.parametrize('command', [
    'programm', 'pip install .[none]', './launch/tpu_pod.sh --nme a -- --workdir=a',
    'sbatch launch/none.sbatch',
    'python launch/train.py --quickly', 'uni-moe keep-running -- uni-moe none', *(
        f'uni-moe train --config={wrong}' for wrong in (
            'small', 'none --workdir=a', 'small --workdir=a --x=1', 'small --workdir=a --config.seeds=1',
            'small --workdir=a --config.model.width=3'))])
def test_a_wrong_command_is_found(command):
  with pytest.raises((AssertionError, AttributeError, KeyError, OSError, ValueError, flags.Error)):
    _check(*command.split())
