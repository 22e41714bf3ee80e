"""Processes of one run: what the flags mean, how processes join, and which one prints."""

import os
import subprocess
import sys
import time

import pytest

from tests.helpers import processes
from tests.helpers.processes import ROOT
from uni_moe_jax.parallel import distributed
from uni_moe_jax.parallel.distributed import Cluster
from uni_moe_jax.utils.errors import UsageError

_JOIN = '''
import sys
from uni_moe_jax.parallel import distributed
from uni_moe_jax.parallel.distributed import Cluster
returned = distributed.initialize(eval(sys.argv[1]))
import jax
rank = f'{jax.process_index()} of {jax.process_count()}'
line = f'{returned} {distributed.is_primary()} {rank}, {jax.device_count()} devices'
print('out', line)
print('err', line, file=sys.stderr)
'''


@pytest.mark.parametrize('flags, cluster', [
    (('off', None, None, None), None), (('auto', None, None, None), Cluster()),
    (('off', '127.0.0.1:7733', 2, 0), Cluster('127.0.0.1:7733', 2, 0)),
    (('off', 'pod-0.pod.default:8476', 16, 15), Cluster('pod-0.pod.default:8476', 16, 15)),
    (('off', '[::1]:99', 1, 0), Cluster('[::1]:99', 1, 0)),
])
def test_flags_describe_one_process_a_detected_cluster_or_a_given_one(flags, cluster):
  assert distributed.parse(*flags) == cluster


@pytest.mark.parametrize('flags, message', [
    (('off', 'host', 2, 0), "--coordinator_address='host' must be HOST:PORT, for example 127.0.0.1:7733"),
    (('off', 'host:1', 2, None), '--coordinator_address, --num_processes also need --process_id'),
    (('off', None, 2, None), '--num_processes also needs --coordinator_address, --process_id'),
    (('off', 'host:1', 2, -1), '--process_id=-1 must be in [0, 2), for --num_processes=2'),
    (('off', 'host:1', 2, 2), '--process_id=2 must be in [0, 2), for --num_processes=2'),
    (('auto', 'host:1', 2, 0), 'leave out --coordinator_address, --num_processes, --process_id'),
])
def test_flags_that_do_not_fit_are_named(flags, message):
  with pytest.raises(UsageError) as raised:
    distributed.parse(*flags)
  assert message in str(raised.value)


def _join(cluster: Cluster) -> subprocess.Popen:
  others = ('SLURM', 'OMPI', 'TPU_', 'KUBERNETES', 'JAX_COORD')
  environment = {k: v for k, v in os.environ.items() if not k.startswith(others)}
  flags = '--xla_force_host_platform_device_count=2'
  environment |= {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  return subprocess.Popen([sys.executable, '-c', _JOIN, repr(cluster)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)


def test_two_processes_see_the_devices_of_both_and_the_first_one_prints():
  address = processes.free_address()
  joined = [_join(Cluster(address, 2, i)) for i in range(2)]
  outputs = [p.communicate(timeout=120) for p in joined]
  assert [p.returncode for p in joined] == [0, 0], outputs
  assert outputs[0][0] == 'out True True 0 of 2, 4 devices\n'
  assert outputs[1][0] == ''
  assert 'err False False 1 of 2, 4 devices\n' in outputs[1][1]


_STOPPED = '''
import signal
import sys
import time
from uni_moe_jax.parallel import distributed
from uni_moe_jax.cli import boundary as cli
with cli.exit_on_signals(75):
  i = int(sys.argv[2])
  distributed.initialize(distributed.Cluster(sys.argv[1], 2, i))
  time.sleep(1 - i)  # JAX aborts a process that outlives the one that coordinates
  signal.raise_signal(signal.SIGTERM)
'''


def test_a_process_that_has_joined_another_one_still_handles_sigterm_by_python():
  command = [sys.executable, '-c', _STOPPED, processes.free_address()]
  ended = processes.together(*([*command, str(i)] for i in range(2)), timeout=100)
  assert [code for code, _ in ended] == [75, 75], ended


# A command of three arguments: the address, the number of this process, and what each of the two does.
_COMMAND = '''
import sys
import time
from uni_moe_jax.parallel import distributed, multihost
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.utils.errors import RunError, UsageError
address, i, actions = sys.argv[1:]

def main():
  distributed.initialize(distributed.Cluster(address, 2, int(i)))
  multihost.sums_over_processes([1])
  action = actions.split(',')[int(i)]
  if action == 'later':
    time.sleep(2)
  if action in ('mistake', 'later'):
    raise UsageError(f'the folder is missing for {i}.')
  if action == 'failure':
    raise RunError('the checkpoint is damaged.')
  if action == 'denied':
    raise PermissionError(13, 'Permission denied', '/data')
  if action == 'defect':
    raise KeyError('image')
  with multihost.exit_with_peers():
    multihost.sums_over_processes([1])
  print(multihost.sums_over_processes([int(i), 2**40]))
  return 0

sys.exit(cli.guarded(main))
'''


_LOST = 'error: another process of this run has died'


@pytest.mark.parametrize('actions, codes, messages', [
    ('continue,continue', (0, 0), ('[1, 2199023255552]', '')),
    ('continue,mistake', (1, 2), (_LOST, 'error: the folder is missing for 1.')),
    pytest.param('continue,failure', (1, 1), (_LOST, 'error: the checkpoint is damaged.'), marks=pytest.mark.nightly),
    pytest.param('continue,denied', (1, 1), (_LOST, 'error: /data: Permission denied. '), marks=pytest.mark.nightly),
    ('continue,defect', (1, 1), (_LOST, "KeyError: 'image'")),
    pytest.param('mistake,later', (2, 2), ('error: the folder is missing for 0.',
                                           'error: the folder is missing for 1.'), marks=pytest.mark.nightly),
], ids=lambda x: x.replace(',', '_and_') if isinstance(x, str) else '')
def test_a_process_that_fails_ends_at_once_with_its_code_and_reason_and_the_other_one_too(actions, codes, messages):
  command, started = [sys.executable, '-c', _COMMAND, processes.free_address()], time.monotonic()
  ended = processes.together(*([*command, str(i), actions] for i in range(2)), timeout=100)
  assert time.monotonic() - started < 90, ended
  for (code, output), expected, message in zip(ended, codes, messages, strict=True):
    assert code == expected and message in output, output
    assert output.count('error: ') == message.count('error: '), output


@pytest.mark.nightly
def test_a_mistake_of_the_process_that_coordinates_ends_the_others_too():
  command = [sys.executable, '-c', _COMMAND, processes.free_address()]
  (code, output), (other, _) = processes.together(
      *([*command, str(i), 'mistake,continue'] for i in range(2)), timeout=100)
  assert code == 2 and 'error: the folder is missing for 0.' in output
  assert other not in (0, 2)


def test_auto_without_a_cluster_is_an_error():
  process = _join(Cluster())
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 1
  assert 'UsageError: --distributed=auto: no cluster is detected' in errors
