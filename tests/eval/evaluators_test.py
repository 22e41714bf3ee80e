"""Protocols of the evaluators, run with predictors that are always right or always wrong."""

import dataclasses
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.text.clip_tokenizer import ClipTokenizer
from uni_moe_jax.eval import caption_metrics, evaluators, predictor, suite
from uni_moe_jax.eval.evaluators import Query
from uni_moe_jax.eval.suite import EVALUATORS
from uni_moe_jax.io import files
from uni_moe_jax.reporting import html as reporting_html


@pytest.fixture(scope='module')
def data():
  config = tiny.config(*tiny.TASKS, data_dir=tiny.data_dir())
  config.tasks.question = config_lib.task(
      'vqa', 'glyphs', batch_size=2, target_set='words_of_shapes', label_column='class', max_len=12,
      template='{face} <eot> <spe> . <eot>')
  config.model.max_text_len = config.tasks.pair.max_len = 30  # of names that are not cut, which are distinct
  config.target_sets.words_of_shapes = config_lib.target_set('glyphs/class', family='words')
  for evaluator, task in (('classification', 'shape'), ('classification', 'question'),
                          ('classification', 'motion'), ('classification', 'package'),
                          ('retrieval', 'pair'), ('caption', 'caption'), ('mlm', 'text')):
    config.evaluators[task] = config_lib.evaluator(evaluator, task, split='train', batch_size=5)
  config.evaluators.pair.num_draws = 3
  return (plan := make_plan(config)), Data(config, plan)


def _query(data, entry: str, predictor, query=Query, **changes) -> Query:
  plan, d = data
  e = dataclasses.replace(next(e for e in plan.evaluations if e.name == entry), **changes)
  names = d.target_sets[e.task.target_set].names if e.task.target_set else ()
  keys, records = d.entry_keys.get(e.task.target_set, ()), d.records(e.task.source, 'train')
  return query(e, predictor, d.examples(e.task), records, records, names, keys, d.tokenizer, {}, tiny.data_dir())


class _Oracle:
  """Answers with the fields' own targets, or with a fixed wrong answer; V targets."""
  mesh = None

  def __init__(self, targets: int, right: bool = True, captions=None):
    self.targets, self.right, self.texts, self.seen = targets, right, iter(captions or ()), []

  def inputs(self, task_type, fields):
    self.seen += fields['id'].tolist()
    if task_type.target == 'pair':
      return self.pairs(task_type, fields)[:, None]
    self.labels = fields['label']
    return np.zeros((len(fields['id']), fields['label'].shape[1], 1), np.float32)

  def pairs(self, task_type, fields):
    return np.eye(64, dtype=np.float32)[fields['id']]

  def similarities(self, left, right):
    return left @ right.T

  def ranked(self, views, task, labels):
    log_p = predictor.mean_log_probability([jnp.asarray(self.log_probabilities(features)) for features in views])
    return predictor.rank(log_p, labels)

  def log_probabilities(self, features):
    answer = self.labels if self.right else (self.labels + 1) % self.targets
    p = np.full((*answer.shape, self.targets), 0.1 / (self.targets - 1))
    np.put_along_axis(p, answer[..., None], 0.9, axis=-1)
    return np.log(p)

  def captions(self, task, pixels, beam_size, length_penalty, max_len, reranker):
    return [next(self.texts, '') for _ in pixels]


def _scores(data, name, predictor, **changes):
  return _run(_query(data, name, predictor, **changes))


def _run(query):
  return {s.name: s for s in EVALUATORS[query.evaluation.type](query)}


def test_views_of_a_video_are_averaged_as_probabilities(data):
  class Brightness(_Oracle):
    """Predicts class 0 with the brightness of a video as its probability, in percent."""

    def inputs(self, task_type, fields):
      return fields['pixels'].mean(axis=(1, 2, 3, 4), dtype=np.float32)[:, None, None]

    def log_probabilities(self, features):
      return np.log(np.concatenate([features, 100 - features], axis=-1) / 100)

  query = _query(data, 'motion', Brightness(2))
  # Two videos of two views each, one frame of 1 × 1: (0.9 + 0.02) / 2 and (0.99 + 0.3) / 2; means of
  # logarithms would be 0.13 and 0.54.
  pixels = np.array([[90, 2], [99, 30]], np.uint8).reshape(2, 2, 1, 1, 1, 1)
  rank = lambda pixels, label: query.ranked({'pixels': pixels, 'label': np.full((2, 1), label, np.int32)})
  assert rank(pixels, 0).best.tolist() == [1, 0] and rank(pixels, 0).rank.tolist() == [2, 1]
  np.testing.assert_allclose(np.exp(rank(pixels, 0).score), [0.46, 0.645], rtol=1e-6)
  np.testing.assert_allclose(np.exp(rank(pixels[:, 0], 1).score), [0.1, 0.01], rtol=1e-5)  # one view


