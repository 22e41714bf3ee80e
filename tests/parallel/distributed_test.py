"""Processes of one run: what the flags mean, how processes join, and which one prints."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from uni_moe_jax.parallel import distributed
from uni_moe_jax.parallel.distributed import Cluster
from uni_moe_jax.utils.errors import UsageError

_ROOT = pathlib.Path(__file__).resolve().parents[2]
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
  environment |= {'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  return subprocess.Popen([sys.executable, '-c', _JOIN, repr(cluster)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)


def test_two_processes_see_the_devices_of_both_and_the_first_one_prints():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  processes = [_join(Cluster(f'127.0.0.1:{port}', 2, i)) for i in range(2)]
  outputs = [p.communicate(timeout=120) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  assert outputs[0][0] == 'out True True 0 of 2, 4 devices\n'
  assert outputs[1][0] == ''
  assert 'err False False 1 of 2, 4 devices\n' in outputs[1][1]


def test_auto_without_a_cluster_is_an_error():
  process = _join(Cluster())
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 1
  assert 'UsageError: --distributed=auto: no cluster is detected' in errors
