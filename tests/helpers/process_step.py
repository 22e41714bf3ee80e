"""One of several processes that compute a step together, and compare it with one device of their own: what stands in for
launch/train.py where local_processes.sh starts it with the arguments FOLDER CASE… and those of
`distributed.Cluster`."""

import json
import pathlib

# Router → capacity (here: room for all). On this mesh merged kernels and tokens cross processes.
CASES = {'attribute': 0.0, 'token': 4.0}
MESH = 'expert'
# Meshes whose batch shards are asked for: every process's own, half a process's, and of all processes together.
SHARDS = {'data': dict(data=8), 'halves': dict(data=2, model=4), 'model': dict(model=8)}


def main(folder: str, *arguments: str) -> None:
  """Writes what process i found to FOLDER/i.json."""
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
    expected = meshes.of_run(meshes.run(case, meshes.ONE, jax.local_devices()))
    found = meshes.of_run(meshes.run(case, MESH, jax.devices()))
    out['cases'][name] = {
        'loss': abs(found.loss - expected.loss), 'gradients': max(meshes.differences(found, expected).values()),
        'margin': expected.margin}
  (pathlib.Path(folder) / f'{jax.process_index()}.json').write_text(json.dumps(out))