@pytest.mark.parametrize('broken', [np.nan, 0.0])
@pytest.mark.parametrize('name, metrics', [('shape', ('top-1', 'balanced_accuracy')), ('text', ('accuracy',))])
def test_a_model_whose_scores_are_nan_or_equal_is_never_right(data, name, metrics, broken):
  class Broken(_Oracle):
    def log_probabilities(self, features):
      return np.full_like(super().log_probabilities(features), broken)
  V = {'shape': 3, 'text': data[1].tokenizer.size}[name]
  scores, sound = (_scores(data, name, oracle(V)) for oracle in (Broken, _Oracle))
  assert {m: (scores[m].value, sound[m].value) for m in metrics} == dict.fromkeys(metrics, (0.0, 1.0))


def test_of_few_candidates_chance_is_not_above_1(data):
  scores = _scores(data, 'pair', _Oracle(3), num_examples=3)
  assert scores['i2t_R@1'].chance == pytest.approx(1 / 3)
  assert scores['i2t_R@5'].chance == scores['i2t_R@10'].chance == 1.0
  assert evaluators.metrics.verdict(scores['i2t_R@5'].row('pair', 1), 1.0) == 'level'


@pytest.mark.parametrize('name, targets', [('shape', 3), ('motion', 2), ('package', 2)])
def test_classification_counts_right_answers_and_wrong_ones(data, name, targets):
  right, wrong = (_scores(data, name, _Oracle(targets, r)) for r in (True, False))
  assert (right['top-1'].value, wrong['top-1'].value) == (1.0, 0.0)
  assert (right['balanced_accuracy'].value, wrong['balanced_accuracy'].value) == (1.0, 0.0)
  assert right['top-1'].chance == 1 / targets
  assert 'majority' in right['top-1'].baselines


def test_chance_of_balanced_accuracy_is_that_of_a_guess_among_all_targets(data):
  scores = _scores(data, 'shape', _Oracle(3), num_examples=1)  # one of the three classes has examples
  assert scores['balanced_accuracy'].chance == scores['top-1'].chance == 1 / 3


def test_each_example_is_evaluated_and_counted_once_although_the_last_batch_is_filled_up(data):
  score = _scores(data, 'package', oracle := _Oracle(2))['top-1']
  assert score.count == 16  # 24 paragraphs, a third of them without a label; batches of 5
  assert set(oracle.seen) == set(range(16)) and len(oracle.seen) == 20


def test_baselines_fit_the_input(data):
  baseline_names = {name: set(_scores(data, name, _Oracle(n))['top-1'].baselines)
                    for name, n in (('shape', 3), ('motion', 2), ('package', 2), ('question', 3))}
  assert baseline_names == {
      'shape': {'majority', 'nearest neighbor'}, 'motion': {'majority', 'one frame', 'all frames'},
      'package': {'majority', 'tf-idf'}, 'question': {'majority', 'question alone', 'nearest neighbor'}}


def test_baselines_of_questions_are_the_most_common_answer_and_that_of_the_nearest_image(data):
  columns = tiny.columns()['glyphs'][0]
  commonest = {face: Counter(sorted(columns['class'][columns['face'] == face])).most_common(1)[0][0]
               for face in set(columns['face'].tolist())}
  right = np.mean([commonest[face] == shape for face, shape in zip(columns['face'].tolist(), columns['class'])])
  scores = _scores(data, 'question', _Oracle(3))['top-1'].baselines
  assert scores['question alone'] == right > scores['majority']
  assert scores['nearest neighbor'] == 1.0  # the neighbor of a training image is itself


@pytest.mark.parametrize('name, targets', [('shape', 3), ('package', 2), ('pair', 1), ('caption', 1), ('text', 40)])
def test_baselines_can_be_left_out(data, name, targets):
  changes = dict(num_examples=12) if name == 'pair' else {}
  scored, without = ({metric: dataclasses.replace(s, baselines=dict(s.baselines)) for metric, s in _scores(
      data, name, _Oracle(targets), baselines=computed, **changes).items()} for computed in (True, False))
  assert all(s.baselines for s in scored.values())
  assert without == {metric: dataclasses.replace(s, baselines={}) for metric, s in scored.items()}


