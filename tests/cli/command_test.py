"""The command uni-moe: its help, its mistakes, what it imports; configs by name."""

import json

import pytest

from tests.helpers import processes
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.cli import command, shipped
from uni_moe_jax.utils.errors import UsageError

# Run before the arguments are parsed; prints the third-party packages that a command has imported when it ends.
_IMPORTS = '''
import json, sys
from uni_moe_jax.cli import command
try:
  sys.argv = ['uni-moe', *sys.argv[1:]]
  command.main()
finally:
  packages = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)
  print('IMPORTED', json.dumps(sorted(packages)))
'''
_SLOW = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'chex', 'tensorflow', 'tensorflow_datasets', 'tensorboard', 'torch',
         'sklearn', 'scipy', 'pyarrow', 'matplotlib', 'gcsfs', 's3fs', 'keras', 'h5py', 'pandas', 'av'}


def _main(capsys, *arguments: str) -> tuple[int, str, str]:
  """(exit code, output, errors) of `uni-moe ARGUMENTS`."""
  code = 0
  try:
    command.main(arguments)
  except SystemExit as stopped:
    code = stopped.code
  return code, *capsys.readouterr()


def test_every_launch_script_is_a_command_of_one_group_and_has_a_line_in_the_help(capsys):
  grouped = [name for names in command.GROUPS.values() for name in names]
  assert len(set(grouped)) == len(grouped)
  assert set(shipped.scripts()) == set(grouped) & set(shipped.scripts()) == {
      path.stem.replace('_', '-') for path in (processes.ROOT / 'launch').glob('*.py')}
  code, output, _ = _main(capsys, '--help')
  lines = [line.split(maxsplit=1) for line in output.splitlines() if line.startswith('  ')]
  for name in (*shipped.scripts(), *shipped.configs()):
    assert [rest for first, rest in lines if first == name], name
  assert code == 0 and max(map(len, output.splitlines())) <= 120


def test_the_command_alone_explains_itself_and_is_wrong_usage(capsys):
  overview = _main(capsys, '--help')[1]
  assert _main(capsys) == (2, '', overview)


@pytest.mark.parametrize('arguments, message', [
    (['trian'], "error: uni-moe: command 'trian' is unknown; did you mean 'train'? choices: "),
    (['help', 'quikstart'], "error: uni-moe help: 'quikstart' is unknown; did you mean 'quickstart'?")])
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, arguments, message):
  code, output, errors = _main(capsys, *arguments)
  assert (code, output, errors.count('\n')) == (2, '', 1) and errors.startswith(message), errors


def test_help_of_a_config_is_its_docstring_and_the_version_is_printed(capsys):
  assert 'size=base            (default), tiny, small or large' in _main(capsys, 'help', 'pretrain')[1]
  assert _main(capsys, '--version')[1].startswith('uni-moe 0.')


@pytest.mark.parametrize('arguments, code, not_even', [
    (['--help'], 0, {'absl', 'ml_collections', 'numpy', 'etils'}),
    (['trian'], 2, {'absl', 'ml_collections', 'numpy', 'etils'}),
    (['help', 'train'], 0, set()),
    (['train', '--config=quickstart', '--workdir=w', '--stpes=3'], 2, set()),
    (['train', '--config=quikstart', '--workdir=w'], 2, set()),
    (['train', '--config=quickstart', '--workdir=w', '--config.moe.router=atribute'], 2, set()),
    (['evaluate', '--workdir=/none'], 2, set())])
def test_help_and_mistakes_come_before_slow_imports(arguments, code, not_even):
  done = processes.python('-c', _IMPORTS, *arguments)
  assert done.returncode == code, done.stderr
  imported = json.loads(done.stdout.rpartition('IMPORTED ')[2])
  assert 'uni_moe_jax' in imported and not set(imported) & (_SLOW | not_even)


def test_loading_the_flags_of_any_command_imports_nothing_slow():
  done = processes.python('-c', f'''
import sys
from absl import flags
from uni_moe_jax.cli import shipped
from uni_moe_jax.cli import command
for name in shipped.scripts():
  others = set(flags.FLAGS)
  command.run(shipped.scripts()[name], [], 'loaded')
  print(name, sys.modules['loaded'].main.__name__, sorted(set(sys.modules) & {_SLOW}))
  flags.FLAGS.remove_flag_values(set(flags.FLAGS) - others)
''')
  assert done.stdout.splitlines() == [f'{name} main []' for name in shipped.scripts()], done.stderr


def test_a_command_is_the_main_module_also_for_processes_that_it_spawns(tmp_path):
  script = tmp_path / 'pool.py'
  script.write_text('''
import multiprocessing, sys
from uni_moe_jax.cli import boundary as cli
def double(x): return 2 * x
if __name__ == '__main__':
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    print(sys.argv, pool.map(double, [1, 2]), cli.command_line())
''')
  run = 'import pathlib, sys; from uni_moe_jax.cli import command; command.run(pathlib.Path(sys.argv[1]), sys.argv[2:])'
  done = processes.python('-c', run, str(script), '--x=(a|b) $')
  assert done.stdout == "['uni-moe pool', '--x=(a|b) $'] [2, 4] uni-moe pool '--x=(a|b) $'\n", done.stderr


@pytest.mark.parametrize('arguments', ['', ':size=large,stage=2'])
def test_a_config_has_a_name_and_a_path(arguments):
  by_name = cli.config_from(f'pretrain{arguments}', ['train.steps=9'])
  assert by_name == cli.config_from(f'{processes.ROOT}/configs/pretrain.py{arguments}', ['train.steps=9'])
  assert by_name.train.steps == 9


@pytest.mark.parametrize('config, message', [
    ('quikstart', "--config=quikstart: config 'quikstart' is unknown; did you mean 'quickstart'? choices: ablation"),
    ('pretrain:size=huge', "pretrain:size=huge: size='huge' is unknown"),
    ('none/quickstart.py', "config file 'none/quickstart.py' does not exist; did you mean 'quickstart'")])
def test_a_mistyped_config_names_the_nearest(config, message):
  with pytest.raises(UsageError) as refused:
    cli.config_from(config, [])
  assert message in str(refused.value)


def test_scripts_and_configs_of_an_installed_package_are_inside_it(tmp_path):
  for name in ('commands/serve_it.py', 'configs/mine.py'):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text('')
  assert shipped.scripts(tmp_path) == {'serve-it': tmp_path / 'commands/serve_it.py'}
  assert shipped.configs(tmp_path) == {'mine': tmp_path / 'configs/mine.py'}
