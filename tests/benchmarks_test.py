"""Every benchmark and the pretraining mixture: shapes at full size, and a real step and evaluation when shrunken, on invented data.

TFDS data sets are mocked by TFDS itself, with their own features and class names; own data has the columns that docs/benchmarks.md
says.
"""

import functools
import importlib.util
import io
import pathlib

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.testing import mocking

from tests import small_model, tiny
from tests.data import own_files
from uni_moe_jax import benchmarks, config, regimes, resolve
from uni_moe_jax.data import assemble, stored
from uni_moe_jax.data.mixtures import evaluation_batches
from uni_moe_jax.data.stored import Stored
from uni_moe_jax.data.templates import fill_template
from uni_moe_jax.eval import suite
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.preflight import programs
from uni_moe_jax.train import setup, workdir

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_EXAMPLES = 6
_WORDS = tiny.WORDS
_V = 49411  # of CLIP's vocabulary with the published specials


def _config(arg: str, file: str = 'benchmark'):
  spec = importlib.util.spec_from_file_location(file, _ROOT / f'configs/{file}.py')
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
  return own_files.npy(own_files.moving(i % 2 == 0))


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
  columns |= {'label': 'class'} if by_class else (
      {'question': 'text', 'answers': 'texts'} if name == 'vqa' else {'captions': 'texts'})
  columns = {'text': 'text'} if name == 'bookswiki' else columns
  value = {
      'image': _picture, 'video': _clip, 'label': lambda i: classes['label'][i % 2], 'question': _text, 'text': _text,
      'answers': lambda i: ('yes', 'no', 'two') * 3 + ('red',), 'captions': lambda i: (_text(i), _text(i + 100))}
  rows = lambda ids: [{c: value[c](i) for c in columns} for i in ids.tolist()]
  return Stored(source, _EXAMPLES, rows, columns, classes, {}, source)


@pytest.fixture(name='named', scope='module')
def _named(tmp_path_factory):
  """A folder of data with the files of class names, which no test changes."""
  folder = tmp_path_factory.mktemp('data')
  names = folder / 'class_names'
  names.mkdir()
  wnids = tfds.builder('imagenet2012', data_dir=folder).info.features['label'].names
  (names / 'imagenet1k.tsv').write_text(''.join(f'{w}\tname {i}|other {i}\n' for i, w in enumerate(wnids)))
  (names / 'imagenet21k.tsv').write_text('n01\tdog|hound\nn02\tcat\n')
  (names / 'vqa_answers.tsv').write_text('yes\nno\n2\n3\n')
  return folder


@pytest.fixture
def invented(monkeypatch, named):
  """Data of every source, and the files of class names."""
  # As it is in TFDS 4.9.10, reading several records of a mocked source at once lacks an argument.
  monkeypatch.setattr(mocking, '_getitems', lambda keys, generator, **_: [generator[k] for k in keys])
  monkeypatch.setattr(stored, '_own', lambda source, *_: _own(source))
  monkeypatch.setattr(stored, '_check_prepared', lambda *_: None)
  opened = stored._open
  monkeypatch.setattr(
      stored, '_open', lambda builder, *rest: _Coco() if builder.name == 'coco_captions' else opened(builder, *rest))
  with tfds.testing.mock_data(num_examples=_EXAMPLES):
    yield named


def _small(c, data_dir):
  """As the config is, but for sizes and words."""
  c.data.dir = str(data_dir)
  c.tokenizer.update(dict(kind='sentencepiece', file=tiny.tokenizer_file()))
  c.model.update(dict(layers=1, width=16, heads=2, hidden=16, image_size=16, patch=8, drop_path=0.0, remat=False))
  c.moe.num_experts = 2
  for t in c.tasks.values():
    t.batch = 4 * bool(t.batch)
  for e in c.evaluators.values():
    e.batch = 4
  return c


def _run(c, devices: int = 1):
  return setup.build(c, jax.devices()[:devices])


def _predictor(run, params):
  sets = {s.name: (s, run.data.sets[s.name]) for s in (*run.plan.sets, *run.plan.probe_sets, *run.plan.answer_sets)}
  return Predictor(run.spec.model, params, sets, run.data.tokenizer)