def test_images_of_files_are_ranked_by_the_texts_of_their_neighbors(data):
  def scores_of(*copied):
    class Copies(Query):
      def neighbor_phrases(self, ids):
        return list(copied)
    return _retrieve(data, _Reader(data[1].tokenizer), _SHARED, 30, Copies)

  scores = scores_of('a red bar', 'a disc', 'a star')
  # Image 1 copies "a disc": closest to "a blue disc", its own. Image 2 copies its own text, 0 its own.
  assert scores['i2t_R@1'].baselines == {"nearest neighbor's name": 1.0}
  # "An image" has a word in common with no copy: by chance; the other three are the closest to one copy each.
  assert scores['t2i_R@1'].baselines["nearest neighbor's name"] >= 3 / 4
  assert scores_of('a star', 'a red bar', 'a disc')['i2t_R@1'].baselines == {"nearest neighbor's name": 0.0}


def test_retrieval_of_equal_features_is_perfect_and_of_shifted_ones_is_nothing(data):
  class Shifted(_Oracle):
    def pairs(self, task_type, fields):
      return np.roll(super().pairs(task_type, fields), 1, axis=1)

    def inputs(self, task_type, fields):
      return _Oracle.pairs(self, task_type, fields)[:, None]

  perfect = _scores(data, 'pair', _Oracle(1), num_examples=12)
  shifted = _scores(data, 'pair', Shifted(1), num_examples=12)
  assert perfect['i2t_R@1'].value == perfect['t2i_R@1'].value == 1.0
  assert shifted['i2t_R@1'].value == 0.0
  assert perfect['i2t_R@1'].chance == 1 / 12 and perfect['t2i_R@5'].chance == 5 / 12
  assert perfect['i2t_R@1'].baselines["nearest neighbor's name"] > 0.9  # the neighbor of a training image is itself


# Images 0 and 1 have a caption in common, which the tokenizer encodes the same; four distinct texts.
_SHARED = [('a red bar', 'an image'), ('An  image', 'a blue disc'), ('a star',)]


class _Reader(_Oracle):
  """Encodes a text as the sum of its images. turned: every image is taken for the one `turned` further on."""

  def __init__(self, tokenizer, turned: int = 0):
    super().__init__(1)
    self._tokenizer, self._turned, self.read = tokenizer, turned, []

  def inputs(self, task_type, fields):
    return np.roll(np.eye(3, dtype=np.float32), self._turned, axis=1)[fields['id']][:, None]

  def pairs(self, task_type, fields):
    rows = zip(fields['target'], fields['target_valid'])
    decoded = [self._tokenizer.decode(row[:valid.sum()].tolist()) for row, valid in rows]
    self.read += decoded
    owners = np.array([[text in map(self._fold, texts) for texts in _SHARED] for text in decoded], np.float32)
    return owners / np.linalg.norm(owners, axis=1, keepdims=True)

  def _fold(self, text):
    return self._tokenizer.decode(self._tokenizer.encode(text))


def _retrieve(data, reader, texts, max_len, query=Query, **changes):
  """Scores of retrieval among three images with these texts."""
  query = _query(data, 'pair', reader, query, num_draws=0, batch_size=3)
  examples = dataclasses.replace(query.examples, size=3, references=lambda ids: [texts[i] for i in ids])
  evaluation = dataclasses.replace(query.evaluation, task=dataclasses.replace(query.task, max_len=max_len))
  return _run(dataclasses.replace(query, evaluation=evaluation, examples=examples, **changes))


def test_images_that_share_a_caption_are_right_for_it_and_it_is_evaluated_once(data):
  reader = _Reader(data[1].tokenizer)
  perfect = _retrieve(data, reader, _SHARED, 30)
  assert {name: s.value for name, s in perfect.items()} == {
      f'{direction}_R@{k}': 1.0 for k in (1, 5, 10) for direction in ('i2t', 't2i')}
  assert (perfect['i2t_R@1'].count, perfect['t2i_R@1'].count) == (3, 4)
  assert len(set(reader.read)) == 4 and len(reader.read) == 6  # two batches of three, the last filled up
  # Two, two and one of four texts; one, two, one and one of three images.
  assert perfect['i2t_R@1'].chance == pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)
  assert perfect['t2i_R@1'].chance == pytest.approx((1 / 3 + 2 / 3 + 1 / 3 + 1 / 3) / 4)


