"""A process of this package that does work for another one, and ends with it."""

import os
import subprocess
import sys


def start(module: str, fd: int, stdout: int | None = None) -> subprocess.Popen:
  """Starts `python -m MODULE FD`, with this process's modules.

  Those of multiprocessing would run the program of this process again, and one without `if __name__ == '__main__'` as
  well. It has a session of its own: a terminal's Ctrl-C is for this process. Its standard input is a pipe that ends
  with this process, however that ends. Files of the current folder, which may be named as modules are, are none (`-P`).

  Args:
    module: to run; the number of the file descriptor is its argument.
    fd: that the process gets, too.
    stdout: `subprocess.PIPE`, or None: that of this process.
  """
  return subprocess.Popen(
      [sys.executable, '-P', '-m', module, str(fd)], stdin=subprocess.PIPE, stdout=stdout, start_new_session=True,
      pass_fds=[fd], env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
