"""Tunes prompts, norms and a linear head of a trained run for one task; every other parameter stays as it is, bit for bit.

  python launch/train.py --config=configs/prompt_tune.py:runs/quickstart,digits --workdir=runs/digits-prompts
  python launch/evaluate.py --workdir=runs/digits-prompts

The argument is RUN,TASK or RUN,TASK,all: the workdir of the run, and a task: digits (handwritten ones), video_caption,
video_name or one of the run's own. By default it reads few examples: ten of every class, or one in a hundred. No figures are promised.
"""

import ml_collections

from uni_moe_jax.train import finetuning


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Model, tokenizer and data are the run's; the prompts are new."""
  return finetuning.prompt_tune(arg)
