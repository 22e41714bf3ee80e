"""env.sh: packages are installed by uv from where pip would take them, and by pip where uv cannot."""

import os
import pathlib
import subprocess

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]

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
    script = f'. {_ROOT}/launch/env.sh; python=$PWD/python; pip_install -c pins.txt -e .'
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


@pytest.mark.parametrize('unwritten', ['', '1'])
def test_all_byte_code_is_compiled_only_where_python_does_not_write_what_it_imports(install, unwritten):
  _, _, commands = install(PYTHONDONTWRITEBYTECODE=unwritten)
  assert ('--compile-bytecode' in commands[-1]) == bool(unwritten)


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
