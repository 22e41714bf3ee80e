"""The downstream benchmarks of the published papers.

  python launch/train.py --config=configs/benchmark.py:coco_retrieval,runs/converted --workdir=runs/coco
  python launch/evaluate.py --workdir=runs/coco

The argument is BENCHMARK[,RUN[,finetune|prompts|untuned]]: imagenet1k, kinetics400, coco_caption, coco_retrieval,
flickr30k_caption, flickr30k_retrieval, msvd_caption, msvd_retrieval, msrvtt_caption, msrvtt_retrieval, vqa, cola, sst2, mrpc, qqp,
mnli, qnli or rte, and a trained or converted run to start from, which gives the model and the words. `prompts` tunes as
configs/prompt_tune.py does, `untuned` is for launch/evaluate.py. Without a run the published tiny model starts afresh: that shows a
pipeline, and scores little. docs/guides/benchmarks.md says how to obtain each data set, and where a recipe is not the published one. What
it should score depends on the run: the papers' tables hold for the authors' checkpoints; none was run here to its end.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import benchmarks, presets
from uni_moe_jax.train import finetuning
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest


def get_config(arg: str = 'imagenet1k') -> ml_collections.ConfigDict:
  """Downstream: pictures of 224 pixels in patches of 16, CLIP's vocabulary, or the model of the run."""
  name, _, rest = arg.partition(',')
  run, _, mode = rest.partition(',')
  if name not in benchmarks.DOWNSTREAM:
    raise UsageError(f'configs/benchmark.py:{arg}: benchmark {name!r} is unknown; {nearest(name, benchmarks.DOWNSTREAM)}.')
  if mode not in finetuning.MODES:
    raise UsageError(f'configs/benchmark.py:{arg}: mode {mode!r} is unknown; {nearest(mode, finetuning.MODES)}.')
  if run:
    c, plan = finetuning.start_from(run, f'configs/benchmark.py:{arg}')
  else:
    c, plan = config.base(), None
    presets.published(c)
    presets.published_size(c, 'tiny')
    c.train.mixture, c.train.encode_all_sets = 'all_tasks', False  # one task
    c.tokenizer.type = 'clip'
    c.model.max_text_len = 512
  benchmarks.DOWNSTREAM[name](c)
  if run:
    for t in c.tasks.values():  # a run has its own groups, and its own room for texts
      t.temperature = t.temperature if t.temperature in plan.temperatures else ''
      t.max_len = min(t.max_len, c.model.max_text_len)
    finetuning.share_temperatures(c, plan)
  if run and mode in ('prompts', 'untuned'):
    finetuning.MODES[mode](c)
  else:
    benchmarks.finetuning(c, name)
  return c
