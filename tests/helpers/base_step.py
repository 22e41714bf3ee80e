"""Write the compiled training step of the base model on data 8 × expert 8.

  python -m tests.helpers.base_step ROUTER CAPACITY_FACTOR FILE

Nothing is executed, so 64 virtual devices and 0.6 billion parameters fit on a laptop.
"""

import pathlib
import sys

MESH = dict(data=8, expert=8)
WIDTH, MLP_DIM, NUM_EXPERTS, TOP_K, VOCAB_SIZE = 768, 3072, 8, 2, 2000
# The merged model classifies images and pairs them with texts. It has two conditions (images, texts on the target side)
# and three token arrays (images, texts, names).
CONDITIONS, NUM_ARRAYS = 2, 3
# The token model classifies images and captions them. Per array: tokens on one device (words and queries are dispatched
# separately), and how many of them the last layer computes. The [spe] token belongs to the first array of a sequence;
# [spe, word, end] are the tokens of each of the 512 sampled words.
TOKENS = {'images': ((197,), 1), 'names': ((5,), 1), 'captioned images': ((197,), 0), 'words and queries': ((9, 9), 9),
          'vocabulary': ((8 * 3,), 8)}


def main(router: str, capacity_factor: str, file: str) -> None:
  import jax

  from uni_moe_jax import config
  from uni_moe_jax.preflight import compiled_programs

  c = config.base()
  c.tokenizer.vocab_size = VOCAB_SIZE
  c.model.update(dict(num_layers=12, width=WIDTH, num_heads=12, mlp_dim=MLP_DIM))
  c.moe.update(dict(router=router, num_experts=NUM_EXPERTS, top_k=TOP_K, capacity_factor=float(capacity_factor)))
  c.mesh.update(MESH)
  devices = MESH['data'] * MESH['expert']
  c.target_sets.names = config.target_set('glyphs/class', family='names')
  c.preflight.target_lengths.names = ((4, devices),)
  c.tasks.image = config.task(
      'image_classification', 'glyphs', batch_size=devices, target_set='names', label_column='class')
  if router == 'token':
    c.target_sets.words = config.target_set('vocabulary', family='words', softmax='sampled', num_sampled=512)
    c.tasks.caption = config.task(
        'image_caption', 'glyphs', batch_size=devices, target_set='words', caption_templates=('{name}',), max_len=9)
  else:
    c.tasks.pair = config.task(
        'image_retrieval', 'glyphs', batch_size=devices, caption_templates=('{name}',), max_len=8)
  run = compiled_programs.prepare(c, jax.devices())
  pathlib.Path(file).write_text(compiled_programs.lowered(run, None).compile().as_text())


if __name__ == '__main__':
  main(*sys.argv[1:])
