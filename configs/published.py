"""The published system's choices on the embedded data: where a converted checkpoint goes on.

  python launch/convert.py --checkpoint=model.pth --config=configs/published.py:tiny-moe --workdir=runs/converted \
      --config.tokenizer.merges_path=bpe_simple_vocab_16e6.txt.gz
  python launch/evaluate.py --workdir=runs/converted
  python launch/train.py --config=configs/published.py:tiny-moe --workdir=runs/converted \
      --config.tokenizer.merges_path=bpe_simple_vocab_16e6.txt.gz

The argument is SIZE or SIZE-moe: tiny, small, base or large; experts in every layer with `-moe` (in every other one with
--config.moe.placement=every_2). The merges file is CLIP's; it is not part of this package. One choice is not theirs: words are scored
against a sample of the vocabulary (--config.target_sets.vocabulary.softmax=full: all of it, most of a minute per step on two cores). The
embedded pictures have 32 pixels, so that a checkpoint's spatial table is interpolated; for a file that the authors' code should
load again, convert with --config.model.image_size=224. What it should score depends on the checkpoint: no figures are promised.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets, schema
from uni_moe_jax.utils.errors import UsageError


def get_config(arg: str = 'tiny-moe') -> ml_collections.ConfigDict:
  """Published: patches of 16, CLIP's vocabulary, one task a step, its optimizer."""
  size, _, experts = arg.partition('-')
  if size not in presets.SIZES or experts not in ('', 'moe'):
    raise UsageError(f'configs/published.py:{arg} is unknown; give one of {", ".join(presets.SIZES)}, with or without -moe.')
  c = config.base()
  presets.embedded(c)
  presets.published(c, weight_decay=0.2 if size in ('base', 'large') else 0.05)
  presets.published_size(c, size)
  c.model.update(dict(patch_size=16, max_text_len=512, max_num_frames=8))
  c.moe.router = 'attribute' if experts else 'dense'
  c.tokenizer.type = 'clip'
  # Exact scoring of 49 thousand words takes most of a minute per step on two cores; exact: --config.target_sets.vocabulary.softmax.
  c.target_sets.vocabulary.num_sampled = 2048
  weights = dict(image_classification=1.0, video_classification=0.1, text_mlm=0.5, image_caption=1.0, image_retrieval=0.5)
  for task in c.tasks.values():
    task.temperature = schema.PUBLISHED_GROUPS[task.type]
    task.loss_weight, task.sampling_weight = weights.get(task.type, 1.0), 1.0
  c.optim.update(dict(learning_rate=1e-3, warmup_steps=100, final_lr_fraction=1e-3))
  c.train.update(dict(steps=1000, log_every=20, checkpoint_every=200))
  return c
