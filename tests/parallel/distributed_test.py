"""Processes of one run: what --distributed means, who finds whom, and who speaks."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from uni_moe_jax.parallel import distributed
from uni_moe_jax.parallel.distributed import Place

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_JOIN = '''
import sys
from uni_moe_jax.parallel import distributed
spoke = distributed.start(sys.argv[1])
import jax
said = f'{spoke} {distributed.is_primary()} {jax.process_index()} of {jax.process_count()}, {jax.device_count()} devices'
print('out', said)
print('err', said, file=sys.stderr)
'''


@pytest.mark.parametrize('value, meaning', [
    ('off', 'off'), ('auto', 'auto'),
    ('127.0.0.1:7733,2,0', Place('127.0.0.1:7733', 2, 0)),
    ('pod-0.pod.default:8476,16,15', Place('pod-0.pod.default:8476', 16, 15)),
    ('[::1]:99,1,0', Place('[::1]:99', 1, 0)),
])
def test_a_value_is_off_auto_or_a_place(value, meaning):
  assert distributed.parse(value) == meaning


@pytest.mark.parametrize('value, said', [
    ('on', "--distributed='on' must be 'off', 'auto', or HOST:PORT,PROCESSES,PROCESS, for example 127.0.0.1:7733,2,0"),
    ('host,2,0', 'must be'), ('host:1,2', 'must be'), ('host:1,2,-1', 'must be'),
    ('host:1,2,2', 'there is no process 2 of 2; they are counted from 0'),
])
def test_another_value_is_told_what_it_may_be(value, said):
  with pytest.raises(ValueError) as raised:
    distributed.start(value)
  assert said in str(raised.value)


def _environment() -> dict[str, str]:
  flags = '--xla_force_host_platform_device_count=2'
  clusters = ('SLURM', 'OMPI', 'TPU_', 'KUBERNETES', 'JAX_COORD')
  kept = {k: v for k, v in os.environ.items() if not k.startswith(clusters)}
  return {**kept, 'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}


def _join(value: str) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, '-c', _JOIN, value], env=_environment(), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)


def test_two_processes_see_the_devices_of_both_and_the_first_one_speaks():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  processes = [_join(f'127.0.0.1:{port},2,{i}') for i in range(2)]
  said = [p.communicate(timeout=120) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], said
  assert said[0][0] == 'out True True 0 of 2, 4 devices\n'
  assert said[1][0] == ''
  assert 'err False False 1 of 2, 4 devices\n' in said[1][1]


def test_auto_does_not_go_on_alone_where_nothing_says_who_takes_part():
  process = _join('auto')
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 1
  assert "ValueError: --distributed='auto': nothing says here who takes part" in errors
