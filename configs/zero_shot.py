"""Asks a trained run what it was not trained for. Nothing trains; the answers stand beside chance and floors.

  python launch/evaluate.py --config=configs/zero_shot.py:runs/quickstart,digits --workdir=runs/digits-untuned

The argument is RUN,TASK: the workdir of the run, and a task: digits (handwritten ones), video_caption, video_name, one of the
run's own, or one of the two below. They show that a task, and a kind, are config: nothing in the package knows them.
No figures are promised.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.train import finetuning


def digit_question(c: ml_collections.ConfigDict) -> None:
  """A kind that no embedded task trains (vqa): a picture and a question, answered at the question's slot."""
  _words(c)
  c.tasks.digit_question = config.task(
      'vqa', 'digits', batch_size=0, target_set='digit_words', label_column='name', template='the picture is <spe> . <eot>', max_len=16)
  c.evaluators['digit question'] = config.evaluator('classification', 'digit_question', split='test')


def digit_word(c: ml_collections.ConfigDict) -> None:
  """A new kind: a picture read at its prefix, as in classification, and answered among words, as in captions."""
  _words(c)
  c.task_types.picture_word = dict(
      inputs=(('visual', 'full'),), target='words', readout='cls', router_task='picture_word')
  c.tasks.digit_word = config.task('picture_word', 'digits', batch_size=0, target_set='digit_words', label_column='name')
  c.evaluators['digit word'] = config.evaluator('classification', 'digit_word', split='test')


def _words(c: ml_collections.ConfigDict) -> None:
  c.target_sets.digit_words = config.target_set('digits/name', family='words')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Model, tokenizer and data are the run's."""
  return finetuning.zero_shot(arg, {'digit_question': digit_question, 'digit_word': digit_word})
