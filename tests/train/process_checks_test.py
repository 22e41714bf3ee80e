"""All processes of a run must have one config and see one folder. Runs that are refused: processes_test.py."""

import socket
import sys

from tests.helpers import processes, tiny
from uni_moe_jax.parallel.distributed import Cluster
from uni_moe_jax.train import process_checks

_COMPARES = """
import sys
from tests.helpers import tiny
from uni_moe_jax.parallel import distributed, multihost
from uni_moe_jax.train import process_checks
from uni_moe_jax.utils.errors import UsageError
address, i = sys.argv[1:]
cluster = distributed.Cluster(address, 3, int(i))
distributed.initialize(cluster)
for values in ({}, {'data.dir': f'/host{i}', 'data.cache_gb': 1.5 + int(i)}, {'train.steps': 6 + int(i) // 2},
               {'mesh.data': 1 + min(int(i), 1)}, {'train.init': f'hf:owner/run@{i}'}):
  c = tiny.config('shape', data_dir='/somewhere')
  c.update_from_flattened_dict(values)
  try:
    process_checks.check_config(c, cluster)
    print('> passes', file=sys.stderr)
  except UsageError as e:
    print(f'> {e}', file=sys.stderr)
print('>', multihost.gather_texts('é' * int(i) + 'x '), file=sys.stderr)
"""


def test_the_processes_of_a_run_have_one_config_but_for_where_their_data_is():
  command = [sys.executable, '-c', _COMPARES, processes.free_address()]
  same = 'Start the same command, with the same files and package, in all of them.'
  for code, output in processes.together(*([*command, str(i)] for i in range(3))):
    assert code == 0, output
    assert [line.removeprefix('> ') for line in output.splitlines() if line.startswith('> ')] == [
        'passes', 'passes',
        f'process 2 of 3 has another config than process 0 (train.steps: 6 → 7). {same}',
        f'process 1, 2 of 3 has another config than process 0 (mesh.data: 1 → 2). {same}',
        "process 1, 2 of 3 has another config than process 0 (train.init: 'hf:owner/run@0' → 'hf:owner/run@1'). "
        f'{same} Give an address on the Hub its revision.',
        "['x ', 'éx ', 'ééx ']"]


def test_a_single_process_compares_nothing_and_a_cluster_of_one_agrees_with_itself():
  for cluster in (None, Cluster()):
    process_checks.check_config(tiny.config('shape', data_dir='/somewhere'), cluster)


_CHECKS = '''
import errno, os, pathlib, sys, threading
from uni_moe_jax.parallel import distributed
from uni_moe_jax.io import storage
from uni_moe_jax.train import process_checks
from uni_moe_jax.utils.errors import RunError, UsageError
address, i, a, b = sys.argv[1:]
cluster = distributed.Cluster(address, 2, int(i))
distributed.initialize(cluster)

def check(case, folder, create=True, timeout=1.):
  try:
    process_checks.check_folder(cluster, folder, create, timeout)
    print(f'> {case} passes', file=sys.stderr)
  except (UsageError, RunError) as e:
    print(f'> {case} {type(e).__name__}: {e}', file=sys.stderr)

check('one folder:', f'{a}/new')
check('two folders:', [a, b][int(i)])
check('a missing folder:', f'{a}/missing', create=False)
exists, late = os.path.exists, pathlib.Path(a, 'late')
os.path.exists = lambda path: late.is_file() and exists(path)  # as on a file system that lags behind
threading.Timer(1., late.touch).start()
check('a folder that lags behind:', a, timeout=20.)

class HttpError(Exception): pass

def refuse(error):
  def write(*_): raise error
  storage.write_bytes = write

bucket = 'gs://bucket/run'
for folder, error in ((bucket, OSError('Forbidden: https://storage/run')),
                      (bucket, HttpError('Service Unavailable, 503')), (bucket, FileNotFoundError('bucket/run')),
                      *((a, OSError(number, os.strerror(number))) for number in (
                          errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ESTALE, errno.ETIMEDOUT))):
  refuse(error)
  check('a store:', folder, create=False)
'''


def test_a_folder_must_show_every_process_what_process_0_writes_there(tmp_path):
  a, b = tmp_path / 'a', tmp_path / 'b'
  b.mkdir()
  command = [sys.executable, '-c', _CHECKS, processes.free_address()]
  for i, (code, output) in enumerate(processes.together(*([*command, str(i), str(a), str(b)] for i in range(2)))):
    assert code == 1, output  # by the RunErrors
    lines = [line.removeprefix('> ') for line in output.splitlines() if line.startswith('> ')]
    host = socket.gethostname()[:64]
    own = 'its own output has the reason'
    give = '. Give a folder where it may write'
    reachable = '. Check that its disk is reachable; the same command continues'
    assert lines[0] == 'one folder: passes'
    assert lines[1].startswith(
        f'two folders: UsageError: workdir {[a, b][i]} is not shared: what process 0 ({host}) writes there does not '
        f'appear for process 1 ({host}) within 1 s. ')
    missing = own if i else f'No such file or directory{give}'
    assert lines[2] == f'a missing folder: UsageError: process 0 cannot write in workdir {a}/missing: {missing}.'
    assert lines[3:] == ['a folder that lags behind: passes', *(
        f'a store: {error}: process 0 cannot write in workdir {folder}: {own if i else reason}.'
        for error, folder, reason in (
            ('UsageError', 'gs://bucket/run', 'permission is denied. Give the account the right to list, read, write '
             'and delete objects in this bucket'),
            ('RunError', 'gs://bucket/run', 'the store does not answer, or only with errors, also to repeated '
             'requests. Check the network; the same command continues'),
            ('UsageError', 'gs://bucket/run', f'bucket/run{give}'),
            ('RunError', a, 'No space left on device. Free some space; the same command continues'),
            ('UsageError', a, f'Permission denied{give}'), ('UsageError', a, f'Read-only file system{give}'),
            ('UsageError', a, f'File name too long{give}'), ('RunError', a, f'Stale file handle{reachable}'),
            ('RunError', a, f'Connection timed out{reachable}')))]
  assert sorted(p.name for p in a.rglob('*')) == ['late', 'new'] and not list(b.iterdir())
