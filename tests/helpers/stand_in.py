"""What tests with stand-ins for launch scripts share: source code of the stand-ins, and waiting for them."""

import os
import pathlib
import subprocess
import time

# Source of `end`, with which a stand-in ends: an exit code; 'wait' for a signal and exit like preempted training; or
# 'sleep' without handling one. The exit code and the file `signals` show whether exactly one signal came.
END = '''
import pathlib, signal, sys, time
def end(action, folder=pathlib.Path(), suffix='', number=signal.SIGTERM):
  received = []
  if action == 'wait':
    signal.signal(number, lambda *_: received.append(1))
  if action in ('wait', 'sleep'):
    (folder / f'started{suffix}').touch()
    stop = time.monotonic() + 20
    while not received and time.monotonic() < stop:
      time.sleep(0.01)
    time.sleep(0.2)
    (folder / f'signals{suffix}').write_text(str(len(received)))
    action = 75 if received == [1] else 1
  sys.exit(int(action))
'''


def wait_for(path: pathlib.Path, process: subprocess.Popen | None = None, seconds: float = 20) -> None:
  """Wait until a stand-in has made a file; fail if `process`, which runs it, ends before."""
  end = time.monotonic() + seconds
  while not path.exists():
    assert time.monotonic() < end, path
    assert process is None or process.poll() is None, path
    time.sleep(0.01)


def write_program(path: pathlib.Path, *lines: str) -> None:
  """Write an executable script of bash."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(('#!/usr/bin/env bash', *lines, '')))
  path.chmod(0o755)


def tpu_host(home: pathlib.Path) -> dict[str, str]:
  """Return the environment of a host: gcloud's ssh is a shell in `home`, and its Python prints its arguments."""
  write_program(home / 'uni_moe_jax/.venv/bin/python', "printf '<%s>' \"$@\"", 'echo',
                "trap 'echo saved; exit 75' TERM", 'while [[ -e ~/wait ]]; do sleep 0.05; done', 'exit 3')
  write_program(home / 'bin/gcloud', '[[ " $* " == *" --spot "* ]] && spot=--spot', 'echo "$4" $spot >>~/called',
                'if [[ "$4" == describe ]]; then exec cat ~/state; fi',
                'if [[ "$4" == ssh ]]; then exec bash -c "${@: -1}"; fi')
  return {'HOME': str(home), 'PATH': f'{home}/bin:{os.environ["PATH"]}'}
