"""The embedded data in about an hour on two CPU cores: the quickstart's tasks, for seven times its steps.

  python launch/prepare_data.py
  python launch/train.py --config=configs/embedded.py --workdir=runs/embedded
  python launch/evaluate.py --workdir=runs/embedded

The argument is the router: --config=configs/embedded.py:dense (attribute by default). docs/results/embedded.md says what it reaches, and
why it is as it is.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

ROUTERS = ('attribute', 'task', 'modality', 'token', 'context', 'dense')


def get_config(arg: str = 'attribute') -> ml_collections.ConfigDict:
  """Embedded: 4 layers, width 128, 8 experts, pictures of 32 pixels in patches of 8."""
  if arg not in ROUTERS:
    raise UsageError(f'configs/embedded.py:{arg} is unknown; {nearest(arg, ROUTERS)}.')
  c = config.base()
  presets.embedded(c)
  # Small, so that an hour holds many examples. Queries and keys start apart: where they are equal, `spe` first looks at itself
  # alone, and what a picture or clip shows reaches it late (motions stay at chance for hundreds of steps).
  c.model.update(dict(num_layers=4, width=128, num_heads=2, mlp_dim=512, mimetic_init=False, frame_differences=True))
  c.moe.router = arg
  c.target_sets.vocabulary.num_sampled = 512
  for name, batch in dict(
      glyph_class=32, glyph_name=96, glyph_caption=80, video_motion=8, text=16, package=16).items():
    c.tasks[name].batch_size = batch
  c.tasks.glyph_name.loss_weight, c.tasks.glyph_caption.loss_weight = 2.5, 2.0
  # Lighter than one: clips of a motion and names of pictures ask the same features of a clip, see configs/quickstart.py.
  c.tasks.video_motion.loss_weight = 0.3
  for name in ('glyph_class', 'glyph_name', 'glyph_caption'):
    c.tasks[name].max_shift = 2
  c.optim.update(dict(learning_rate=2e-3, warmup_steps=100))
  c.train.update(dict(steps=5500, log_every=20, checkpoint_every=200))
  return c
