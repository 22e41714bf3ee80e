"""The downstream benchmarks of the published papers.

  uni-moe train --config=benchmark:task=coco_retrieval,run=runs/converted --workdir=runs/coco
  uni-moe evaluate --workdir=runs/coco

Arguments:
  task=TASK        imagenet1k (default), kinetics400, coco_caption, coco_retrieval, flickr30k_caption,
                   flickr30k_retrieval, msvd_caption, msvd_retrieval, msrvtt_caption, msrvtt_retrieval, vqa, cola, sst2,
                   mrpc, qqp, mnli, qnli or rte
  run=RUN          work directory of a trained or converted run, which gives the model and the tokenizer. Without it,
                   the published tiny model trains from scratch, which tests the pipeline but scores low
  image_size=N     pixels per side of the run's model in this task, such as 384; default: as the run has them. Positions
                   are computed, and scaled so that a patch keeps its place in the image
  mode=finetune    every parameter of the run trains (default)
  mode=prompts     prompts, norms and a linear head of the run train, as published; GLUE and VQA, for which nothing was
                   published, as in configs/prompt_tune.py
  mode=zero_shot   nothing trains; for uni-moe evaluate
  data=few|all     1 % of the training data (default of mode=prompts), or all of it (default otherwise)

docs/guides/benchmarks.md says how to obtain each dataset, and where a recipe differs from the published one. The
papers' tables are for the authors' checkpoints; no benchmark was completed here.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import benchmarks, presets
from uni_moe_jax.train import adaptation
from uni_moe_jax.utils.errors import UsageError


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Images of 224 pixels in patches of 16 and CLIP's vocabulary; or the model of the run."""
  a = config.arguments(arg, __file__, dict(task='imagenet1k', run='', image_size=0, mode='finetune', data=''),
                       dict(task=benchmarks.DOWNSTREAM, mode=adaptation.MODES, data=('few', 'all')))
  if a.mode != 'finetune' and not a.run:
    raise UsageError(f'benchmark:{arg}: mode={a.mode} adapts a run; give run=RUN.')
  if a.run:
    c, plan = adaptation.start_from(a.run, f'benchmark:{arg}')
  else:
    c = config.base()
    presets.published(c)
    c.model.variant = presets.SIZES['tiny']
    c.train.mixture, c.train.encode_all_sets = 'all_tasks', False  # there is one task
    c.tokenizer.type = 'clip'
  if a.image_size:
    c.model.posemb_scale *= c.model.image_size / a.image_size
    c.model.image_size = a.image_size
  benchmarks.downstream(c, a.task)
  if a.run:
    for t in c.tasks.values():  # a run has its own temperature groups and text length
      t.temperature = t.temperature if t.temperature in plan.temperatures else ''
      t.max_len = min(t.max_len, c.model.max_text_len)
    adaptation.share_temperatures(c, plan)
  if a.mode == 'finetune':
    benchmarks.finetuning(c, a.task)
  elif a.mode == 'prompts' and a.task in benchmarks.PROMPT_TUNING:
    benchmarks.prompt_tuning(c, a.task)
  else:
    adaptation.MODES[a.mode](c)
    c.tasks[a.task].linear_head = a.mode == 'prompts'  # GLUE and VQA choose among classes
    if a.mode == 'zero_shot':
      benchmarks.zero_shot(c, a.task)
  if a.data == 'few' or not a.data and a.mode == 'prompts':
    c.tasks[a.task].train_fraction = adaptation.TRAIN_FRACTION
  return c
