"""The published choices on the embedded data: for converted checkpoints and for training them further.

  uni-moe convert --checkpoint=model.pth --config=published:size=tiny,moe=true \
      --workdir=runs/converted --config.tokenizer.merges_path=/path/to/bpe_simple_vocab_16e6.txt.gz
  uni-moe evaluate --workdir=runs/converted
  uni-moe train --config=published:size=tiny,moe=true --workdir=runs/converted \
      --config.tokenizer.merges_path=/path/to/bpe_simple_vocab_16e6.txt.gz

Arguments:
  size=tiny       (default), small, base or large
  moe=true        (default) experts in every layer (--config.moe.placement=every_2: in every other layer); false: none
  image_size=32   (default) as the embedded images have; 224 for benchmarks, or for a file that the authors' code loads.
                  Positions are scaled from 160 pixels, as in the released checkpoints

The merges file is CLIP's; it is not part of this package. One choice is not published: words are scored against a
sample of the vocabulary (--config.target_sets.vocabulary.softmax=full: all 49 thousand, most of a minute per step on
two cores). The scores depend on the checkpoint.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets, schema


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Patches of 16, CLIP's vocabulary, one task per step, the published optimizer."""
  a = config.arguments(arg, __file__, dict(size='tiny', moe=True, image_size=32), dict(size=presets.SIZES))
  c = config.base()
  presets.embedded_tasks(c)
  c.compat, c.model.variant = 'published', presets.SIZES[a.size]
  c.model.update(dict(image_size=a.image_size, posemb_scale=160 / (a.image_size or 160)))
  if a.size in ('base', 'large'):
    c.optim.param_groups = schema.param_groups(weight_decay=0.2)
  c.moe.router = 'attribute' if a.moe else 'dense'
  c.tokenizer.type = 'clip'
  c.target_sets.vocabulary.num_sampled = 2048
  loss_weights = dict(video_classification=0.1, text_mlm=0.5, image_retrieval=0.5)
  for t in c.tasks.values():
    t.temperature = schema.PUBLISHED_GROUPS[t.type]
    t.loss_weight, t.sampling_weight = loss_weights.get(t.type, 1.0), 1.0
  c.optim.update(dict(learning_rate=1e-3, warmup_steps=100, final_lr_fraction=1e-3))
  c.train.update(dict(steps=1000, log_every=20, checkpoint_every=200))
  return c
