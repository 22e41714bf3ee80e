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
_CHANGES = dict(re.findall(r'^## (.+?)\n.*?^(```diff\n.*?^```\n\n```bash\n.*?^```)',
                           (ROOT / 'CONTRIBUTING.md').read_text(), re.MULTILINE | re.DOTALL))


def _blocks(change: str) -> tuple[str, str]:
  """(diff, command) of a section."""
  diff, command = re.search(r'```diff\n(.*?)```\n\n```bash\n(.*?)```', change, re.DOTALL).groups()
  return diff, command.replace('\\\n', ' ')


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


@pytest.mark.parametrize('name', _CHANGES)
def test_a_change_touches_one_file_and_has_at_most_twenty_lines(name):
  diff, _ = _blocks(_CHANGES[name])
  assert len(re.findall(r'^\+\+\+ ', diff, re.MULTILINE)) == 1
  assert sum(line.startswith('+') for line in diff.splitlines()[3:]) <= _MAX_LINES


@pytest.mark.slow
@pytest.mark.parametrize('name', _CHANGES)
def test_a_copy_with_the_change_trains_and_one_without_does_not(tmp_path, name):
  for part in ('uni_moe_jax', 'configs', 'launch'):
    shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns('__pycache__'))
  diff, command = _blocks(_CHANGES[name])
  run = lambda: subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, capture_output=True,
                               text=True, check=False, env={**processes.environment(1), 'PYTHONPATH': str(tmp_path)})
  assert run().returncode == 2  # the control: the name is unknown
  _apply(tmp_path, diff)
  done = run()
  assert done.returncode == 0 and 'trained 10 steps' in done.stdout, done.stderr[-2000:]