def _rows(run, params, folder):
  return suite.evaluate(run.plan, run.data, _predictor(run, params), 1, folder)


def _step(run):
  """The state after a step of every task, which is finite."""
  task, batch = next(run.mixture().iterate(0, 1))
  assert task is None
  state, metrics = run.step_fn()(setup.first_state(run), run.put(batch), run.sets())
  assert np.isfinite(float(metrics['loss/total'])) and float(metrics['skipped']) == 0
  return state


def _slow(names, first):
  """Of every kind of task `first` has one, which CI tries; it has no time for the others."""
  return [pytest.param(n, marks=pytest.mark.slow if n in first else pytest.mark.nightly) for n in names]


@pytest.mark.parametrize('name', _slow(benchmarks.DOWNSTREAM, ('imagenet1k', 'kinetics400', 'coco_caption', 'vqa', 'mrpc')))
def test_a_shrunken_benchmark_takes_a_step_and_is_evaluated(name, invented, tmp_path):
  run = _run(_small(_config(name), invented))
  rows = _rows(run, _step(run).params, tmp_path)
  assert {r['evaluator'] for r in rows} == set(run.config.evaluators)
  assert all(np.isfinite(r['value']) for r in rows)
  counts = {r['count'] for r in rows if '←' not in r['metric']}
  assert counts == {_EXAMPLES}  # each once, although they do not divide into batches of four


@pytest.mark.parametrize('name', _slow(['mrpc', 'vqa', 'kinetics400', 'coco_retrieval'], ('mrpc', 'coco_retrieval')))
def test_every_row_is_the_same_on_eight_devices(name, invented, tmp_path):
  """GLUE's metrics, soft scores, views × crops and texts of files, in batches of four of which none divides the six examples."""
  tables = []
  for devices in (1, 8):
    c = _small(_config(name), invented)
    c.tasks[name].batch = 8
    c.mesh.update(dict(replica=1, data=1, expert=1, model=1) if devices == 1 else dict(replica=1, data=2, expert=2, model=2))
    run = _run(c, devices)
    tables.append(_rows(run, jax.device_put(small_model.params(run.spec.model.spec), run.shardings.params), tmp_path))
  assert tables[0] == tables[1] and all(0 <= r['value'] for r in tables[0] if r['metric'] != 'Matthews')
  assert {r['count'] for r in tables[0] if '←' not in r['metric']} == {_EXAMPLES}


def _shapes(c, task: str | None = None):
  """(run, batch, state, metrics) of a training step at the config's own sizes, by shape inference alone."""
  c.tokenizer.merges = 'a file that only its user has'
  run = programs.prepare(c, jax.devices()[:1])
  batch = programs.batch_shapes(run, run.plan.tasks if task is None else run.plan.only(task).tasks)
  return run, batch, *jax.eval_shape(run.step_fn(task), run.like(), batch, setup.set_arrays(run.data, run.plan))


_ENTRIES = {
    'imagenet1k': 1000, 'kinetics400': 400, 'vqa': 3129, 'cola': 2, 'sst2': 2, 'mrpc': 2, 'qqp': 2, 'mnli': 3, 'qnli': 2, 'rte': 2}


@pytest.mark.parametrize('name', _slow(benchmarks.DOWNSTREAM, ('imagenet1k', 'msvd_caption', 'coco_retrieval', 'mnli')))
def test_shapes_of_a_step_at_full_size(name):
  run, batch, state, metrics = _shapes(_config(name))
  assert run.spec.model.spec.layers == 12 and metrics['loss/total'].shape == ()
  assert state.params['embed']['word'].shape == (_V, 192)
  [fields], [t] = batch.values(), run.plan.tasks
  assert fields['id'].shape == (1, t.batch)
  assert {s.size for s in run.data.sets.values()} == ({_ENTRIES[name]} if name in _ENTRIES else {_V} if t.target_set else set())
  if t.kind.visual:
    assert fields['pixels'].shape == (1, t.batch, max(1, t.frames), 224, 224, 3)


