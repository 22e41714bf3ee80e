"""The embedded data in about an hour on two CPU cores: the quickstart's tasks with a larger model and more phrasings.

  python launch/prepare_data.py
  python launch/train.py --config=configs/embedded.py --workdir=runs/embedded
  python launch/evaluate.py --workdir=runs/embedded

The argument is the router: --config=configs/embedded.py:dense (attribute by default). It has not been run
to its end yet: no figures are promised.
"""

import ml_collections

from uni_moe_jax import config, recipes
from uni_moe_jax.tasks import nearest

ROUTERS = ('attribute', 'task', 'modality', 'token', 'context', 'dense')


def get_config(arg: str = 'attribute') -> ml_collections.ConfigDict:
  """Embedded: 6 layers, width 192, 8 experts, pictures of 32 pixels in patches of 8."""
  if arg not in ROUTERS:
    raise ValueError(f'configs/embedded.py:{arg} is unknown; {nearest(arg, ROUTERS)}.')
  c = config.base()
  recipes.embedded(c)
  c.model.update(dict(layers=6, width=192, heads=6, hidden=768))
  c.moe.router = arg
  c.tokenizer.vocab_size = 4000
  c.sets.vocabulary.samples = 1024
  c.tasks.glyph_name.batch = 128
  c.tasks.clip_motion.batch = 32
  c.tasks.glyph_caption.captions = ('{name}', '{name} in {face}')
  c.optim.update(dict(learning_rate=1e-3, warmup=150))
  c.train.update(dict(steps=2000, log_every=20, save_every=200))
  return c
