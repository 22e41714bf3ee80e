"""Joint training of the embedded task kinds with attribute routing, on two CPU cores, in about eight minutes.

  python launch/prepare_data.py
  python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart
  python launch/evaluate.py --workdir=runs/quickstart

./launch/quickstart.sh does all of it. README.md holds the table of what it scores. Another router is one value:
--config.moe.router=dense|modality|task|attribute|token|context.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets


def get_config() -> ml_collections.ConfigDict:
  """Quickstart: 4 layers, width 128, 8 experts, pictures of 32 pixels in patches of 8."""
  c = config.base()
  presets.embedded(c)
  c.model.update(dict(layers=4, width=128, heads=2, hidden=512))
  for name, batch in dict(clip_motion=8, glyph_class=48, text=32, package=16).items():
    c.tasks[name].batch = batch
  c.tasks.text.weight = c.tasks.glyph_name.weight = 2.5
  # Clips of a motion and names of pictures ask the same features of a clip: a heavy motion task takes them away from names.
  c.tasks.clip_motion.weight = 0.15
  c.tasks.glyph_name.shift = 1
  c.sets.vocabulary.samples = 512
  c.optim.update(dict(learning_rate=2e-3, warmup=60))
  c.train.update(dict(steps=800, log_every=20, save_every=200))
  return c
