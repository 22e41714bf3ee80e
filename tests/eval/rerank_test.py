"""Captions reranked by a retrieval task: log p plus the scaled similarity to the image, over the captions of a beam."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import shipped, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.data.text.token_rows import encode_texts, pad_tokens
from uni_moe_jax.eval import suite
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.parallel import sharding
from uni_moe_jax.train import adaptation
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.trained_run import TrainedRun

BEAMS, IMAGES = 4, 6


def _config():
  c = tiny.config('caption', 'pair', data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.evaluators.captions = config_lib.evaluator(
      'caption', 'caption', split='train', num_examples=IMAGES, batch_size=4, beam_size=BEAMS, rerank_by='pair')
  return c


@functools.cache
def _run():
  run = train_run.build(_config(), jax.devices()[:1])
  return run, run.init().params


def _predictor(params, shards=1, mesh=None) -> Predictor:
  run, _ = _run()
  sets = {s.name: (s, run.data.target_sets[s.name]) for s in run.plan.sets}
  return Predictor(UniPerceiver(run.spec.model.spec, shards, mesh), params, sets, run.data.tokenizer)


def _tasks():
  return {t.name: t for t in _run()[0].plan.tasks}


def _pixels():
  run, _ = _run()
  return next(evaluation_batches(run.data.examples(_tasks()['caption']), np.arange(IMAGES), IMAGES))[0]['pixels']


def _with_scale(params, scale):
  """The same parameters with another scale of the retrieval task's similarities."""
  return {**params, 'log_scale_image_retrieval': jax.numpy.log(scale)}


def _beam(predictor, params):
  """(captions, scores) of every beam: lists and [B, k]."""
  run, task = _run()[0], _tasks()['caption']
  tokenizer, words = run.data.tokenizer, predictor.target_set(task.target_set)
  beam = shipped.search(run.spec.model.spec, params, task, tokenizer, _pixels(), words, beam_size=BEAMS)
  return [[tokenizer.decode(row) for row in rows] for rows in beam.tokens.tolist()], beam.scores


def test_of_a_beam_the_largest_sum_of_log_p_and_scaled_similarity_is_chosen():
  scale, (run, params), tasks = 40.0, _run(), _tasks()
  params, tokenizer = _with_scale(params, scale), run.data.tokenizer
  predictor, pair = _predictor(params), tasks['pair']
  captions, scores = _beam(predictor, params)
  images = normalize(predictor.inputs(pair.type, {'id': np.arange(IMAGES, dtype=np.uint32), 'pixels': _pixels()})[:, 0])
  expected, similarities = [], []
  for image, texts, log_p in zip(images, captions, scores, strict=True):
    rows, valid = pad_tokens(encode_texts(texts, tokenizer, pair.max_len), pair.max_len, tokenizer.pad)
    features = normalize(predictor.pairs(
        pair.type, {'id': np.arange(BEAMS, dtype=np.uint32), 'target': rows, 'target_valid': valid}))
    similarities.append(scale * np.asarray(features @ image))
    expected.append(texts[int(np.argmax(log_p + similarities[-1]))])
  np.testing.assert_allclose(predictor._log_similarities(pair, _pixels(), captions), similarities, rtol=1e-4, atol=1e-4)
  reranked = predictor.captions(tasks['caption'], _pixels(), BEAMS, reranker=pair)
  assert reranked == expected
  # Similarities decide: without them, and if their scale is next to nothing, the likeliest captions come out.
  likeliest = predictor.captions(tasks['caption'], _pixels(), BEAMS)
  assert likeliest == [texts[0] for texts in captions] != reranked
  assert _predictor(_with_scale(params, 1e-6)).captions(
      tasks['caption'], _pixels(), BEAMS, reranker=pair) == likeliest


@pytest.mark.nightly
def test_a_mesh_chooses_as_one_device():
  params, tasks = _with_scale(_run()[1], 40.0), _tasks()
  mesh = sharding.make_mesh(dict(replica=1, data=4, expert=1, model=1), jax.devices()[:4])
  placed = jax.device_put(params, sharding.replicated(mesh))
  captions = [predictor.captions(tasks['caption'], _pixels(), BEAMS, reranker=tasks['pair'])
              for predictor in (_predictor(params), _predictor(placed, 4, mesh))]
  assert captions[0] == captions[1]


def test_the_evaluator_scores_reranked_captions(tmp_path):
  run, params = _run()
  given, predictor = [], _predictor(params)
  captions = predictor.captions
  predictor.captions = lambda *args: given.append(args[-1]) or captions(*args)
  rows = suite.evaluate(run.plan, run.data, predictor, 0, tmp_path)
  assert {r['evaluator'] for r in rows} == {'captions'} and {t.name for t in given} == {'pair'}


@pytest.mark.parametrize('changes, message', [
    ({'evaluators.captions.rerank_by': 'pairs'}, r"rerank_by='pairs' is unknown; did you mean 'pair'"),
    ({'evaluators.captions.rerank_by': 'caption'},
     r"rerank_by='caption' is of task type 'image_caption'; it must be a retrieval task that reads what "
     r'config\.tasks\.caption reads'),
    ({'evaluators.captions.beam_size': 1},
     r"rerank_by='pair' chooses among the captions of a beam; set config\.evaluators\.captions\.beam_size to 2"),
    ({'evaluators.captions.type': 'retrieval', 'evaluators.captions.task': 'pair'},
     r"rerank_by='pair' is for evaluators of type 'caption', not 'retrieval'; set it to ''"),
])
def test_a_task_that_cannot_rerank_is_named(changes, message):
  c = _config()
  c.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=r'config\.evaluators\.captions\.' + message):
    make_plan(c)


def test_a_task_that_is_not_trained_reranks_only_with_the_scale_of_one_that_is():
  c = _config()
  [trained] = make_plan(c).evaluations
  assert (trained.rerank_by, trained.reranker.name) == ('pair', 'pair')
  c.tasks.pair.batch_size = 0  # on the command line, where no name with spaces can be written, nothing else is needed
  [untrained] = make_plan(c).evaluations
  assert (untrained.rerank_by, untrained.reranker) == ('', None)
  untrained_run = TrainedRun(train_run.build(c, jax.devices()[:1]), None)
  with pytest.raises(ValueError, match="rerank_by='pair': no trained task has its temperature 'image_retrieval'"):
    untrained_run.caption('caption', _pixels()[:, 0], beam_size=2, rerank_by='pair')
  c.tasks.pair.temperature = 'image_caption'
  [shared] = make_plan(c).evaluations
  assert shared.reranker.name == 'pair'


def test_a_copied_captioning_task_is_evaluated_without_the_other_task():
  c = tiny.config('shape', data_dir=tiny.data_dir())
  adaptation._copy_task(c, _config(), 'caption')
  assert c.evaluators.captions.rerank_by == '' and 'pair' not in c.tasks
  make_plan(c)
