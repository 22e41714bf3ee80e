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
  c.model.update(dict(num_layers=4, width=128, num_heads=2, mlp_dim=512))
  for name, batch in dict(video_motion=8, glyph_class=48, text=32, package=16).items():
    c.tasks[name].batch_size = batch
  c.tasks.text.loss_weight = c.tasks.glyph_name.loss_weight = 2.5
  # Clips of a motion and names of pictures ask the same features of a clip: a heavy motion task takes them away from names.
  c.tasks.video_motion.loss_weight = 0.15
  c.tasks.glyph_name.max_shift = 1
  c.target_sets.vocabulary.num_sampled = 512
  c.optim.update(dict(learning_rate=2e-3, warmup_steps=60))
  c.train.update(dict(steps=800, log_every=20, checkpoint_every=200))
  return c
