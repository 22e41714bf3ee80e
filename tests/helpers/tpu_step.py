"""Write a training step compiled for four absent TPU chips: python -m tests.helpers.tpu_step FILE."""

import pathlib
import sys

MESH = dict(data=2, expert=2)
WIDTH, MLP_DIM, NUM_EXPERTS = 128, 256, 16
CONDITIONS = 2  # images, and names


def main(file: str) -> None:
  from uni_moe_jax.preflight import topology
  v5e = topology.parse('v5e:2x2')
  topology.prepare_environment(v5e)
  from tests.helpers import tiny
  from uni_moe_jax.preflight import compiled_programs

  c = tiny.config('shape')
  c.model.update(dict(num_layers=6, width=WIDTH, num_heads=2, mlp_dim=MLP_DIM, dtype='bfloat16', remat=True))
  c.moe.update(dict(num_experts=NUM_EXPERTS, placement='every_2'))
  c.preflight.target_lengths.shapes = ((8, 16),)
  c.mesh.update(dict(MESH, fsdp=True))
  run = compiled_programs.prepare(c, topology.devices(v5e))
  pathlib.Path(file).write_text(compiled_programs.lowered(run, None).compile().as_text())


if __name__ == '__main__':
  main(sys.argv[1])
