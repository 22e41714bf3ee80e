"""The embedded data in forty minutes on two CPU cores: the quickstart with five times as many steps.

  uni-moe prepare-data
  uni-moe train --config=embedded --workdir=runs/embedded
  uni-moe evaluate --workdir=runs/embedded

Argument: router=attribute (default), task, modality, token, context or dense. docs/results/embedded.md has the scores
and explains this file's settings.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets
from uni_moe_jax.tasks.router_names import ROUTERS


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """2 layers, width 128, 8 experts; images of 32 pixels in patches of 8."""
  a = config.arguments(arg, __file__, dict(router='attribute'), dict(router=ROUTERS))
  c = config.base()
  presets.quickstart(c)
  c.moe.router = a.router
  for name in ('glyph_class', 'glyph_name', 'glyph_caption'):
    c.tasks[name].update(dict(max_shift=1, max_affine=0.1))
  # Otherwise the paragraphs would be known by heart.
  c.tasks.package.word_dropout = 0.3
  c.optim.update(dict(name='muon', learning_rate=3e-3, warmup_steps=100))
  c.train.update(dict(steps=12000, log_every=20, checkpoint_every=600, cpu_bfloat16=True))
  return c
