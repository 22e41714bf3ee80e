"""A launch script as a process of its own: what studies are made of."""

import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

from uni_moe_jax.utils.exit_codes import PREEMPTED


def run(command: Sequence[str], root: pathlib.Path) -> int:
  """Runs a launch script from the repository's root; returns its exit code, 75 where a signal ended it.

  It has a session of its own, so that a signal reaches it once: through here.

  Args:
    command: 'launch/train.py' and its arguments.
  """
  print('$ python', *command, flush=True)
  received = []
  child = subprocess.Popen([sys.executable, *command], cwd=root, start_new_session=True)
  old = {number: signal.signal(number, lambda n, _: (received.append(n), child.send_signal(n)))
         for number in (signal.SIGINT, signal.SIGTERM)}
  code = child.wait()
  for number, handler in old.items():
    signal.signal(number, handler)
  return PREEMPTED if received and code <= 0 else code
