"""What tests with stand-ins for launch scripts share: source code of the stand-ins, and waiting for them."""

import pathlib
import subprocess
import time

# End of a script `name` in the folder `root`. The file `name` there has an exit code, or 'wait': wait for a signal and
# exit like preempted training. The exit code shows whether exactly one signal came.
ENDS = '''
action = (root / name).read_text() if (root / name).exists() else '0'
if action == 'wait':
  received = []
  signal.signal(signal.SIGINT, lambda *_: received.append(1))
  (root / 'started').touch()
  end = time.monotonic() + 20
  while not received and time.monotonic() < end:
    time.sleep(0.01)
  time.sleep(0.2)
  sys.exit(75 if received == [1] else 1)
'''


def wait_for(path: pathlib.Path, process: subprocess.Popen | None = None, seconds: float = 20) -> None:
  """Wait until a stand-in has made a file; fail if `process`, which runs it, ends before."""
  end = time.monotonic() + seconds
  while not path.exists():
    assert time.monotonic() < end, path
    assert process is None or process.poll() is None, path
    time.sleep(0.01)
