"""Writes the compiled training step of a small model for four TPU chips that are not there: python -m tests.helpers.tpu_step FILE."""

import pathlib
import sys

MESH = dict(data=2, expert=2)
WIDTH, HIDDEN, EXPERTS = 128, 256, 16
ROWS = 2  # distinct router inputs: pictures, and names


def main(file: str) -> None:
  from uni_moe_jax.tools.preflight import topology
  where = topology.parse('v5e:2x2')
  topology.prepare_environment(where)
  from tests.helpers import tiny
  from uni_moe_jax.tools.preflight import compiled_programs

  c = tiny.config('shape')
  c.model.update(dict(num_layers=6, width=WIDTH, num_heads=2, mlp_dim=HIDDEN, dtype='bfloat16', remat=True))
  c.moe.update(dict(num_experts=EXPERTS, placement='every_2'))
  c.preflight.target_lengths.shapes = ((8, 16),)
  c.mesh.update(dict(MESH, fsdp=True))
  run = compiled_programs.prepare(c, topology.devices(where))
  pathlib.Path(file).write_text(compiled_programs.lowered(run, None).compile().as_text())


if __name__ == '__main__':
  main(sys.argv[1])
