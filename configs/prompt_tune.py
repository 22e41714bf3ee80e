"""Tune prompts, norms and a linear head of a trained run for one task.

  uni-moe train --config=prompt_tune:run=runs/quickstart,task=digits --workdir=runs/digits-prompts
  uni-moe evaluate --workdir=runs/digits-prompts

Arguments:
  run=RUN         work directory of the run
  task=TASK       digits (handwritten), video_caption, video_name, or a task of the run
  data=few|all    few (default): ten training examples per class, 1 % for tasks without classes; all of them

Every other parameter stays bit-identical. 200 steps. docs/results/adaptation.md has the scores.
"""

from uni_moe_jax.train import adaptation

get_config = adaptation.prompt_tune  # model, tokenizer and data are those of the run; the prompts are new
