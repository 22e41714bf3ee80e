"""Environments of their own, for packages whose pins exclude versions that this package needs. Each is made once."""

import contextlib
import hashlib
import os
import pathlib
import subprocess
import sys
import venv
from collections.abc import Sequence

from uni_moe_jax.io import locks
from uni_moe_jax.utils import signals
from uni_moe_jax.utils.errors import RunError
from uni_moe_jax.utils.exit_codes import PREEMPTED

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def python(name: str, title: str, size: str, *installs: Sequence[str]) -> str:
  """Return the interpreter of an environment, which is made in ~/.cache/uni_moe_jax if there is none.

  Args:
    name: of its folder. title, size: for messages, such as 'jax2onnx' and '1.1 GB'.
    installs: arguments of `pip install`, one after the other.

  Raises:
    RunError: a package cannot be installed, or another process is making the environment.
  """
  digest = hashlib.sha256(repr((installs, sys.version)).encode()).hexdigest()[:12]
  folder = pathlib.Path(os.path.expanduser('~/.cache/uni_moe_jax')) / name / digest
  interpreter, complete = folder / 'bin/python', folder / 'complete'
  if complete.exists():  # no process holds its lock to make it, and the folder may be read-only
    return str(interpreter)
  folder.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    if owner := locks.lock(folder, stack):
      raise RunError(f'{folder} is being made by {owner}; start the command again when it is complete.')
    if not complete.exists():
      print(f'making an environment for {title} in {folder} (about {size})', flush=True)
      venv.create(folder, with_pip=True)
      for packages in installs:
        command = [interpreter, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', *packages]
        if subprocess.run(command, check=False).returncode:
          raise RunError(f'the environment for {title} could not be made in {folder}, see above; check that pip can '
                         f'install {packages[0]}, and start the command again.')
      complete.touch()
  return str(interpreter)


def run(interpreter: str, module: str, *arguments: str) -> int:
  """Run a module of this package as a program of an environment; return its exit code.

  Its JAX, if it has one, is for CPUs. A signal ends it, and then this process with exit code 75; see `signals.wait`.
  """
  path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get('PYTHONPATH'))))
  command = [interpreter, '-P', '-m', module, *arguments]  # -P: not from the current folder, which may be a clone
  env = {**os.environ, 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}
  code = signals.wait(signals.start(command, env=env))
  if code == PREEMPTED:
    sys.exit(code)
  return code