@pytest.mark.slow
@pytest.mark.parametrize('arg, task', [('base-attribute-1-sampled', 'cc12m_caption'), ('large-token-2-sampled', 'kinetics700')])
def test_shapes_of_a_step_of_pretraining_at_full_size(arg, task):
  run, batch, state, metrics = _shapes(_config(arg, 'pretrain'), task)
  assert metrics['loss/total'].shape == () and len(run.plan.tasks) == 16
  assert state.params['embed']['word'].shape == (_V, 768 if arg.startswith('base') else 1024)
  assert {n: s.size for n, s in run.data.sets.items()} == {
      'imagenet21k': 21_842, 'kinetics700': 700, 'moments': 339, 'vocabulary': _V}
  [fields] = batch.values()
  assert fields['id'].shape == (1, run.config.tasks[task].batch)


@pytest.mark.slow
def test_the_sixteen_tasks_give_one_batch_of_their_groups():
  run = programs.prepare(_small(_config('tiny-attribute-1', 'pretrain'), 'nowhere'), jax.devices()[:1])
  assert len(run.plan.tasks) == 16
  assert {g: f['id'].shape[1] for g, f in programs.batch_shapes(run, run.plan.tasks).items()} == {
      'text_mlm': 4, 'image_classification': 4, 'video_classification/0/0/4/1': 4, 'video_classification/0/0/3/1': 4,
      'image_caption/50/0': 20, 'image_caption/30/0': 4, 'image_retrieval/50/0': 20, 'image_retrieval/30/0': 4}


@pytest.mark.slow
def test_a_shrunken_pretraining_takes_a_step_of_every_kind_and_is_evaluated(invented, tmp_path):
  c = _small(_config('tiny-attribute-1', 'pretrain'), invented)
  for name in set(c.tasks) - {'imagenet21k', 'kinetics700', 'bookswiki', 'coco_caption', 'coco_retrieval'}:
    del c.tasks[name]  # like one that stays, and sixteen pipelines take a minute to start
  c.tasks.imagenet21k.randaugment = 0.0  # imagenet1k has it
  run = _run(c)
  assert run.data.sets['imagenet21k'].buckets[0]['count'].tolist() == [2, 1]
  rows = _rows(run, _step(run).params, tmp_path)
  assert {(r['evaluator'], r['count']) for r in rows if '←' not in r['metric']} == {
      ('coco captions', _EXAMPLES), ('coco retrieval', _EXAMPLES)}


# Benchmark → batch, tokens, learning rate, decay, second moment's, warmup, steps: the published files, by hand.
_PUBLISHED = {
    'imagenet1k': (128, 0, 2e-5, 1e-8, 0.999, 2000, 20_000),
    'kinetics400': (8, 0, 5e-6, 1e-4, 0.95, 2000, 40_000),
    'coco_caption': (32, 30, 2e-5, 1e-4, 0.95, 500, 10_000),
    'coco_retrieval': (256, 30, 5e-6, 1e-4, 0.95, 500, 10_000),
    'flickr30k_caption': (32, 30, 2e-6, 1e-4, 0.95, 500, 4_000),
    'flickr30k_retrieval': (256, 30, 5e-6, 1e-4, 0.95, 200, 5_000),
    'msvd_caption': (2, 30, 2e-5, 1e-4, 0.95, 100, 1_000),
    'msvd_retrieval': (16, 30, 5e-6, 1e-4, 0.95, 200, 2_000),
    'vqa': (64, 23, 4e-5, 0.05, 0.999, 1000, 20_000),
    'cola': (16, 256, 1e-5, 0.1, 0.98, 400, 5_600),
    'sst2': (32, 256, 1e-5, 0.1, 0.98, 1500, 22_000),
    'mrpc': (16, 256, 1e-5, 0.1, 0.98, 150, 2_500),
    'qqp': (32, 256, 1e-5, 0.1, 0.98, 28_000, 115_000),
    'mnli': (32, 256, 1e-5, 0.1, 0.98, 7500, 125_000),
    'qnli': (16, 256, 1e-5, 0.1, 0.98, 2000, 34_000),
    'rte': (16, 256, 2e-5, 0.1, 0.98, 150, 2_500),
}


