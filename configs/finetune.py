"""Fine-tune a trained run on one task: every parameter trains, lower layers more slowly.

  uni-moe train --config=finetune:run=runs/quickstart,task=digits --workdir=runs/digits-finetuned
  uni-moe evaluate --workdir=runs/digits-finetuned

Arguments:
  run=RUN         work directory of the run
  task=TASK       digits (handwritten), video_caption, video_name, or a task of the run
  data=all|few    all training examples (default), or few: ten per class, 1 % for tasks without classes

200 steps. docs/results/adaptation.md compares it with configs/prompt_tune.py and configs/zero_shot.py.
"""

from uni_moe_jax.train import adaptation

get_config = adaptation.finetune  # model, tokenizer and data are those of the run
