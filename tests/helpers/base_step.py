"""Writes the compiled training step of the base model on data 8 × expert 8: python -m tests.helpers.base_step ROUTER CAPACITY FILE.

Nothing is computed, so that 64 virtual devices and 0.6 billion parameters fit on a laptop.
"""

import pathlib
import sys

MESH = dict(data=8, expert=8)
WIDTH, HIDDEN, EXPERTS, KEPT, WORDS = 768, 3072, 8, 2, 2000
# Of a merged model, which classifies pictures and pairs them with texts: distinct router inputs (pictures, texts on the target
# side), and arrays of tokens (pictures, texts, names).
ROWS, PRODUCTS = 2, 3
# Of a token model, which classifies pictures and captions them: tokens of every array on one device, words and queries apart, and
# how many of them are read. `spe` is one of a sequence's first array; [spe, word, end] are the rows of 512 sampled words.
ARRAYS = {'pictures': ((197,), 1), 'names': ((5,), 1), 'captioned pictures': ((197,), 0), 'words and queries': ((9, 9), 9),
          'vocabulary': ((8 * 3,), 8)}


def main(router: str, capacity: str, file: str) -> None:
  import jax

  from uni_moe_jax import config
  from uni_moe_jax.tools.preflight import compiled_programs

  c = config.base()
  c.tokenizer.vocab_size = WORDS
  c.model.update(dict(num_layers=12, width=WIDTH, num_heads=12, mlp_dim=HIDDEN))
  c.moe.update(dict(router=router, num_experts=EXPERTS, top_k=KEPT, capacity_factor=float(capacity)))
  c.mesh.update(MESH)
  devices = MESH['data'] * MESH['expert']
  c.target_sets.names = config.target_set('glyphs/class', family='names')
  c.preflight.target_lengths.names = ((4, devices),)
  c.tasks.picture = config.task('image_classification', 'glyphs', batch_size=devices, target_set='names', label_column='class')
  if router == 'token':
    c.target_sets.words = config.target_set('vocabulary', family='words', softmax='sampled', num_sampled=512)
    c.tasks.caption = config.task('image_caption', 'glyphs', batch_size=devices, target_set='words', caption_templates=('{name}',), max_len=9)
  else:
    c.tasks.pair = config.task('image_retrieval', 'glyphs', batch_size=devices, caption_templates=('{name}',), max_len=8)
  run = compiled_programs.prepare(c, jax.devices())
  pathlib.Path(file).write_text(compiled_programs.lowered(run, None).compile().as_text())


if __name__ == '__main__':
  main(*sys.argv[1:])
