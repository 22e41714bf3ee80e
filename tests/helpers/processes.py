"""Processes of several virtual devices on this machine: what starts them, and what they say."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from tests.helpers import fast_compile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TWO = ('launch/local_processes.sh', '--processes', '2', '--devices', '4')  # arguments of a launch script stand behind '--'


def environment(devices: int = 4) -> dict[str, str]:
  """Of a process that has so many devices."""
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': fast_compile.environment_flags(devices),
          'PYTHONPATH': str(ROOT), 'UNI_MOE_PYTHON': sys.executable}


def run(command: Sequence[str], devices: int = 4, folder: pathlib.Path = ROOT) -> str:
  """What a command says, which succeeds, in the root of a tree."""
  done = subprocess.run(command, cwd=folder, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  said = done.stdout.decode()
  assert done.returncode == 0, said
  return said
