"""A stand-in for launch/train.py: one of several processes compares its training step with one on a single device.

local_processes.sh starts it with the arguments FOLDER CASE… and the flags of `distributed.Cluster`.
"""

import json
import pathlib

# Router → capacity factor that drops nothing. On this mesh merged kernels and tokens cross processes.
CASES = {'attribute': 0.0, 'token': 4.0}
MESH = 'expert'
# Meshes with several shards per process, one shard per process, and one shard for all processes.
SHARDS = {'data': dict(data=8), 'halves': dict(data=2, model=4), 'model': dict(model=8)}


def main(folder: str, *arguments: str) -> None:
  """Write the result of process i to FOLDER/i.json."""
  *names, address, count, index = (argument.rpartition('=')[2] for argument in arguments)
  from uni_moe_jax.parallel import distributed
  distributed.initialize(distributed.Cluster(address, int(count), int(index)))
  import jax

  from tests.helpers import meshes
  from uni_moe_jax.parallel import sharding

  mesh = lambda axes: sharding.make_mesh({**dict.fromkeys(sharding.AXES, 1), **axes})
  out = {'devices': [len(jax.local_devices()), len(jax.devices())],
         'shards': {name: sharding.local_shards(mesh(axes)) for name, axes in SHARDS.items()}, 'cases': {}}
  for name in names:
    case = meshes.Case(name, ('shape', 'pair'), num_layers=1, capacity_factor=CASES[name])
    expected = meshes.run_step(meshes.run(case, meshes.ONE, jax.local_devices()))
    result = meshes.run_step(meshes.run(case, MESH, jax.devices()))
    out['cases'][name] = {'loss': abs(result.loss - expected.loss),
                          'gradients': max(meshes.differences(result, expected).values()), 'margin': expected.margin}
  (pathlib.Path(folder) / f'{jax.process_index()}.json').write_text(json.dumps(out))
