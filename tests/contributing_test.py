"""CONTRIBUTING's three changes: each diff applies to a copy of the repository, which then trains ten steps with it."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.helpers import processes
from tests.helpers.processes import ROOT

_MAX_LINES = 20
_TEXT = (ROOT / 'CONTRIBUTING.md').read_text()
_CHANGES = dict(re.findall(r'^## (.+?)\n.*?^(```(?:diff|python)\n.*?^```\n\n```bash\n.*?^```)', _TEXT, re.M | re.S))
_DIFFS = [name for name, change in _CHANGES.items() if change.startswith('```diff')]


def _blocks(change: str) -> tuple[str, str]:
  """(diff or program, command) of a section."""
  first, command = re.search(r'```\w+\n(.*?)```\n\n```bash\n(.*?)```', change, re.S).groups()
  return first, command.replace('\\\n', ' ')


def _apply(root: pathlib.Path, diff: str) -> None:
  """Apply a diff of one hunk that begins with, or ends at, a line of the file."""
  lines = diff.splitlines()
  file = root / re.fullmatch(r'\+\+\+ b/(.*)', lines[1])[1]
  old = [line[1:] for line in lines[3:] if not line.startswith('+')]
  new = [line[1:] for line in lines[3:]]
  text = file.read_text()
  assert text.count('\n'.join(old)) == 1, f'{file.name} has no single place for the diff'
  file.write_text(text.replace('\n'.join(old), '\n'.join(new)))


def test_there_is_a_change_for_a_task_type_a_source_and_a_router():
  assert list(_CHANGES) == ['A task type', 'A data source', 'A router']
  assert _DIFFS == ['A task type', 'A router']


@pytest.mark.parametrize('name', _DIFFS)
def test_a_change_touches_one_file_and_has_at_most_twenty_lines(name):
  diff, _ = _blocks(_CHANGES[name])
  assert len(re.findall(r'^\+\+\+ ', diff, re.MULTILINE)) == 1
  assert sum(line.startswith('+') for line in diff.splitlines()[3:]) <= _MAX_LINES


@pytest.mark.nightly
@pytest.mark.parametrize('name', _CHANGES)
def test_a_copy_with_the_change_trains_and_one_without_does_not(tmp_path, name):
  for part in ('uni_moe_jax', 'configs', 'launch'):
    shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns('__pycache__'))
  change, command = _blocks(_CHANGES[name])
  run = lambda *args: subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, text=True, check=False,
                                     env={**processes.environment(1), 'PYTHONPATH': str(tmp_path)})
  train = shlex.split(command)[1:]
  assert run('launch/prepare_data.py', '--data_dir=.', '--embedded=digits').returncode == 0
  assert run(*train).returncode == 2  # the control: the name is unknown
  if name in _DIFFS:
    _apply(tmp_path, change)
  else:
    assert run('-c', change).returncode == 0
  done = run(*train)
  assert done.returncode == 0 and 'trained 10 steps' in done.stdout, done.stderr[-2000:]
