"""Fine-tunes a trained run on one task: every parameter trains, lower layers more slowly.

  python launch/train.py --config=configs/finetune.py:runs/quickstart,digits --workdir=runs/digits-finetuned
  python launch/evaluate.py --workdir=runs/digits-finetuned

The argument is RUN,TASK or RUN,TASK,few: the workdir of the run, and a task: digits (handwritten ones), video_caption,
video_name or one of the run's own. `few` reads ten examples of every class, or one example in a hundred. `launch/sweep.py` compares it with
`prompt_tune.py` and `zero_shot.py`; no figures are promised.
"""

import ml_collections

from uni_moe_jax.train import finetuning


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Model, tokenizer and data are the run's."""
  return finetuning.finetune(arg)
