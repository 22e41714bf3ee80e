"""All processes of a run must see one folder. A run that is refused: tests/train/processes_test.py."""

import socket
import sys

from tests.helpers import processes

_CHECKS = '''
import os, pathlib, sys, threading
from uni_moe_jax.parallel import distributed, shared_folder
from uni_moe_jax.utils.errors import UsageError
address, i, a, b = sys.argv[1:]
cluster = distributed.Cluster(address, 2, int(i))
distributed.initialize(cluster)

def check(case, folder, create=True, timeout=1.):
  try:
    shared_folder.check(cluster, folder, create, timeout)
    print(f'> {case} passes', file=sys.stderr)
  except UsageError as e:
    print(f'> {case} {e}', file=sys.stderr)

check('one folder:', f'{a}/new')
check('two folders:', [a, b][int(i)])
check('a missing folder:', f'{a}/missing', create=False)
exists, late = os.path.exists, pathlib.Path(a, 'late')
os.path.exists = lambda path: late.is_file() and exists(path)  # as on a file system that lags behind
threading.Timer(1., late.touch).start()
check('a folder that lags behind:', a, timeout=20.)
'''


def test_a_folder_must_show_every_process_what_process_0_writes_there(tmp_path):
  a, b = tmp_path / 'a', tmp_path / 'b'
  b.mkdir()
  command = [sys.executable, '-c', _CHECKS, processes.free_address()]
  for i, (code, output) in enumerate(processes.together(*([*command, str(i), str(a), str(b)] for i in range(2)))):
    assert code == 0, output
    lines = [line.removeprefix('> ') for line in output.splitlines() if line.startswith('> ')]
    host, reason = socket.gethostname()[:64], 'its own output has the reason' if i else 'No such file or directory'
    assert lines[0] == 'one folder: passes'
    assert lines[1].startswith(
        f'two folders: workdir {[a, b][i]} is not shared: what process 0 ({host}) writes there does not appear for '
        f'process 1 ({host}) within 1 s. ')
    assert lines[2] == f'a missing folder: process 0 cannot write in workdir {a}/missing: {reason}.'
    assert lines[3:] == ['a folder that lags behind: passes']
  assert sorted(p.name for p in a.rglob('*')) == ['late', 'new'] and not list(b.iterdir())