def test_retrieval_can_end_before_each_batch_of_texts(data):
  reader = _Reader(data[1].tokenizer)

  def stop():
    assert not reader.read, 'stopped'
  with pytest.raises(AssertionError, match='stopped'):
    _retrieve(data, reader, _SHARED, 30, before_batch=stop)
  assert len(reader.read) == 3  # one of two batches


def test_recall_of_files_of_a_model_that_takes_every_image_for_the_next(data):
  wrong = _retrieve(data, _Reader(data[1].tokenizer, turned=1), _SHARED, 30)
  # 0 as 1: its blue disc is closest, which 0 does not have; 1 as 2: the star; 2 as 0: the red bar.
  assert wrong['i2t_R@1'].value == 0.0
  # The shared text: images 2 and 0 are as close as can be, and 0 has it, but a tie counts against the model.
  assert wrong['t2i_R@1'].value == 0.0 and wrong['t2i_R@5'].value == wrong['i2t_R@5'].value == 1.0


def test_texts_that_differ_after_their_cut_are_one_candidate(data):
  # Cut to three words and the end, those of images 0 and 1 are equal: two candidates, right for two images and for one.
  tokenizer = data[1].tokenizer
  texts = [('a red bar and a disc',), ('a red bar and a star', 'a red bar'), ('a star',)]
  scores = _retrieve(data, _Reader(tokenizer), texts, len(tokenizer.encode('a red bar')) + 1)
  assert (scores['i2t_R@1'].count, scores['t2i_R@1'].count) == (3, 2)
  assert scores['t2i_R@1'].chance == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_names_that_differ_after_their_cut_are_one_candidate(data):
  query = _query(data, 'pair', _Oracle(1), num_examples=0)
  evaluation = dataclasses.replace(query.evaluation, task=dataclasses.replace(query.task, max_len=8))
  names = set(tiny.columns()['glyphs'][0]['name'].tolist())
  cut = {tuple(data[1].tokenizer.encode(name)[:7]) for name in names}
  assert _run(dataclasses.replace(query, evaluation=evaluation))['i2t_R@1'].count == len(cut) < len(names)
  assert _run(query)['i2t_R@1'].count == len(names)


def test_candidates_have_distinct_tokens_and_too_many_are_refused():
  texts, folded = np.array(['a', 'b', 'a', 'c', 'b', 'B']), np.array([0, 1, 0, 2, 1, 1])
  draw = lambda number, rows=folded, seed=0: evaluators._distinct(texts, rows, number, np.random.default_rng(seed))
  assert sorted(folded[draw(3)]) == [0, 1, 2]
  with pytest.raises(ValueError, match='needs 4 distinct texts, but the split has 3; lower its num_examples'):
    draw(4)
  for seed in range(20):  # only a second text with the same tokens is replaced
    by_text = draw(2, np.array([0, 1, 0, 2, 1, 3]), seed)
    assert len(set(by_text) & set(draw(2, seed=seed))) == len(set(folded[by_text])), seed


def test_captions_are_compared_with_the_first_phrase(data):
  names = tiny.columns()['glyphs'][0]['name'].tolist()
  right = _scores(data, 'caption', _Oracle(1, captions=names), batch_size=24)
  wrong = _scores(data, 'caption', _Oracle(1), batch_size=24)
  assert (right['exact_match'].value, right['word F1'].value) == (1.0, 1.0)
  assert right['BLEU-4'].value == pytest.approx(1.0)
  assert right['ROUGE-L'].value == pytest.approx(1.0) and right['CIDEr-D'].value > 5
  assert wrong['ROUGE-L'].value == wrong['CIDEr-D'].value == 0.0
  assert right['CIDEr-D'].baselines["nearest neighbor's name"] > 5
  assert (wrong['exact_match'].value, wrong['word F1'].value) == (0.0, 0.0)
  assert right['exact_match'].baselines["nearest neighbor's name"] > 0.9


_YEARS = [('bus 1984',), ('train 2011',), ("a plane at 5 o'clock",)]
_SPLIT_YEARS = ['bus 1 9 8 5', 'train 2 0 1 2', "a plane at 5 o ' clock"]  # wrong by one, as the tokenizer decodes them


def _captions(data, tokenizer, references, captions, samples=None, **changes):
  """Scores of captions of three images with these references. samples: a dictionary that gets some of them."""
  query = _query(data, 'caption', _Oracle(1, captions=captions), num_examples=0, batch_size=3, **changes)
  examples = dataclasses.replace(query.examples, size=3, references=lambda ids: [references[i] for i in ids])
  samples = {} if samples is None else samples
  return _run(dataclasses.replace(query, examples=examples, tokenizer=tokenizer, samples=samples))


