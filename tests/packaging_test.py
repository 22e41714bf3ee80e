"""What the wheel and the sdist contain, and the two stacks of exact versions."""

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml
from packaging import metadata, specifiers, utils

from tests.helpers.processes import ROOT
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.train import workdir

_STACKS = {'3.11': 'constraints.txt', '3.13': 'constraints-py313.txt'}


def _build(source: pathlib.Path, what: str, folder: pathlib.Path) -> pathlib.Path:
  """Build 'wheel' or 'sdist' of a source tree with the installed setuptools. Return the archive."""
  code = f'import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])'
  done = subprocess.run([sys.executable, '-c', code, folder], cwd=source, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  [archive] = folder.glob('*.whl' if what == 'wheel' else '*.tar.gz')
  return archive


def _files(archive: pathlib.Path) -> dict[str, bytes]:
  """Return {name: content}, without metadata of the distribution and, in an sdist, without its folder."""
  if archive.suffix == '.whl':
    with zipfile.ZipFile(archive) as wheel:
      return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith('/')}
  with tarfile.open(archive) as sdist:
    return {m.name.partition('/')[2]: sdist.extractfile(m).read() for m in sdist if m.isfile()}


def _tracked(*patterns: str) -> list[pathlib.Path]:
  """Return the files of the repository, as names relative to it, that git knows."""
  done = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard', *patterns], cwd=ROOT,
                        capture_output=True, text=True, check=True)
  return [pathlib.Path(name) for name in done.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(name='archives', scope='module')
def _archives(tmp_path_factory):
  """(wheel, sdist, wheel of the sdist) as {name: content}, built from copies, so that this tree stays as it is."""
  folder = tmp_path_factory.mktemp('build')
  for name in _tracked():
    (folder / 'tree' / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / 'tree' / name).write_bytes((ROOT / name).read_bytes())
  wheel = _build(folder / 'tree', 'wheel', folder / 'wheel')
  sdist = _build(folder / 'tree', 'sdist', folder / 'sdist')
  shutil.unpack_archive(sdist, folder / 'unpacked')
  [source] = (folder / 'unpacked').iterdir()
  again = _build(source, 'wheel', folder / 'again')
  return _files(wheel), _files(sdist), _files(again)


def test_the_wheel_has_the_package_its_commands_and_configs_and_nothing_else(archives):
  expected = {str(name) for name in _tracked('uni_moe_jax/**')}
  expected |= {f'uni_moe_jax/commands/{name.name}' for name in _tracked('launch/*.py')}
  expected |= {f'uni_moe_jax/configs/{name.name}' for name in _tracked('configs/*.py')}
  files = {name: content for name, content in archives[0].items() if '.dist-info/' not in name}
  assert set(files) == expected and 'uni_moe_jax/py.typed' in files
  assert files['uni_moe_jax/commands/train.py'] == (ROOT / 'launch/train.py').read_bytes()


def test_the_wheel_declares_the_command_and_the_license(archives):
  [points] = [content for name, content in archives[0].items() if name.endswith('/entry_points.txt')]
  assert points.decode().split('\n')[:2] == ['[console_scripts]', 'uni-moe = uni_moe_jax.cli.command:main']
  assert any(name.endswith('/LICENSE') for name in archives[0])


def test_the_sdist_has_what_the_wheel_is_built_from_and_no_tests(archives):
  wheel, sdist, again = archives
  assert again == wheel
  assert {'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'} <= set(sdist)
  assert not [name for name in sdist if name.startswith(('tests/', 'docs/', '.')) or name.endswith(('.pyc', '.npz'))]


def test_no_archive_names_a_folder_of_this_machine(archives):
  home = str(pathlib.Path.home())
  for files in archives:
    assert not [name for name, content in files.items() if str(ROOT).encode() in content]
    assert home == '/' or not [name for name, content in files.items() if f'{home}/.'.encode() in content]


def _pins(python: str) -> dict[str, str]:
  lines = (ROOT / _STACKS[python]).read_text().splitlines()
  return {utils.canonicalize_name(name): version for name, version in (
      line.split('==') for line in lines if not line.startswith('#'))}


@pytest.mark.parametrize('python', _STACKS)
def test_the_exact_versions_of_a_stack_are_in_the_declared_ranges(archives, python):
  [text] = [content for name, content in archives[0].items() if name.endswith('/METADATA')]
  wheel, pins, checked = metadata.Metadata.from_email(text, validate=False), _pins(python), 0
  environment = {'sys_platform': 'linux', 'platform_machine': 'x86_64', 'python_version': python}
  for required in wheel.requires_dist:
    environments = [{**environment, 'extra': extra} for extra in ('', *wheel.provides_extra)]
    if required.marker is None or any(map(required.marker.evaluate, environments)):
      assert required.specifier.contains(pins[utils.canonicalize_name(required.name)]), required
      checked += 1
  assert checked > 30


def test_the_exact_versions_install_on_the_first_release_of_their_python():
  # Debian 12 has Python 3.11.2; what needs 3.11.5 cannot be installed there.
  python = '{}.{}'.format(*sys.version_info)
  if python not in _STACKS:
    pytest.skip(f'nothing is pinned for Python {python}')
  installed = {utils.canonicalize_name(d.name): d for d in importlib.metadata.distributions()}
  pinned = [installed[name] for name, version in _pins(python).items()
            if name in installed and installed[name].version == version]
  too_new = [d.name for d in pinned
             if not specifiers.SpecifierSet(d.metadata.get('Requires-Python', '')).contains(f'{python}.0')]
  assert not too_new and len(pinned) > 30


def test_the_stacks_are_two_and_a_run_of_one_is_refused_by_the_other(tmp_path, monkeypatch):
  old, new = ({name: _pins(python).get(name.replace('_', '-'), '1.0') for name in workdir.VERSIONED}
              for python in _STACKS)
  monkeypatch.setattr(workdir, 'versions', lambda: old)
  workdir.claim_workdir(tmp_path, cli.config_from('small', []), 'print')
  monkeypatch.setattr(workdir, 'versions', lambda: new)
  message = r'different package versions \(jax: 0\.10\.2 → 0\.12\.0\.1, .*allow_version_mismatch'
  with pytest.raises(ValueError, match=message):
    workdir.check_versions(tmp_path)
  workdir.check_versions(tmp_path, allow_mismatch=True)


def test_the_workflow_runs_what_ci_runs_with_the_interpreters_of_both_stacks():
  [job] = yaml.safe_load((ROOT / '.github/workflows/tests.yml').read_text())['jobs'].values()
  pythons = [step['with']['python-version'] for step in job['steps'] if 'python-version' in step.get('with', {})]
  assert sorted(pythons) == sorted(_STACKS) and pythons[-1] == '3.11'  # the last one is `python`
  assert [step['run'] for step in job['steps'] if 'run' in step] == ['bash .ci/run']
