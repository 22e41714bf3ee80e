"""Lengths of captions, and captions of videos by a model that was never trained to caption videos."""

import functools

import jax
import numpy as np

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.eval import suite
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.train import run as train_run

LENGTH = 5  # of captions, in tokens


def _config():
  c = tiny.config('caption', data_dir=tiny.data_dir())
  c.tasks.caption.max_len = LENGTH
  c.model.num_layers = 1
  # No training task has names of videos; their scale is that of images.
  c.tasks.video = config_lib.task(
      'video_caption', 'videos', batch_size=0, target_set='words', caption_templates=('{name}',), max_len=LENGTH,
      temperature='image_caption')
  c.evaluators.videos = config_lib.evaluator('caption', 'video', split='train', batch_size=8)
  return c


@functools.cache
def _run():
  run = train_run.build(_config(), jax.devices()[:1])
  return run, run.init().params


def _predictor(tokenizer=None) -> Predictor:
  """A predictor of fresh parameters."""
  run, params = _run()
  sets = {s.name: (s, run.data.target_sets[s.name]) for s in (*run.plan.sets, *run.plan.probe_sets)}
  return Predictor(UniPerceiver(run.spec.model.spec), params, sets, tokenizer or run.data.tokenizer)


class _Numbers:
  """A tokenizer that writes ids as they are."""

  def __init__(self):
    given = _run()[0].data.tokenizer
    self.spe, self.eot, self.size = given.spe, given.eot, given.size

  def decode(self, ids) -> str:
    return ' '.join(str(i) for i in ids[:ids.index(self.eot) if self.eot in ids else None])


def _batch(name: str):
  """(task, pixels) of four examples."""
  run, _ = _run()
  task = next(t for t in (*run.plan.tasks, *run.plan.probes) if t.name == name)
  return task, next(evaluation_batches(run.data.examples(task), np.arange(4), 4))[0]['pixels']


def test_a_caption_that_does_not_end_is_cut_at_the_longest():
  predictor, (task, pixels) = _predictor(_Numbers()), _batch('caption')
  longest, cut = predictor.captions(task, pixels), predictor.captions(task, pixels, max_len=3)
  assert {len(text.split()) for text in longest} == {LENGTH} and {len(text.split()) for text in cut} == {3}
  assert [text.split()[:3] for text in longest] == [text.split() for text in cut]


def test_videos_are_captioned_by_a_model_that_learned_images_alone(tmp_path):
  run, _ = _run()
  assert [t.type.name for t in run.plan.tasks] == ['image_caption']
  rows = suite.evaluate(run.plan, run.data, _predictor(), 0, tmp_path)
  by_metric = {(r['evaluator'], r['metric']): r for r in rows}
  assert {m for _, m in by_metric} == {'exact_match', 'BLEU-4', 'ROUGE-L', 'CIDEr-D', 'word F1'}
  assert all(r['baselines'] for r in rows)
  assert by_metric['videos', 'exact_match']['count'] == 10
