"""Processes of their own for what compiles for TPUs: libtpu, where it is on the path, is loaded once and for one topology."""

import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
  """Runs Python with these arguments at the repository's root, with all of this process's path."""
  path = os.pathsep.join([str(_ROOT), os.environ.get('PYTHONPATH', '')])
  return subprocess.run([sys.executable, *arguments], env={**os.environ, 'PYTHONPATH': path}, cwd=_ROOT, capture_output=True, text=True)


def printed(script: str) -> str:
  """What a script prints, which must end well."""
  done = run('-c', script)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout
