"""Processes on this machine: Python in the repository's root, and commands with several virtual devices."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.helpers import fast_compile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TWO = ('launch/local_processes.sh', '--processes', '2', '--devices', '4')  # then '--' and arguments


def copy_launcher(folder: pathlib.Path) -> None:
  """Copy local_processes.sh and what it sources to `folder`/launch, where a test writes its own train.py."""
  (folder / 'launch').mkdir()
  for name in ('local_processes.sh', 'options.sh'):
    shutil.copy(ROOT / 'launch' / name, folder / 'launch')


def environment(devices: int = 4) -> dict[str, str]:
  """Return the environment of a process with so many devices."""
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': fast_compile.environment_flags(devices),
          'PYTHONPATH': str(ROOT), 'UNI_MOE_PYTHON': sys.executable}


def run(command: Sequence[str], devices: int = 4, folder: pathlib.Path = ROOT) -> str:
  """Run a command, which must succeed, in `folder`. Return its output."""
  done = subprocess.run(command, cwd=folder, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  output = done.stdout.decode()
  assert done.returncode == 0, output
  return output


def together(
    *commands: Sequence[str], devices: int = 1, timeout: float = 240,
    folders: Sequence[pathlib.Path] | None = None) -> list[tuple[int, str]]:
  """Run commands at the same time. Return (exit code, output) of each; those that run after `timeout` s are killed.

  folders: where each runs; default: all in the repository's root.
  """
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  running = [subprocess.Popen(c, cwd=folder, env=environment(devices), **pipes)
             for c, folder in zip(commands, folders or [ROOT] * len(commands), strict=True)]
  try:
    outputs = [p.communicate(timeout=timeout)[0] for p in running]
    return [(p.returncode, output) for p, output in zip(running, outputs, strict=True)]
  finally:
    for process in running:
      process.kill()
      process.wait()


def children(pid: int | str) -> set[int]:
  """Return the processes that a process, or 'self', has started and that run, or have ended unseen."""
  threads = pathlib.Path(f'/proc/{pid}/task').glob('*/children')
  return {int(child) for thread in threads for child in thread.read_text().split()}


def is_running(pid: int) -> bool:
  """Return whether a process exists and has not ended unseen."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
  except OSError:
    return False


def free_address() -> str:
  """Return HOST:PORT with a free port of this machine."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
  """Run Python with these arguments in the repository's root, with all of this process's path."""
  path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
  return subprocess.run([sys.executable, *arguments], env={**os.environ, 'PYTHONPATH': path, **variables}, cwd=ROOT,
                        capture_output=True, text=True)


def printed(script: str, topology_name: str) -> str:
  """Return the output of a script, which must exit with 0. A process can load libtpu only once, for one `target`."""
  done = python('-c', f"""
from uni_moe_jax.preflight import topology
target = topology.parse({topology_name!r})
topology.prepare_environment(target)
{script}""")
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def stop(command: Sequence[str], workdir: pathlib.Path, num_lines: int, devices: int = 4) -> str:
  """Send SIGTERM to a training command after so many lines of metrics; it must exit with 75. Return its output."""
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  with subprocess.Popen(command, cwd=ROOT, env=environment(devices), **pipes) as process:
    log = workdir / 'metrics.jsonl'
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > num_lines):
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
  assert process.returncode == 75, output
  return output
