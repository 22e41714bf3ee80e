"""The published pretraining: sixteen tasks in two stages, in the published sizes, dense or with one of five routers.

  python launch/preflight.py --config=configs/pretrain.py:base-attribute-1 --topology=v5e:16x16
  python launch/train.py --config=configs/pretrain.py:base-attribute-1 --workdir=/shared/base-1 --distributed=auto
  python launch/train.py --config=configs/pretrain.py:base-attribute-2 --workdir=/shared/base-2 --distributed=auto \
      --config.train.init=/shared/base-1

The argument is SIZE-ROUTER-STAGE: tiny, small, base or large; dense, attribute, task, modality, token or context; stage 1 (160
pixels, 230 thousand steps) or 2 (224 pixels, 50 thousand, from stage 1). With -sampled behind it a step holds one task, drawn by
its sampling weight, as published; without, every step holds every task in the proportion in which those would be drawn, and
weighs its loss so: the same expectation. Batches are those of 64 published ranks, in multiples of 256 examples, for 256 devices.

docs/guides/benchmarks.md says how to obtain the data. CLIP's merges lie where you start, or where --config.tokenizer.merges_path says. Sizes, loss
and sampling weights, rates and steps are those published for the base model; other sizes take them over. Not as published:
bfloat16 instead of float16 with loss scaling; positions of pictures are computed, and not rescaled when stage 2 has more of them; a
mixed step updates every parameter. It has not been run: no figures are promised.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import benchmarks, presets
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

ROUTERS = ('dense', 'attribute', 'task', 'modality', 'token', 'context')
RANKS = 64  # of the published run; each draws a task of its own
UNIT = 256  # examples: what batches of a mixed step are multiples of
# TaskType → published batch of a rank in stage 2, where pictures are larger.
SECOND = {'image_classification': 440, 'text_mlm': 512, 'image_caption': 200, 'image_retrieval': 320}


def get_config(arg: str = 'base-attribute-1') -> ml_collections.ConfigDict:
  """arg: SIZE-ROUTER-STAGE, or SIZE-ROUTER-STAGE-sampled."""
  size, router, stage, *mixture = arg.split('-') if arg.count('-') >= 2 else (arg, '', '')
  for value, known in ((size, presets.SIZES), (router, ROUTERS), (stage, ('1', '2')), ('-'.join(mixture), ('', 'sampled'))):
    if value not in known:
      raise UsageError(f'configs/pretrain.py:{arg}: give SIZE-ROUTER-STAGE, for example base-attribute-1; {value!r} is unknown, '
                       f'{nearest(value, known)}.')
  first = stage == '1'
  c = config.base()
  presets.published(c, weight_decay=0.2 if first and size in ('base', 'large') else 0.05)
  presets.published_size(c, size)
  c.optim.param_groups = tuple(rule for rule in c.optim.param_groups if rule[0] != 'embed/spatial$')  # computed, not stored
  c.model.update(dict(
      image_size=160 if first else 224, patch_size=16, max_text_len=512, max_num_frames=8, posemb='sincos2d', drop_path=0.1, dtype='bfloat16'))
  c.moe.update(dict(router=router, placement='every_2'))
  if router in ('token', 'context'):
    c.moe.update(dict(capacity_factor=1.25, balance_loss_weight=0.01))
  c.tokenizer.update(dict(type='clip', merges_path='bpe_simple_vocab_16e6.txt.gz'))
  benchmarks.pretraining(c)
  # Published numbers of classes; how long their names are is an assumption.
  c.preflight.target_lengths.update(dict(
      imagenet21k=((4, 9_000), (8, 12_000), (16, 842)), kinetics700=((4, 200), (8, 500)), moments=((4, 339),)))
  c.evaluators.coco_captions = config.evaluator('caption', 'coco_caption', split='val', num_examples=5_000, beam_size=2)
  c.evaluators.coco_retrieval = config.evaluator('retrieval', 'coco_retrieval', split='val', num_examples=5_000)
  if not first:
    _second_stage(c)
  _weigh(c, sampled=bool(mixture))
  peak = 1e-3 if first else 2e-5
  c.optim.update(dict(learning_rate=peak, warmup_steps=10_000 if first else 5_000, final_lr_fraction=1e-6 / peak))
  c.train.update(dict(steps=230_000 if first else 50_000, log_every=50, checkpoint_every=2_000))
  c.mesh.fsdp = size == 'large'
  return c


def _second_stage(c: ml_collections.ConfigDict) -> None:
  """Larger pictures in smaller batches, unmixed; more frames of Kinetics, more often."""
  for t in c.tasks.values():
    t.batch_size = SECOND.get(t.type, t.batch_size)
  c.tasks.imagenet21k.update(dict(mixup_alpha=0.0, cutmix_alpha=0.0))
  c.tasks.kinetics700.update(dict(batch_size=12, num_frames=8, sampling_weight=1.0))
  c.tasks.moments.update(dict(batch_size=68, sampling_weight=0.2))


def _weigh(c: ml_collections.ConfigDict, sampled: bool) -> None:
  """From what one rank draws to what a step of all devices holds."""
  total = sum(t.sampling_weight for t in c.tasks.values())
  c.train.update(dict(mixture='one_task' if sampled else 'all_tasks', encode_all_sets=sampled))
  c.optim.unused_params = 'zerograd' if sampled else 'update'
  for t in c.tasks.values():
    if sampled:
      t.batch_size *= RANKS
      continue
    share = t.sampling_weight / total
    unit = 2 * UNIT if t.mixup_alpha or t.cutmix_alpha else UNIT  # mixed are pairs of one device
    t.batch_size = max(1, round(t.batch_size * RANKS * share / unit)) * unit
    t.loss_weight *= share
