"""A model whose steps take milliseconds, on handwritten digits: for fault injection and tests.

  uni-moe prepare-data --embedded=digits
  uni-moe train --config=small --workdir=runs/small

It learns little; its scores mean nothing.
"""

import ml_collections

from uni_moe_jax import config


def get_config() -> ml_collections.ConfigDict:
  """One layer of width 16, four experts, one task; 200 steps, a checkpoint every ten."""
  c = config.base()
  c.model.update(dict(num_layers=1, width=16, num_heads=2, mlp_dim=16, image_size=32, patch_size=16, max_text_len=12,
                      layer_scale_init=0.5, remat=False))
  c.moe.num_experts = 4
  c.tokenizer.vocab_size = 25  # ten names have few letters
  c.target_sets.digits = config.target_set('digits/name', family='names')
  c.preflight.target_lengths.digits = ((8, 10),)
  c.tasks.digit = config.task(
      'image_classification', 'digits', batch_size=8, target_set='digits', label_column='name', max_shift=1)
  c.optim.update(dict(learning_rate=1e-2, warmup_steps=5))
  c.train.update(dict(steps=200, log_every=1, checkpoint_every=10, ema_decay=0.9))
  return c