@pytest.mark.parametrize('name', list(_PUBLISHED))
def test_a_benchmark_is_tuned_as_published(name):
  c = _config(name)
  t, o = c.tasks[name], c.optim
  assert o.rules[-1][0] == '.*'
  assert (t.batch, t.length, o.learning_rate, o.rules[-1][2], o.b2, o.warmup, c.train.steps) == _PUBLISHED[name]
  others = {'vqa': (1e-8, 0.0, 1e-8), 'imagenet1k': (1e-6, 0.1, 1e-8)} | dict.fromkeys(_GLUE, (1e-8, 0.5, 1e-8))
  expected = others.get(name, (1e-6, 0.1, 1e-6))
  assert (o.eps, o.clip, o.final * o.learning_rate) == pytest.approx(expected)  # the rate falls no lower than the last


# Task → its record, what the model reads of it, and the word of every class as TFDS calls them.
_GLUE = {
    'cola': (dict(sentence='they left'), 'they left This is <spe> . <eot>', {'unacceptable': 'incorrect', 'acceptable': 'correct'}),
    'sst2': (dict(sentence='a joy'), 'a joy <eot> It is <spe> . <eot>', {'negative': 'bad', 'positive': 'wonderful'}),
    'mrpc': (dict(sentence1='it rained .', sentence2='rain fell .'), 'it rained . <spe> , rain fell . <eot>',
             {'not_equivalent': 'no', 'equivalent': 'yes'}),
    'qqp': (dict(question1='who ?', question2='which ?'), 'who ? <eot> <spe> , which ? <eot>',
            {'not_duplicate': 'no', 'duplicate': 'yes'}),
    'mnli': (dict(premise='it rained .', hypothesis='it is wet .'), 'it rained . <spe> , it is wet . <eot>',
             {'entailment': 'yes', 'neutral': 'maybe', 'contradiction': 'no'}),
    'qnli': (dict(question='who left ?', sentence='they left'), 'who left ? <eot> it is <spe> , they left <eot>',
             {'entailment': 'yes', 'not_entailment': 'no'}),
    'rte': (dict(sentence1='it rained', sentence2='it is wet'), 'it rained ? <eot> it is <spe> , it is wet <eot>',
            {'entailment': 'yes', 'not_entailment': 'no'}),
}


class _Whole:
  """A tokenizer whose tokens are words."""
  spe, eot = '<spe>', '<eot>'

  @staticmethod
  def encode(text):
    return text.split()


@pytest.mark.parametrize('name', list(_GLUE))
def test_glue_is_asked_in_the_published_words(name):
  row, read, words = _GLUE[name]
  c = _config(name)
  t = c.tasks[name]
  tokens, slot = fill_template(_Whole, t.template, {column: text.split() for column, text in row.items()}, t.length)
  assert ' '.join(tokens) == read and tokens[slot] == '<spe>'
  assert dict(c.sets[name]['values']) == words
  # Of two, F1 is of the second.
  assert len(words) == 3 or c.sets[name]['values'][1][1] in ('correct', 'wonderful', 'yes')


@pytest.mark.parametrize('name', list(_GLUE))
def test_records_of_glue_have_its_columns_and_classes(name, invented):
  c = _small(_config(name), invented)
  plan = resolve.resolve(c)
  [t], data = plan.tasks, assemble.Data(c, plan)
  fields = next(evaluation_batches(data.examples(t, plan.evaluations[0].split), np.arange(4), 4))[0]
  slot = np.take_along_axis(fields['text'], fields['position'], 1)
  assert (slot == data.tokenizer.spe).all() and (fields['weight'] == 1).all()
  assert set(data.records(t.source, 'train').classes['label']) == set(_GLUE[name][2])


def _written(data_dir, name: str, splits: dict) -> None:
  """Some examples of a TFDS data set, where and as TFDS would prepare it."""
  builder = stored.tfds_builder(f'tfds:{name}', data_dir)
  tfds.dataset_builders.store_as_tfds_dataset(
      builder.name, builder.version, builder.info.features, splits, config=builder.builder_config.name, data_dir=data_dir / 'tfds',
      file_format='array_record', disable_shuffling=True)


