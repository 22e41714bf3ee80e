"""Captions of a closed set of answers, and of videos by a model that was never trained to caption videos."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.batches.mixtures import evaluation_batches
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
      'video_caption', 'videos', batch_size=0, target_set='words', caption_templates=('{name}',), max_len=LENGTH,
      temperature='image_caption')
  for name, chosen in (('videos', ''), ('closed videos', 'closed')):
    c.evaluators[name] = config_lib.evaluator('caption', 'video', split='train', batch_size=8, constrain_to=chosen)
  return c


@functools.cache
def _run():
  run = train_run.build(_config(), jax.devices()[:1])
  return run, run.init().params


def _predictor(tokenizer=None, **texts) -> Predictor:
  """A predictor of fresh parameters; its tokenizer, or the texts of some sets, replaced."""
  run, params = _run()
  plan = run.plan
  sets = {s.name: (s, run.data.target_sets[s.name]) for s in (*plan.sets, *plan.probe_sets, *plan.answer_sets)}
  for name, given in texts.items():
    sets[name] = (sets['closed'][0], dataclasses.replace(sets['closed'][1], names=tuple(given)))
  return Predictor(UniPerceiver(run.spec.model.spec), params, sets, tokenizer or run.data.tokenizer)


class _Numbers:
  """A tokenizer that writes ids as they are, so that every output is a text that encodes to the same ids."""

  def __init__(self):
    given = _run()[0].data.tokenizer
    self.spe, self.eot, self.size = given.spe, given.eot, given.size

  def decode(self, ids) -> str:
    return ' '.join(str(i) for i in ids[:ids.index(self.eot) if self.eot in ids else None])

  def encode_batch(self, texts) -> list[list[int]]:
    return [[int(w) for w in t.split()] for t in texts]


def _batch(name: str):
  """(task, pixels) of four examples."""
  run, _ = _run()
  task = next(t for t in (*run.plan.tasks, *run.plan.probes) if t.name == name)
  return task, next(evaluation_batches(run.data.examples(task), np.arange(4), 4))[0]['pixels']


def test_captions_of_a_closed_set_are_always_its_members():
  predictor, batch = _predictor(), _batch('caption')
  assert set(predictor.captions(*batch, BEAMS, 0.0, 'closed')) <= set(ANSWERS)
  assert not set(predictor.captions(*batch, BEAMS)) & set(ANSWERS)  # without the constraint they are others


def test_a_caption_that_does_not_end_is_cut_at_the_longest():
  predictor, (task, pixels) = _predictor(_Numbers()), _batch('caption')
  longest, cut = predictor.captions(task, pixels), predictor.captions(task, pixels, max_len=3)
  assert {len(text.split()) for text in longest} == {LENGTH} and {len(text.split()) for text in cut} == {3}
  assert [text.split()[:3] for text in longest] == [text.split() for text in cut]


def test_a_set_that_contains_the_unconstrained_captions_changes_nothing():
  batch = _batch('caption')
  output = _predictor(_Numbers()).captions(*batch, BEAMS)
  # As long as the output: shorter answers, which an unconstrained beam drops early, can be likelier.
  others = tuple(' '.join([word] * LENGTH) for word in ('5', '9'))
  assert not set(output) & set(others)
  assert _predictor(_Numbers(), output=(*output, *others)).captions(*batch, BEAMS, 0.0, 'output') == output


def test_videos_are_captioned_by_a_model_that_learned_images_alone(tmp_path):
  run, _ = _run()
  assert [t.type.name for t in run.plan.tasks] == ['image_caption']
  rows = suite.evaluate(run.plan, run.data, _predictor(), 0, tmp_path)
  by_metric = {(r['evaluator'], r['metric']): r for r in rows}
  assert {m for e, m in by_metric if e == 'videos'} == {'exact_match', 'BLEU-4', 'ROUGE-L', 'CIDEr-D', 'word F1'}
  assert all(r['baselines'] for r in rows)
  assert by_metric['videos', 'exact_match']['count'] == by_metric['closed videos', 'exact_match']['count'] == 10
  shown = json.loads((tmp_path / 'samples.json').read_text())['closed videos']
  assert {s['prediction'] for s in shown} <= set(ANSWERS)


def test_an_answer_that_is_longer_than_a_caption_is_an_error_before_anything_runs():
  config = _config((*ANSWERS, 'small shape'))
  message = ("config.tasks.video.max_len=5 is too short for answer 'small shape' of "
             "config.evaluators.closed videos.constrain_to='closed', which has [0-9]+ tokens")
  with pytest.raises(ValueError, match=message):
    Data(config, make_plan(config))
