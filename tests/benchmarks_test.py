"""Every benchmark and the pretraining mixture: shapes at full size, and a real step and evaluation when shrunken, on invented data.

TFDS data sets are mocked by TFDS itself, with their own features and class names; own data has the columns that docs/benchmarks.md says.
"""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.testing import mocking

from tests import tiny
from tests.data import own_files
from uni_moe_jax import benchmarks, config, recipes, resolve
from uni_moe_jax.data import assemble, stored
from uni_moe_jax.data.stored import Stored
from uni_moe_jax.eval import suite
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.train import setup

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_EXAMPLES = 6
_WORDS = tiny.WORDS


def _config(arg: str):
  spec = importlib.util.spec_from_file_location('benchmark', _ROOT / 'configs/benchmark.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


def _text(i: int, n: int = 6) -> str:
  return ' '.join(np.random.default_rng(i).choice(_WORDS, n))


@functools.cache
def _picture(i: int) -> bytes:
  return own_files.encoded(own_files.picture('red', i, (20 + i, 30)))


@functools.cache
def _clip(i: int) -> bytes:
  import io
  out = io.BytesIO()
  np.save(out, own_files.moving(i % 2 == 0))
  return out.getvalue()


class _Coco:
  """COCO's captions: TFDS's own mock gives the parts of its list of objects different lengths."""

  def __len__(self):
    return _EXAMPLES

  def __getitems__(self, keys):
    return [{'image': _picture(i), 'image/filename': f'{i}.jpg', 'captions': {'text': [_text(i), _text(i + 100)]}} for i in keys]


def _own(source: str) -> Stored:
  """Records with the columns that a benchmark's own data has."""
  name = source.removeprefix('own:')
  by_class, clips = name in ('kinetics400', 'kinetics700', 'moments', 'imagenet21k'), name in (
      'kinetics400', 'kinetics700', 'moments', 'msvd', 'msrvtt')
  classes = {'label': ('n01', 'n02') if name == 'imagenet21k' else ('running fast', 'sitting')} if by_class else {}
  columns = {'video' if clips else 'image': 'video' if clips else 'image'}
  columns |= {'label': 'class'} if by_class else {'question': 'text', 'answers': 'texts'} if name == 'vqa' else {'captions': 'texts'}
  columns = {'text': 'text'} if name == 'bookswiki' else columns
  value = {
      'image': _picture, 'video': _clip, 'label': lambda i: classes['label'][i % 2], 'question': _text, 'text': _text,
      'answers': lambda i: ('yes', 'no', 'two') * 3 + ('red',), 'captions': lambda i: (_text(i), _text(i + 100))}
  rows = lambda ids: [{c: value[c](i) for c in columns} for i in ids.tolist()]
  return Stored(source, _EXAMPLES, rows, columns, classes, {}, source)


@pytest.fixture(autouse=True)
def invented(monkeypatch, tmp_path):
  """Data of every source, and the files of class names."""
  # As it is in TFDS 4.9.10, reading several records of a mocked source at once lacks an argument.
  monkeypatch.setattr(mocking, '_getitems', lambda keys, generator, **_: [generator[k] for k in keys])
  monkeypatch.setattr(stored, '_own', lambda source, *_: _own(source))
  monkeypatch.setattr(stored, '_check_prepared', lambda *_: None)
  opened = stored._open
  monkeypatch.setattr(stored, '_open', lambda builder, *rest: _Coco() if builder.name == 'coco_captions' else opened(builder, *rest))
  names = tmp_path / 'class_names'
  names.mkdir()
  wnids = tfds.builder('imagenet2012', data_dir=tmp_path).info.features['label'].names
  (names / 'imagenet1k.tsv').write_text(''.join(f'{w}\tname {i}|other {i}\n' for i, w in enumerate(wnids)))
  (names / 'imagenet21k.tsv').write_text('n01\tdog|hound\nn02\tcat\n')
  (names / 'vqa_answers.tsv').write_text('yes\nno\ntwo\nthree\n')
  with tfds.testing.mock_data(num_examples=_EXAMPLES):
    yield tmp_path


def _small(c, data_dir):
  """As the config is, but for sizes and words."""
  c.data.dir = str(data_dir)
  c.tokenizer.update(dict(kind='sentencepiece', file=tiny.tokenizer_file()))
  c.model.update(dict(layers=1, width=16, heads=2, hidden=16, image_size=16, patch=8, drop_path=0.0, remat=False))
  c.moe.num_experts = 2
  for t in c.tasks.values():
    t.batch = 4
  for e in c.evaluators.values():
    e.batch = 4
  return c


def _run(c):
  plan = resolve.resolve(c)
  return setup.build(c, jax.devices()[:1], assemble.Data(c, plan))


@pytest.mark.slow
@pytest.mark.parametrize('name', list(benchmarks.DOWNSTREAM))
def test_a_shrunken_benchmark_takes_a_step_and_is_evaluated(name, invented, tmp_path):
  run = _run(_small(_config(name), invented))
  task, batch = next(run.mixture().iterate(0, 1))
  assert task is None
  state, metrics = run.step_fn()(run.init(), run.put(batch), run.sets())
  assert np.isfinite(float(metrics['loss/total'])) and float(metrics['skipped']) == 0
  sets = {s.name: (s, run.data.sets[s.name]) for s in run.plan.sets}
  predictor = Predictor(UniPerceiver(run.spec.model.spec), state.params, sets, run.data.tokenizer)
  rows = suite.evaluate(run.plan, run.data, predictor, 1, tmp_path)
  assert {r['evaluator'] for r in rows} == set(run.config.evaluators)
  assert all(np.isfinite(r['value']) for r in rows)
  counts = {r['count'] for r in rows if r['metric'] != 'R@1 ← text' and '←' not in r['metric']}
  assert counts == {_EXAMPLES}  # each once, although they do not divide into batches of four


def _shapes(c):
  """Metrics of a training step at the config's own sizes, by shape inference alone."""
  run = _run(c)
  batch = next(run.mixture().iterate(0, 1))
  step = run.step_fn(batch[0])
  return run, batch[1], jax.eval_shape(step._jitted, run.shapes, batch[1], run.sets(), step._key)


@pytest.mark.slow
@pytest.mark.parametrize('name', list(benchmarks.DOWNSTREAM))
def test_shapes_of_a_step_at_full_size(name, invented):
  c = _config(name)
  c.data.dir = str(invented)
  c.tokenizer.update(dict(kind='sentencepiece', file=tiny.tokenizer_file()))  # what CLIP's vocabulary has more, has no part in shapes here
  run, batch, (state, metrics) = _shapes(c)
  assert run.spec.model.spec.layers == 12 and metrics['loss/total'].shape == ()
  [fields] = batch.values()
  t = run.plan.tasks[0]
  assert fields['id'].shape == (1, t.batch)
  if 'pixels' in fields:
    assert fields['pixels'].shape == (1, t.batch, max(1, t.frames), 224, 224, 3)


def test_the_sixteen_tasks_give_one_batch_of_their_groups(invented):
  c = config.base()
  recipes.published(c)
  benchmarks.pretraining(c)
  c.train.mixture = 'mixed'
  run = _run(_small(c, invented))
  assert len(run.plan.tasks) == 16
  _, batch = next(run.mixture().iterate(0, 1))
  assert {g: f['id'].shape[1] for g, f in batch.items()} == {
      'text_mlm': 4, 'image_classification': 4, 'video_classification/0/0/4/1': 4, 'video_classification/0/0/3/1': 4,
      'image_caption/50/0': 20, 'image_caption/30/0': 4, 'image_retrieval/50/0': 20, 'image_retrieval/30/0': 4}
  assert run.data.sets['imagenet21k'].buckets[0]['count'].tolist() == [2, 1]


@pytest.mark.parametrize('name', list(benchmarks.GLUE))
def test_label_words_stand_where_the_template_asks(name, invented):
  run = _run(_small(_config(name), invented))
  [t] = run.plan.tasks
  examples = run.data.examples(t, 'validation')
  from uni_moe_jax.data.mixtures import evaluation_batches
  fields = next(evaluation_batches(examples, np.arange(4), 4))[0]
  words = benchmarks.GLUE[name].words
  assert run.data.sets[name].texts == tuple(w for _, w in words)
  slot = np.take_along_axis(fields['text'], fields['position'], 1)
  assert (slot == run.data.tokenizer.spe).all()
  assert (fields['text'][fields['text_valid']] == run.data.tokenizer.eot).sum() >= 4


@pytest.mark.parametrize('arg, message', [
    ('imagenet', "benchmark 'imagenet' is unknown; did you mean 'imagenet1k'"), ('cola,,prompt', "mode 'prompt' is unknown"),
    ('cola,nowhere', "'nowhere' holds no run")])
def test_a_wrong_argument_is_named(arg, message):
  with pytest.raises(ValueError, match=message):
    _config(arg)
