"""Joint training of the embedded tasks with the attribute router: about ten minutes on two CPU cores.

  uni-moe prepare-data
  uni-moe train --config=quickstart --workdir=runs/quickstart --compile_separately
  uni-moe evaluate --workdir=runs/quickstart

./launch/quickstart.sh runs these, writes a report and exports. README.md has the scores. Another router is one
override: --config.moe.router=dense|modality|task|attribute|token|context.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets


def get_config() -> ml_collections.ConfigDict:
  """2 layers, width 128, 8 experts; images of 32 pixels in patches of 8."""
  c = config.base()
  presets.quickstart(c)
  c.tasks.glyph_name.max_shift = 1
  c.optim.update(dict(name='muon', learning_rate=4e-3, warmup_steps=60))
  c.train.update(dict(steps=2400, log_every=20, checkpoint_every=600, cpu_bfloat16=True))
  return c