def test_coco_is_read_as_tfds_prepares_it(tmp_path):
  c = _config('coco_retrieval')
  with pytest.raises(FileNotFoundError, match="source 'tfds:coco_captions' is not in .*--tfds=coco_captions"):
    _run(_small(c, tmp_path))
  example = lambda i: {
      'image': io.BytesIO(_picture(i)), 'image/filename': f'{i}.jpg', 'image/id': i, 'objects': [],
      'captions': {'id': [2 * i, 2 * i + 1], 'text': [f'a picture {i}', f'the shape {i}']}}
  _written(tmp_path, 'coco_captions', {
      split: [(i, example(i)) for i in ids] for split, ids in {'train': (0, 1), 'restval': (2,), 'test': (3, 4, 5)}.items()})
  run = _run(_small(_config('coco_retrieval'), tmp_path))
  [t] = run.plan.tasks
  assert run.data.examples(t, training=True).size == 3  # train and restval
  asked = run.data.examples(t, 'test')
  assert asked.references(np.arange(3)) == [(f'a picture {i}', f'the shape {i}') for i in (3, 4, 5)]
  fields = next(evaluation_batches(asked, np.arange(3), 3))[0]
  red = fields['pixels'][:, 0].mean(axis=(1, 2))
  assert fields['pixels'].shape == (3, 1, 16, 16, 3) and (red[:, 0] > 150).all() and (red[:, 1:] < 60).all()
  with pytest.raises(ValueError, match="split 'tests' of source 'tfds:coco_captions'.*did you mean 'test'"):
    run.data.records(t.source, 'tests')


@pytest.fixture(name='trained', scope='module')
def _trained(tmp_path_factory):
  """The work directory of a run whose pictures are small and whose texts are short; it has no steps yet."""
  c = config.base()
  c.tokenizer.update(dict(kind='sentencepiece', file=tiny.tokenizer_file()))
  c.model.update(dict(layers=2, width=16, heads=2, hidden=16, image_size=16, patch=8, max_text=40, remat=False))
  c.moe.num_experts = 2
  c.sets.vocabulary = config.target_set('vocabulary', family='words')
  c.tasks.coco_words = config.task(
      'image_caption', 'tfds:coco_captions', batch=4, target_set='vocabulary', captions=('{captions/text}',), length=20)
  folder = tmp_path_factory.mktemp('runs') / 'trained'
  workdir.claim_workdir(folder, c, 'print')
  return str(folder)


@pytest.mark.parametrize('mode', ['', ',finetune', ',prompts', ',untuned'])
@pytest.mark.parametrize('name', ['cola', 'coco_caption', 'vqa'])
def test_a_benchmark_starts_from_a_run(trained, name, mode):
  c = _config(f'{name},{trained}{mode}')
  plan, t = resolve.resolve(c), c.tasks[name]
  assert (c.train.init, c.model.width, c.model.max_text) == (trained, 16, 40)
  assert t.length == min(40, _PUBLISHED[name][1])  # the model has room for so many
  assert {e.task.name for e in plan.evaluations} == {name}
  trains = {'': '.*', ',finetune': '.*', ',prompts': config.FREEZE, ',untuned': ''}[mode]
  assert [t.name for t in plan.tasks] == ([name] if trains else [])
  if trains == '.*':
    _, _, rate, decay, *_, steps = _PUBLISHED[name]
    assert (c.optim.learning_rate, c.optim.rules[-1][2], c.train.steps) == (rate, decay, steps)
  elif trains:
    expected = config.base()
    regimes.train_prompts(expected)
    assert (c.optim, c.train.steps, c.model.prompts) == (expected.optim, expected.train.steps, expected.model.prompts)
  # A run has its own scales: the captions' is the only one here.
  assert t.temperature == ('image_caption' if name == 'coco_caption' or mode == ',untuned' else '')


@pytest.mark.parametrize('arg, message', [
    ('imagenet', "benchmark 'imagenet' is unknown; did you mean 'imagenet1k'"), ('cola,,prompt', "mode 'prompt' is unknown"),
    ('cola,nowhere', "'nowhere' holds no run")])
def test_a_wrong_argument_is_named(arg, message):
  with pytest.raises(ValueError, match=message):
    _config(arg)
