"""All processes of a run must have one config. Runs that are refused: processes_test.py."""

import sys

from tests.helpers import processes, tiny
from uni_moe_jax.parallel.distributed import Cluster
from uni_moe_jax.train import same_config

_COMPARES = """
import sys
from tests.helpers import tiny
from uni_moe_jax.parallel import distributed, multihost
from uni_moe_jax.train import same_config
from uni_moe_jax.utils.errors import UsageError
address, i = sys.argv[1:]
cluster = distributed.Cluster(address, 3, int(i))
distributed.initialize(cluster)
for values in ({}, {'data.dir': f'/host{i}', 'data.cache_gb': 1.5 + int(i)}, {'train.steps': 6 + int(i) // 2},
               {'mesh.data': 1 + min(int(i), 1)}, {'train.init': f'hf:owner/run@{i}'}):
  c = tiny.config('shape', data_dir='/somewhere')
  c.update_from_flattened_dict(values)
  try:
    same_config.check(c, cluster)
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
    same_config.check(tiny.config('shape', data_dir='/somewhere'), cluster)
