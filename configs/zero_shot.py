"""Evaluate a trained run on another task, beside chance and baselines. Nothing trains.

  uni-moe evaluate --config=zero_shot:run=runs/quickstart,task=digits --workdir=runs/digits-untuned

Arguments:
  run=RUN      work directory of the run
  task=TASK    digits (handwritten), video_caption, video_name, a task of the run, digit_question or digit_word

The last two are defined in this file: tasks, and even task types, are config and need not be in the package.
docs/results/adaptation.md has the scores.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.train import adaptation


def digit_question(c: ml_collections.ConfigDict) -> None:
  """A question that no embedded task has: an image and a text, answered at its slot."""
  _digit_words(c)
  c.tasks.digit_question = config.task('vqa', 'digits', batch_size=0, target_set='digit_words', label_column='name',
                                       template='the image is <spe> . <eot>', max_len=16)
  c.evaluators['digit question'] = config.evaluator('classification', 'digit_question', split='test')


def digit_word(c: ml_collections.ConfigDict) -> None:
  """A new task type: an image, read as in classification, and answered by a word, as in captions."""
  _digit_words(c)
  c.task_types.image_word = dict(
      inputs=(('visual', 'full'),), target='words', readout='cls', router_task='image_word')
  c.tasks.digit_word = config.task('image_word', 'digits', batch_size=0, target_set='digit_words', label_column='name')
  c.evaluators['digit word'] = config.evaluator('classification', 'digit_word', split='test')


def _digit_words(c: ml_collections.ConfigDict) -> None:
  c.target_sets.digit_words = config.target_set('digits/name', family='words')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Model, tokenizer and data are those of the run."""
  return adaptation.zero_shot(arg, {'digit_question': digit_question, 'digit_word': digit_word})
