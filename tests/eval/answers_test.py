"""Captions of a closed set of answers, and of clips by a model that was never trained to caption any."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.data.pipeline.mixtures import evaluation_batches
from uni_moe_jax.eval import suite
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.train import run as train_run

ANSWERS = ('a', 'or')
BEAMS = 3  # more than answers
LENGTH = 5  # of captions, in tokens


def _config(answers=ANSWERS):
  c = tiny.config('caption', data_dir=tiny.data_dir())
  c.tasks.caption.max_len = LENGTH
  c.model.num_layers = 1
  c.target_sets.closed = config_lib.target_set(answers, family='names')
  # No training task has names of videos; their scale is that of images.
  c.tasks.video = config_lib.task(
      'video_caption', 'videos', batch_size=0, target_set='words', caption_templates=('{name}',), max_len=LENGTH, temperature='image_caption')
  for name, chosen in (('clips', ''), ('closed clips', 'closed')):
    c.evaluators[name] = config_lib.evaluator('caption', 'video', split='train', batch_size=8, constrain_to=chosen)
  return c


@functools.cache
def _run():
  run = train_run.build(_config(), jax.devices()[:1])
  return run, run.init().params


def _predictor(tokenizer=None, **texts) -> Predictor:
  """A predictor of fresh parameters; its tokenizer, or the texts of some sets, replaced."""
  run, params = _run()
  sets = {s.name: (s, run.data.target_sets[s.name]) for s in (*run.plan.sets, *run.plan.probe_sets, *run.plan.answer_sets)}
  for name, given in texts.items():
    sets[name] = (sets['closed'][0], dataclasses.replace(sets['closed'][1], names=tuple(given)))
  return Predictor(UniPerceiver(run.spec.model.spec), params, sets, tokenizer or run.data.tokenizer)


class _Numbers:
  """A tokenizer that writes ids as they are, so that whatever is said is a text and back."""

  def __init__(self):
    given = _run()[0].data.tokenizer
    self.spe, self.eot, self.size = given.spe, given.eot, given.size

  def decode(self, ids) -> str:
    return ' '.join(str(i) for i in ids[:ids.index(self.eot) if self.eot in ids else None])

  def encode_batch(self, texts) -> list[list[int]]:
    return [[int(w) for w in t.split()] for t in texts]


def _evaluate(name: str):
  """(task, pixels) of four examples."""
  data = _run()[0].data
  task = next(t for t in (*_run()[0].plan.tasks, *_run()[0].plan.probes) if t.name == name)
  return task, next(evaluation_batches(data.examples(task), np.arange(4), 4))[0]['pixels']


def test_captions_of_a_closed_set_are_always_its_members():
  predictor, evaluated = _predictor(), _evaluate('caption')
  assert set(predictor.captions(*evaluated, BEAMS, 0.0, 'closed')) <= set(ANSWERS)
  assert not set(predictor.captions(*evaluated, BEAMS)) & set(ANSWERS)  # by themselves they would be others


def test_a_set_that_contains_what_is_reported_anyway_changes_nothing():
  evaluated = _evaluate('caption')
  output = _predictor(_Numbers()).captions(*evaluated, BEAMS)
  # As long as what is said: shorter answers, which a beam of any words lets go early, can be likelier.
  others = tuple(' '.join([word] * LENGTH) for word in ('5', '9'))
  assert not set(output) & set(others)
  assert _predictor(_Numbers(), output=(*output, *others)).captions(*evaluated, BEAMS, 0.0, 'output') == output


def test_videos_are_captioned_by_a_model_that_learned_images_alone(tmp_path):
  run, _ = _run()
  assert [t.type.name for t in run.plan.tasks] == ['image_caption']
  rows = suite.evaluate(run.plan, run.data, _predictor(), 0, tmp_path)
  matches = {(r['evaluator'], r['metric']): r for r in rows}
  assert {m for e, m in matches if e == 'clips'} == {'exact_match', 'BLEU-4', 'ROUGE-L', 'CIDEr-D', 'word F1'}
  assert all(r['baselines'] for r in rows)
  assert matches['clips', 'exact_match']['count'] == 10 and matches['closed clips', 'exact_match']['count'] == 10
  shown = json.loads((tmp_path / 'samples.json').read_text())['closed clips']
  assert {s['prediction'] for s in shown} <= set(ANSWERS)


def test_videos_need_a_scale_that_some_trained_task_has():
  config = _config()
  config.tasks.video.temperature = ''
  with pytest.raises(ValueError, match="config.tasks.video.temperature='video_caption': no trained task has this group"):
    make_plan(config)


def test_an_answer_that_is_longer_than_a_caption_is_named_before_anything_runs():
  config = _config((*ANSWERS, 'small shape'))
  with pytest.raises(ValueError, match="config.tasks.video.max_len=5 is too short for answer 'small shape' of "
                                       "config.evaluators.closed clips.constrain_to='closed', which has [0-9]+ tokens"):
    Data(config, make_plan(config))