@pytest.fixture(scope='module')
def published_tokenizer(tmp_path_factory):
  merges = tmp_path_factory.mktemp('merges') / 'merges.txt'
  merges.write_text('#version: 0.2\nt h\n')
  return ClipTokenizer(merges)


def test_references_do_not_pass_through_the_tokenizer(data, published_tokenizer):
  # It splits digits: were references split, too, a year that is wrong by one would be right in three words of four.
  tokenizer = published_tokenizer
  split = [[tokenizer.decode(tokenizer.encode(text)) for text in several] for several in _YEARS]
  raw = caption_metrics.cider_d(['bus 1985', 'train 2012', "a plane at 5 o'clock"], _YEARS).mean()
  assert caption_metrics.cider_d(_SPLIT_YEARS, split).mean() > raw + 2
  scores = _captions(data, tokenizer, _YEARS, _SPLIT_YEARS)
  assert scores['CIDEr-D'].value == pytest.approx(raw)
  assert scores['exact_match'].value == 1 / 3


def test_captions_may_be_scored_as_the_tokenizer_splits_them(data, published_tokenizer):
  scores = _captions(data, published_tokenizer, _YEARS, _SPLIT_YEARS, detokenize=False)
  assert scores['CIDEr-D'].value == pytest.approx(caption_metrics.cider_d(_SPLIT_YEARS, _YEARS).mean())
  assert scores['exact_match'].value == 0.0


def test_a_caption_equal_to_one_of_its_references_is_exact_in_the_score_and_in_the_samples(data, tmp_path):
  references = [('a red bar', 'a bar'), ('a disc', 'a blue disc'), ('a star',)]
  captions, samples = ['a bar', 'a red disc', 'a star'], {}  # the second is equal to neither of two
  scores = _captions(data, data[1].tokenizer, references, captions, samples)
  assert scores['exact_match'].value == 2 / 3
  assert [(s['reference'], s['prediction']) for s in samples['caption']] == [
      (list(several), caption) for several, caption in zip(references, captions, strict=True)]
  files.write_json(tmp_path / 'samples.json', samples)
  assert 'Caption · 2 of 3 exact' in reporting_html.write_report(tmp_path).read_text()


def test_perplexity_is_the_inverse_of_a_constant_probability(data):
  V = data[1].tokenizer.size
  right, wrong = (_scores(data, 'text', _Oracle(V, r)) for r in (True, False))
  assert right['perplexity'].value == pytest.approx(1 / 0.9)
  assert wrong['perplexity'].value == pytest.approx((V - 1) / 0.1, rel=1e-5)  # in float32
  assert (right['accuracy'].value, wrong['accuracy'].value) == (1.0, 0.0)
  assert right['perplexity'].chance == V


@pytest.mark.parametrize('baselines', [True, False])
def test_texts_whose_words_are_all_too_long_to_be_masked_are_an_error(data, baselines):
  query = _query(data, 'text', _Oracle(data[1].tokenizer.size), baselines=baselines)
  without_masks = lambda *args: {**(fields := query.examples.make(*args)), 'weight': 0 * fields['weight']}
  examples = dataclasses.replace(query.examples, make=without_masks, make_undamaged=None)
  with pytest.raises(ValueError, match='no examples to score'):
    _run(dataclasses.replace(query, examples=examples))


def test_a_subset_is_seeded_by_the_evaluators_name(data):
  ids = [_query(data, 'shape', None, name=name, num_examples=6).ids().tolist() for name in ('x', 'x', 'y')]
  assert ids[0] == ids[1] != ids[2] and len(set(ids[0])) == 6


def test_an_evaluation_has_the_views_and_the_search_of_its_config(data):
  plan, d = data
  views, search = dict(num_views=2, num_crops=3), dict(beam_size=4, length_penalty=0.5, max_len=5)
  evaluation = dataclasses.replace(
      next(e for e in plan.evaluations if e.name == 'caption'), num_examples=3, batch_size=3, **views, **search)
  seen = []

  class Recorded:
    def __getattr__(self, name):
      return getattr(d, name)

    def examples(self, task, split, **fields):
      seen.append(fields)
      return d.examples(task, split, **fields)

  class Recorder(_Oracle):
    def captions(self, task, pixels, beam_size, length_penalty, max_len, reranker):
      seen.append(dict(beam_size=beam_size, length_penalty=length_penalty, max_len=max_len))
      return ['a'] * len(pixels)

  suite.scores(evaluation, Recorded(), Recorder(1), {})
  assert seen == [views, search]
