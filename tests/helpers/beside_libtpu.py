"""Subprocesses that compile for TPUs: a process can load libtpu only once, and for one topology."""

import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
  """Run Python with these arguments in the repository's root, with all of this process's path."""
  path = os.pathsep.join([str(_ROOT), os.environ.get('PYTHONPATH', '')])
  environment = {**os.environ, 'PYTHONPATH': path}
  return subprocess.run([sys.executable, *arguments], env=environment, cwd=_ROOT, capture_output=True, text=True)


def printed(script: str) -> str:
  """Return the output of a script, which must exit with 0."""
  process = run('-c', script)
  assert process.returncode == 0, process.stderr[-2000:]
  return process.stdout
