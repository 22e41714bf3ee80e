"""The published pretraining: sixteen tasks in two stages, in four sizes, with any router.

  uni-moe preflight --config=pretrain:size=base,router=attribute,stage=1 --topology=v5e:16x16
  uni-moe train --config=pretrain:size=base,router=attribute,stage=1 --workdir=/shared/base-1 \
      --distributed=auto
  uni-moe train --config=pretrain:size=base,router=attribute,stage=2 --workdir=/shared/base-2 \
      --distributed=auto --config.train.init=/shared/base-1

Arguments:
  size=base            (default), tiny, small or large
  router=attribute     (default), task, modality, token, context or dense
  stage=1              (default) images of 160 pixels, 230 thousand steps (dense: 200); stage=2: 224 pixels, 50 thousand
                       steps (dense: 45), from stage 1
  mixture=all_tasks    (default) every step has all tasks, in the proportions in which mixture=one_task draws them, with
                       losses weighted to match: the expectation is the same, but retrieval contrasts with the whole
                       batch. one_task: each step has one task, drawn by sampling weight, and retrieval contrasts with
                       the pairs of one of the 64 ranks, as published

Batches are those of the 64 published ranks, in multiples of 256 examples, for 256 devices. Parameters of base and large
are split over mesh.data (mesh.fsdp), which must divide the width. On 512 devices, set mesh.data to 256 and mesh.model
to 2; tiny has three heads and fits 256 at most. On 8, set train.grad_accum_steps to 32; retrieval negatives then come
from one micro-step. docs/guides/benchmarks.md says how to obtain the data. CLIP's merges file is expected in the
current folder, or at --config.tokenizer.merges_path.

Sizes, loss and sampling weights, learning rates and steps are those published for the base model with experts and
without; other sizes use them too. The published run with experts had 56 ranks; 64 see as many examples in 201
and then 44 thousand steps. Not as published: bfloat16 instead of float16 with loss scaling, computed image positions,
and steps of all tasks, which update every parameter. This config has not been run; no scores are known.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import benchmarks, presets
from uni_moe_jax.tasks.router_names import DENSE, DISPATCHED, ROUTERS

RANKS = 64  # of the published run; each draws a task of its own
UNIT = 256  # examples; batches of a step of all tasks are multiples of it
# Task type → published batch of a rank in stage 2, where images are larger.
STAGE_2_BATCH = {'image_classification': 440, 'text_mlm': 512, 'image_caption': 200, 'image_retrieval': 320}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Sixteen tasks, patches of 16, CLIP's vocabulary, experts in every other layer."""
  a = config.arguments(arg, __file__, dict(size='base', router='attribute', stage=1, mixture='all_tasks'),
                       dict(size=presets.SIZES, router=ROUTERS, stage=(1, 2), mixture=('all_tasks', 'one_task')))
  first, dense = a.stage == 1, a.router == DENSE
  c = config.base()
  presets.published(c, weight_decay=0.2 if first and a.size in ('base', 'large') else 0.05)
  c.optim.param_groups = tuple(group for group in c.optim.param_groups if group[0] != 'embed/spatial$')  # computed here
  c.model.update(dict(variant=presets.SIZES[a.size], image_size=160 if first else 224, posemb='sincos2d', drop_path=0.1,
                      dtype='bfloat16'))
  c.moe.update(dict(router=a.router, placement='every_2'))
  if a.router in DISPATCHED:
    c.moe.update(dict(capacity_factor=1.25, balance_loss_weight=0.01))
  c.tokenizer.update(dict(type='clip', merges_path='bpe_simple_vocab_16e6.txt.gz'))
  benchmarks.pretraining(c)
  # Published numbers of classes; the lengths of their names are an assumption.
  c.preflight.target_lengths.update(dict(
      imagenet21k=((4, 9_000), (8, 12_000), (16, 842)), kinetics700=((4, 200), (8, 500)), moments=((4, 339),)))
  c.evaluators.coco_captions = config.evaluator(
      'caption', 'coco_caption', split='val', num_examples=5_000, during_training=True,
      **benchmarks.CAPTION_SEARCH)
  c.evaluators.coco_retrieval = config.evaluator(
      'retrieval', 'coco_retrieval', split='val', num_examples=5_000, during_training=True)
  if not first:
    _second_stage(c, dense)
  _weigh(c, one_task=a.mixture == 'one_task')
  peak = 1e-3 if first else 2e-5
  c.optim.update(dict(learning_rate=peak, warmup_steps=10_000 if first else 5_000, final_lr_fraction=1e-6 / peak))
  steps = (200_000 if dense else 230_000) if first else (45_000 if dense else 50_000)
  c.train.update(dict(steps=steps, log_every=50, checkpoint_every=2_000))
  # Base would fit without: but so each device merges and updates its part of the experts alone. The widths of tiny and
  # small are no multiples of 256 devices.
  c.mesh.fsdp = a.size in ('base', 'large')
  return c


def _second_stage(c: ml_collections.ConfigDict, dense: bool) -> None:
  """Larger images in smaller batches, without mixup; more frames of Kinetics, more often.

  dense: a model without experts, of which all but ImageNet has half the weight.
  """
  c.model.posemb_scale = 160 / 224  # a patch keeps its place in the image
  for t in c.tasks.values():
    t.batch_size = STAGE_2_BATCH.get(t.type, t.batch_size)
    t.loss_weight *= 0.5 if dense and t.type != 'image_classification' else 1.0
  c.tasks.imagenet21k.update(dict(mixup_alpha=0.0, cutmix_alpha=0.0))
  c.tasks.kinetics700.update(dict(batch_size=12, num_frames=8, sampling_weight=1.0))
  c.tasks.moments.update(dict(batch_size=68, sampling_weight=0.2))


def _weigh(c: ml_collections.ConfigDict, one_task: bool) -> None:
  """Turn the batches and weights of one rank into those of a step over all devices."""
  total = sum(t.sampling_weight for t in c.tasks.values())
  c.train.update(dict(mixture='one_task' if one_task else 'all_tasks', encode_all_sets=one_task))
  c.optim.unused_params = 'zerograd' if one_task else 'update'
  if one_task:
    [c.train.negatives] = {t.batch_size for t in c.tasks.values() if t.type == 'image_retrieval'}  # of a rank
  for t in c.tasks.values():
    if one_task:
      t.batch_size *= RANKS
      continue
    share = t.sampling_weight / total
    unit = 2 * UNIT if t.mixup_alpha or t.cutmix_alpha else UNIT  # pairs of one device are mixed
    t.batch_size = max(1, round(t.batch_size * RANKS * share / unit)) * unit
    t.loss_weight *= share
