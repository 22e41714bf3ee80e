"""One of several processes that compute a step together, and compare it with one device of their own:
python -m tests.process_step HOST:PORT,PROCESSES,PROCESS FILE CASE…"""

import json
import pathlib
import sys

CASES = {'attribute': ('attribute', 0.0), 'token': ('token', 4.0)}  # name → router, capacity (here: room for all)


def main(place: str, file: str, *names: str) -> None:
  from uni_moe_jax import distributed
  distributed.start(place)
  import jax
  from tests import meshes

  out = {'devices': [len(jax.local_devices()), len(jax.devices())]}
  for name in names:
    router, capacity = CASES[name]
    case = meshes.Case(router, ('shape', 'pair'), layers=1, capacity=capacity)
    expected = meshes.of_run(meshes.run(case, meshes.ONE, jax.local_devices()))
    found = meshes.of_run(meshes.run(case, 'mixed', jax.devices()))
    out[name] = {'loss': abs(found.loss - expected.loss), 'gradients': max(meshes.differences(found, expected).values()),
                 'margin': expected.margin}
  pathlib.Path(file).write_text(json.dumps(out))


if __name__ == '__main__':
  main(*sys.argv[1:])
