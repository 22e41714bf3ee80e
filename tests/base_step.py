"""Writes the compiled training step of the base model on data 8 × expert 8: python -m tests.base_step ROUTER CAPACITY FILE.

Nothing is computed, so that 64 virtual devices and 0.6 billion parameters fit on a laptop.
"""

import pathlib
import sys

MESH = dict(data=8, expert=8)
WIDTH, HIDDEN, EXPERTS, KEPT = 768, 3072, 8, 2
# Tokens of the arrays that a layer sees, on one device: two pictures, a paired text, an entry of the names. `spe` is one each.
TOKENS = {'pictures': 2 * 197, 'text': 9, 'names': 5}
ROWS = 2  # distinct router inputs: pictures, and texts on the target side


def main(router: str, capacity: str, file: str) -> None:
  from uni_moe_jax import config, resolve
  from uni_moe_jax.bench.synthetic import SyntheticData
  from uni_moe_jax.train import setup

  c = config.base()
  c.model.update(dict(layers=12, width=WIDTH, heads=12, hidden=HIDDEN))
  c.moe.update(dict(router=router, num_experts=EXPERTS, top_k=KEPT, capacity=float(capacity)))
  c.mesh.update(MESH)
  devices = MESH['data'] * MESH['expert']
  c.sets.names = config.target_set('glyphs/class', family='names')
  c.tasks.picture = config.task('image_classification', 'glyphs', batch=devices, target_set='names', label='class')
  c.tasks.pair = config.task('image_retrieval', 'glyphs', batch=devices, captions=('{name}',), length=8)
  data = SyntheticData(resolve.resolve(c), (c.model.image_size, 3), 2000, devices, {4: 1.0})
  run = setup.build(c, data=data)
  batch = run.put(next(run.mixture().iterate(0, 1))[1])
  compiled = run.step_fn().lower(run.like(), batch, run.sets()).compile()
  pathlib.Path(file).write_text(compiled.as_text())


if __name__ == '__main__':
  main(*sys.argv[1:])
