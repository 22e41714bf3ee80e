"""A trained run from Python: the same answers as the evaluators' predictor, and clear errors."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import saved_run, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.eval import predictor
from uni_moe_jax.train import trained_run
from uni_moe_jax.train.trained_run import TrainedRun
from uni_moe_jax.utils.errors import UsageError


def _config():
  config = tiny.config('shape', 'text', 'caption', 'pair', data_dir=tiny.data_dir())
  config.target_sets.answers = config_lib.target_set('glyphs/class', family='words')
  config.tasks.question = config_lib.task(
      'vqa', 'glyphs', batch_size=2, target_set='answers', label_column='class', max_len=12,
      template='{face} <eot> <spe> . <eot>')
  return config


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  config = _config()
  folder = tmp_path_factory.mktemp('run')
  saved_run.save(folder, config, 3)
  return folder


@pytest.fixture(name='run', scope='module')
def _run(folder):
  return TrainedRun.load(folder)


@pytest.fixture(name='images', scope='module')
def _images(run):
  return run.examples('shape', 'train', 4)


def test_examples_are_the_images_of_the_source(images):
  np.testing.assert_array_equal(images[..., 0], tiny.columns()['glyphs'][0]['pixels'][:4])


def test_classes_come_with_probabilities_most_likely_first(run, images):
  answers = run.classify('shape', images, top=3)
  assert [len(a) for a in answers] == [3] * 4
  for answer in answers:
    names, probabilities = zip(*answer, strict=True)
    assert set(names) == set(tiny.CLASSES)
    assert list(probabilities) == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)


def test_own_names_that_are_those_of_the_set_give_the_same_probabilities_and_others_do_not(run, images):
  trained = [dict(a) for a in run.classify('shape', images)]
  own = [dict(a) for a in run.classify('shape', images, names=tiny.CLASSES[::-1])]
  for a, b in zip(trained, own, strict=True):
    assert a == pytest.approx(b, abs=1e-5)
  assert dict(run.classify('shape', images, names=['bar', 'disc', 'line'])[0]) != pytest.approx(trained[0], abs=1e-5)


def test_all_entries_are_returned_where_top_is_larger(run, images):
  assert run.classify('shape', images, top=np.int64(99)) == run.classify('shape', images, top=len(tiny.CLASSES))


def test_one_image_alone_gets_the_answer_that_it_gets_in_a_batch(run, images):
  alone, together = run.classify('shape', images[1:2])[0], run.classify('shape', images)[1]
  assert dict(alone) == pytest.approx(dict(together), abs=1e-5)


def test_images_may_be_a_list_and_names_an_array(run, images):
  assert run.classify('shape', images, np.array(['bar', 'line'])) == run.classify('shape', images, ['bar', 'line'])
  assert run.classify('shape', list(images)) == run.classify('shape', images)


def test_no_images_have_no_answers(run, images):
  assert run.caption('caption', images[:0]) == run.classify('shape', images[:0]) == []
  assert run.embed('pair', images[:0]).shape == (0, run.embed('pair', images).shape[1])
  assert len(run.caption('caption', images)) == 4


def test_many_rows_are_computed_in_parts_of_one_shape_and_give_what_few_give(run, images, monkeypatch):
  monkeypatch.setattr(trained_run, '_ROWS_AT_ONCE', 4)
  many, texts = np.tile(images, (3, 1, 1, 1))[:10], ['red bar', 'star', 'a', 'b']
  embedded, embedded_texts = run.embed('pair', images), run.embed_text('pair', texts)
  answers, captions = run.classify('shape', images), run.caption('caption', images)
  jitted = predictor.encode, predictor._captions, predictor._log_p
  programs = [f._cache_size() for f in jitted]
  np.testing.assert_array_equal(run.embed('pair', many), np.tile(embedded, (3, 1))[:10])
  np.testing.assert_array_equal(run.embed_text('pair', (texts * 3)[:10]), np.tile(embedded_texts, (3, 1))[:10])
  assert run.classify('shape', many) == (answers * 3)[:10]
  assert run.caption('caption', many) == (captions * 3)[:10]
  assert [f._cache_size() for f in jitted] == programs


def test_captions_are_those_of_the_predictor(run, folder, images):
  _, predictor, _ = saved_run.load(_config(), folder)
  task = next(t for t in run._run.plan.tasks if t.name == 'caption')
  assert run.caption('caption', images, beam_size=2) == predictor.captions(task, images[:, None], 2)
  reranked = predictor.captions(task, images[:, None], 4, reranker=run._tasks['pair'])
  assert run.caption('caption', images, beam_size=4, rerank_by='pair') == reranked


def test_a_question_is_answered_as_by_the_evaluator(run, images):
  faces, task = tiny.columns()['glyphs'][0]['face'], run._tasks['question']
  [fields] = [batch for batch, _ in evaluation_batches(run._run.data.examples(task, 'train'), np.arange(24), 24)]
  expected = np.exp(run._predictor.log_probabilities(run._predictor.inputs(task.type, fields), task)[:, 0])
  for face in set(faces.tolist()):
    same = np.flatnonzero(faces[:4] == face)
    for i, answer in zip(same, run.classify('question', images[same], face=face), strict=True):
      assert dict(answer) == pytest.approx(dict(zip(tiny.CLASSES, expected[i].tolist(), strict=True)), abs=1e-5)
  assert dict(run.classify('question', images[:1], face='serif')[0]) != pytest.approx(
      dict(run.classify('question', images[:1], face='round')[0]), abs=1e-5)


def test_a_column_may_have_the_name_of_an_argument(folder, images):
  run = TrainedRun.load(folder)
  spec = dataclasses.replace(run._tasks['question'], template='{top} <eot> <spe> . <eot>')
  run._tasks['same'] = spec
  expected = run.classify('question', images, top=2, face='serif')
  assert run.classify('same', images, top=2, columns={'top': 'serif'}) == expected


def test_features_are_unit_vectors_of_both_sides_and_images_differ(run, images):
  left, right = run.embed('pair', images), run.embed_text('pair', ['red bar', 'green disc of moves'])
  assert left.shape[0] == 4 and right.shape[0] == 2 and left.shape[1] == right.shape[1]
  for features in (left, right):
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert (np.abs(features[0] - features[1]) > 1e-4).any()


@pytest.mark.parametrize('use, message', [
    (lambda run, x: run.classify('shap', x), "task 'shap' is unknown; did you mean 'shape'"),
    (lambda run, x: run.classify('caption', x), "task 'caption' .* no classes"),
    (lambda run, x: run.classify('question', x), "'question' needs the text of 'face', .*; give columns={'face': …}"),
    (lambda run, x: run.classify('text', x), "task 'text' reads text alone"),
    (lambda run, x: run.classify('shape', x, name=['bar']), "name=… is no argument .*; did you mean 'names'"),
    (lambda run, x: run.classify('question', x, face='a', fce='b'), "fce=… .* template .*; did you mean 'face'"),
    (lambda run, x: run.classify('question', x, columns='a'), "columns='a' must be a dict"),
    (lambda run, x: run.classify('question', x, face=['a'] * 4), r"face=\['a', .*\] must be one text, of all images"),
    (lambda run, x: run.classify('shape', x, top=0), 'top=0 must be a whole number of at least 1'),
    (lambda run, x: run.classify('shape', x, top=2.5), 'top=2.5 must be a whole number'),
    (lambda run, x: run.classify('shape', x, [1, 2]), 'names has the item 1, which must be a text'),
    (lambda run, x: run.embed('caption', x), "task 'caption' is of type 'image_caption', which also reads a text"),
    (lambda run, x: run.embed('question', x), "task 'question' is of type 'vqa', which also reads a text"),
    (lambda run, x: run.caption('shape', x), "task 'shape' .* no captions"),
    (lambda run, x: run.caption('caption', x, 2, 'shape'), "rerank_by='shape' .* retrieval"),
    (lambda run, x: run.caption('caption', x, rerank_by='pair'), "rerank_by='pair' .*; set beam_size to 2 or more"),
    (lambda run, x: run.embed_text('shape', ['a']), 'only retrieval encodes a paired text'),
    (lambda run, x: run.embed('pair', x[..., 0]), r'images are uint8 \[4, 16, 16\]'),
    (lambda run, x: run.embed('pair', x / 255), r'images are float64 \[4, 16, 16, 1\]'),
    (lambda run, x: run.embed('pair', x[:, :8, :8]), r'images are uint8 \[4, 8, 8, 1\]; .* uint8 \[B, 16, 16, 1\]'),
    (lambda run, x: run.classify('shape', x.repeat(3, 3)), r'images are uint8 \[4, 16, 16, 3\]'),
    (lambda run, x: run.caption('caption', x[None, :0]), 'videos of 0 frames; this run takes 1 to 4 '),
    (lambda run, x: run.caption('caption', x.repeat(2, 0)[None]), 'videos of 8 frames; this run takes 1 to 4 '),
    (lambda run, x: run.caption('caption', x, 0), 'beam_size=0 must be at least 1'),
    (lambda run, x: run.classify('shape', x, 'bar'), r"names='bar' is one text; give a list, \['bar'\]"),
    (lambda run, x: run.embed_text('pair', 'red bar'), "texts='red bar' is one text"),
    (lambda run, x: run.examples('shape', 'train', 0), "number=0 must be 1 to 24, the examples of split 'train'"),
    (lambda run, x: run.examples('shape', 'train', 25), 'number=25 must be 1 to 24'),
])
def test_a_wrong_call_ends_in_one_sentence(run, images, use, message):
  with pytest.raises(UsageError, match=message):
    use(run, images)


def test_a_checkpoint_that_is_not_there_is_named(folder):
  with pytest.raises(UsageError, match='has no checkpoint of step 4; it has those of 3'):
    TrainedRun.load(folder, step=4)
