"""env.sh: packages are installed by uv from where pip would take them, and by pip where uv cannot."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import stand_in
from tests.helpers.processes import ROOT

# A python that logs its arguments; the environment has the exit codes of its commands.
_STAND_IN = '''#!/bin/bash
echo "$*" >>log
case "$*" in
  *"config list"*)
    printf "%s\\n" "global.index-url='https://a/simple'" ":env:.find-links='/wheels'" "global.cert='c'" ;;
  "-m pip install"*" uv") exit "$NO_UV" ;;
  "-m uv"*) exit "$UV_FAILS" ;;
  "-m pip install"*) exit "$PIP_FAILS" ;;
  "-c"*) exit 1 ;;  # not Python 3.12
esac
'''


@pytest.fixture(name='install')
def _install(tmp_path):
  """Install with a stand-in: (exit code, output, the arguments that python got)."""
  (tmp_path / 'python').write_text(_STAND_IN)
  (tmp_path / 'python').chmod(0o755)

  def install(**codes):
    script = f'. {ROOT}/launch/env.sh; python=$PWD/python; pip_install -c pins.txt -e .'
    done = subprocess.run(
        ['bash', '-euc', script], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'NO_UV': '0', 'UV_FAILS': '0', 'PIP_FAILS': '0', **codes})
    return done.returncode, done.stdout, (tmp_path / 'log').read_text().splitlines()
  return install


def test_uv_installs_from_where_pip_would(install):
  code, output, commands = install()
  assert (code, output) == (0, '')
  assert commands[-1].startswith('-m uv pip install') and len(commands) == 3
  assert commands[-1].endswith('--index-url=https://a/simple --find-links=/wheels -c pins.txt -e .')


def test_the_commands_of_bash_3_are_enough(install, tmp_path):  # of macOS
  (tmp_path / 'bash_3').write_text('enable -n mapfile readarray')
  code, output, commands = install(BASH_ENV=str(tmp_path / 'bash_3'))
  assert (code, output) == (0, '')
  assert commands[-1].endswith('--index-url=https://a/simple --find-links=/wheels -c pins.txt -e .')


@pytest.mark.parametrize('failure, num_commands', [('NO_UV', 3), ('UV_FAILS', 4)])
def test_pip_installs_where_uv_cannot(install, failure, num_commands):
  code, output, commands = install(**{failure: '1'})
  assert (code, output) == (0, 'uv did not install them, trying pip.\n')
  assert commands[-1].startswith('-m pip install') and commands[-1].endswith('-c pins.txt -e .')
  assert len(commands) == num_commands


def test_nothing_is_installed_after_ctrl_c(install):
  code, output, commands = install(UV_FAILS='130')
  assert (code, output) == (130, '') and commands[-1].startswith('-m uv')


def test_a_failed_installation_is_a_failure(install):
  code, _, commands = install(UV_FAILS='1', PIP_FAILS='1')
  assert code == 1 and len(commands) == 5


# A python3.11 that takes its time, and logs what it makes and installs.
_SLOW = f'''#!/bin/bash
case "$*" in
  "- venv ensurepip" | "- pip") exit 0 ;;
  "-m venv "*)
    echo venv >>log; mkdir -p "$3/bin" && sleep 0.5 && cp "$0" "$3/bin/python" ;;
  "-m pip config list" | "-m pip install"*" uv") exit 0 ;;
  "-m uv"*) echo "install $*" >>log; sleep 0.5; [[ ! -e fails ]] ;;
  "-m pip"*) exit 1 ;;
  *) exec {sys.executable} "$@" ;;
esac
'''


@pytest.fixture(name='clone')
def _clone(tmp_path):
  for name, content in (('bin/python3.11', _SLOW), ('setup.py', ''), ('constraints.txt', '')):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
  (tmp_path / 'bin/python3.11').chmod(0o755)
  (tmp_path / 'launch').mkdir()
  shutil.copy(ROOT / 'launch/env.sh', tmp_path / 'launch')
  return tmp_path


def _start(clone, script='install_environment'):
  environment = {k: v for k, v in os.environ.items() if k not in ('UNI_MOE_PYTHON', 'PYTHONPATH')}
  return subprocess.Popen(
      ['bash', '-euc', f'. launch/env.sh; {script}'], cwd=clone, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, env={**environment, 'PATH': f'{clone}/bin:{os.environ["PATH"]}'})


def test_two_scripts_at_once_make_one_environment(clone):
  both = [_start(clone), _start(clone)]
  outputs = [process.communicate(timeout=30)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  made, *installed = (clone / 'log').read_text().splitlines()
  assert made == 'venv' and len(installed) == 1 and installed[0].startswith('install ')


def test_an_environment_is_used_where_the_folder_cannot_be_written(clone):
  assert _start(clone).wait(timeout=10) == 0
  (clone / '.venv.lock').unlink()
  (clone / '.venv.lock').mkdir()  # cannot be opened, also not by root
  again = _start(clone)
  assert (again.communicate(timeout=10)[0], again.returncode) == ('', 0)


@pytest.mark.parametrize('code, package', [(0, 'python3.12-venv'), (1, 'python3.11 python3.11-venv')])
def test_the_package_of_a_python_that_has_no_venv_is_named(tmp_path, code, package):
  stand_in.write_program(tmp_path / 'python3.12', 'case "$*" in', '"- venv ensurepip") exit 1 ;;', f'-) exit {code} ;;',
                         '--version) echo Python 3.12.3 ;;', '-c*) echo python3.12-venv ;;', 'esac')
  done = subprocess.run(['bash', '-euc', f'. {ROOT}/launch/env.sh; pythons=(python3.12); find_python'], text=True,
                        env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}, capture_output=True)
  assert done.returncode == 1 and 'PATH has python3.12 (Python 3.12.3). Install ' in done.stderr
  assert f'(on Debian and Ubuntu: apt-get install {package}), or set UNI_MOE_PYTHON' in done.stderr
