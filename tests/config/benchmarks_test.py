"""Benchmarks and pretraining on synthetic data: shapes at full size; step and evaluation at a small one."""

import io
import itertools
import runpy

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.helpers import saved_run, synthetic_records, tiny
from tests.helpers.processes import ROOT
from uni_moe_jax import config
from uni_moe_jax.config import benchmarks, presets, schema
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches import assemble
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.eval import suite
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.preflight import compiled_programs
from uni_moe_jax.tasks.router_names import ROUTERS
from uni_moe_jax.train import adaptation, loop, optimizer, workdir
from uni_moe_jax.train import run as train_run

_EXAMPLES = synthetic_records.EXAMPLES
_V = 49411  # of CLIP's vocabulary with the published specials


def _config(arg: str, file: str = 'benchmark'):
  return runpy.run_path(str(ROOT / f'configs/{file}.py'))['get_config'](arg if '=' in arg else f'task={arg}')


@pytest.fixture
def synthetic(monkeypatch, tmp_path):
  """Data of every source, and the files of class names."""
  synthetic_records.write_class_names(tmp_path)
  with synthetic_records.records(monkeypatch):
    yield tmp_path


def _small_batches(c):
  for t in c.tasks.values():
    t.batch_size = 4 * bool(t.batch_size)
  for e in c.evaluators.values():
    e.batch_size = 4


def _small(c, data_dir):
  """The config with small sizes and another tokenizer."""
  c.data.dir = str(data_dir)
  c.tokenizer.update(dict(type='sentencepiece', path=tiny.tokenizer_file()))
  c.model.update(dict(variant='', num_layers=1, width=16, num_heads=2, mlp_dim=16, image_size=16, patch_size=8,
                      drop_path=0.0, remat=False))
  c.moe.num_experts = 2
  _small_batches(c)
  return c


def _run(c):
  return train_run.build(c, jax.devices()[:1])


def _rows(run, params, folder):
  sets = {s.name: (s, run.data.target_sets[s.name]) for s in (*run.plan.sets, *run.plan.probe_sets)}
  predictor = Predictor(run.spec.model, params, sets, run.data.tokenizer)
  return suite.evaluate(run.plan, run.data, predictor, 1, folder)


def _step(run):
  """The state after a step of every task, which is finite."""
  task, batch = next(run.mixture().iterate(0, 1))
  assert task is None
  state, metrics = run.step_fn()(train_run.initial_state(run), run.put_batch(batch), run.target_sets())
  assert np.isfinite(float(metrics['loss/total'])) and float(metrics['skipped_steps']) == 0
  return state


@pytest.mark.nightly
@pytest.mark.parametrize('name', benchmarks.DOWNSTREAM)
def test_a_shrunken_benchmark_takes_a_step_and_is_evaluated(name, synthetic, tmp_path):
  run = _run(_small(_config(name), synthetic))
  rows = _rows(run, _step(run).params, tmp_path)
  assert {r['evaluator'] for r in rows} == set(run.config.evaluators)
  assert all(np.isfinite(r['value']) for r in rows)
  counts = {r['count'] for r in rows if 't2' not in r['metric']}
  assert counts == {_EXAMPLES}  # each once, although they do not divide into batches of four


def _shapes(c, task: str | None = None):
  """(run, batch, state, metrics) of a training step at the config's own sizes, by shape inference alone."""
  c.tokenizer.merges_path = 'a file that only its user has'
  run = compiled_programs.prepare(c, jax.devices()[:1])
  batch = compiled_programs.batch_shapes(run, run.plan.tasks if task is None else run.plan.only(task).tasks)
  step = run.step_fn(task).lower(run.abstract_state(), batch, train_run.target_set_arrays(run.data, run.plan))
  return run, batch, *step.out_info


_ENTRIES = {'imagenet1k': 1000, 'kinetics400': 400, 'vqa': 3129, 'cola': 2, 'sst2': 2, 'mrpc': 2, 'qqp': 2, 'mnli': 3,
            'qnli': 2, 'rte': 2}


@pytest.mark.nightly
@pytest.mark.parametrize('name', benchmarks.DOWNSTREAM)
def test_shapes_of_a_step_at_full_size(name):
  run, batch, state, metrics = _shapes(_config(name))
  assert run.spec.model.spec.num_layers == 12 and metrics['loss/total'].shape == ()
  assert state.params['embed']['word'].shape == (_V, 192)
  [fields], [t] = batch.values(), run.plan.tasks
  assert fields['id'].shape == (1, t.batch_size)
  sizes = {_ENTRIES[name]} if name in _ENTRIES else {_V} if t.target_set else set()
  assert {s.size for s in run.data.target_sets.values()} == sizes
  if t.type.visual:
    assert fields['pixels'].shape == (1, t.batch_size, max(1, t.num_frames), 224, 224, 3)


def _every_pretraining():
  """All arguments of configs/pretrain.py, each with one of the sixteen tasks in turn."""
  tasks = list(_config('size=tiny', 'pretrain').tasks)
  every = itertools.product(presets.SIZES, ROUTERS, '12')
  args = [f'size={size},router={router},stage={stage}' for size, router, stage in every]
  for i, arg in enumerate(args):
    for each in (arg, f'{arg},mixture=one_task'):
      yield each, tasks[(i + i // 12) % 16]  # twelve of a size: the next has other tasks


@pytest.mark.nightly
@pytest.mark.parametrize('arg, task', list(_every_pretraining()))
def test_shapes_of_a_step_of_pretraining_at_full_size(arg, task):
  run, batch, state, metrics = _shapes(_config(arg, 'pretrain'), task)
  assert metrics['loss/total'].shape == () and len(run.plan.tasks) == 16
  assert state.params['embed']['word'].shape == (_V, run.plan.config.model.width)
  assert {n: s.size for n, s in run.data.target_sets.items()} == {
      'imagenet21k': 21_842, 'kinetics700': 700, 'moments': 339, 'vocabulary': _V}
  [fields] = batch.values()
  assert fields['id'].shape == (1, run.config.tasks[task].batch_size)


@pytest.mark.nightly
def test_the_sixteen_tasks_give_one_batch_of_their_groups():
  run = compiled_programs.prepare(_small(_config('size=tiny', 'pretrain'), 'nowhere'), jax.devices()[:1])
  assert len(run.plan.tasks) == 16
  assert {g: f['id'].shape[1] for g, f in compiled_programs.batch_shapes(run, run.plan.tasks).items()} == {
      'text_mlm': 4, 'image_classification': 4, 'video_classification/0/0/4/1': 4, 'video_classification/0/0/3/1': 4,
      'image_caption/50/0': 20, 'image_caption/30/0': 4, 'image_retrieval/50/0': 20, 'image_retrieval/30/0': 4}


_OF_EVERY_TYPE = ('imagenet21k', 'kinetics700', 'bookswiki', 'coco_caption', 'coco_retrieval')


@pytest.mark.nightly
@pytest.mark.parametrize('arg, names', [
    ('size=tiny', _OF_EVERY_TYPE), ('size=tiny,stage=2', ('moments', 'coco_retrieval')),
    ('size=tiny,router=token,stage=2', ())])  # all sixteen, whose pipelines take a minute to start
def test_a_shrunken_pretraining_takes_a_step_and_is_evaluated(arg, names, synthetic, tmp_path):
  c = _small(_config(arg, 'pretrain'), synthetic)
  for name in set(c.tasks) - set(names or c.tasks):
    del c.tasks[name]
  for name in [name for name, e in c.evaluators.items() if e.task not in c.tasks]:
    del c.evaluators[name]
  c.tasks.get('imagenet21k', {}).update(randaugment=0.0)  # imagenet1k has it
  run = _run(c)
  assert len(run.plan.tasks) == (len(names) or 16)
  if 'imagenet21k' in c.tasks:
    assert run.data.target_sets['imagenet21k'].buckets[0]['count'].tolist() == [2, 1]
  rows = _rows(run, _step(run).params, tmp_path)
  names = {'coco_captions', 'coco_retrieval'} if 'coco_caption' in c.tasks else {'coco_retrieval'}
  assert {(r['evaluator'], r['count']) for r in rows if 't2' not in r['metric']} == {(n, _EXAMPLES) for n in names}


# Benchmark → batch, tokens, learning rate, decay, second moment's, warmup, steps, stochastic depth, loss weight: the
# published files, by hand. Those of models with experts and without agree.
_PUBLISHED = {
    'imagenet1k': (128, 0, 2e-5, 1e-8, 0.999, 2000, 20_000, 0.1, 1.0),
    'kinetics400': (8, 0, 5e-6, 1e-4, 0.95, 2000, 40_000, 0.1, 1.0),
    'coco_caption': (32, 30, 2e-5, 1e-4, 0.95, 500, 10_000, 0.2, 2.0),
    'coco_retrieval': (256, 30, 5e-6, 1e-4, 0.95, 500, 10_000, 0.2, 1.0),
    'flickr30k_caption': (32, 30, 2e-6, 1e-4, 0.95, 500, 4_000, 0.1, 1.0),
    'flickr30k_retrieval': (256, 30, 5e-6, 1e-4, 0.95, 200, 5_000, 0.1, 1.0),
    'msvd_caption': (2, 30, 2e-5, 1e-4, 0.95, 100, 1_000, 0.1, 1.0),
    'msvd_retrieval': (16, 30, 5e-6, 1e-4, 0.95, 200, 2_000, 0.1, 1.0),
    'vqa': (64, 23, 4e-5, 0.05, 0.999, 1000, 20_000, 0.1, 0.1),
    'cola': (16, 256, 1e-5, 0.1, 0.98, 400, 5_600, 0.1, 1.0),
    'sst2': (32, 256, 1e-5, 0.1, 0.98, 1500, 22_000, 0.1, 1.0),
    'mrpc': (16, 256, 1e-5, 0.1, 0.98, 150, 2_500, 0.1, 1.0),
    'qqp': (32, 256, 1e-5, 0.1, 0.98, 28_000, 115_000, 0.1, 1.0),
    'mnli': (32, 256, 1e-5, 0.1, 0.98, 7500, 125_000, 0.1, 1.0),
    'qnli': (16, 256, 1e-5, 0.1, 0.98, 2000, 34_000, 0.1, 1.0),
    'rte': (16, 256, 2e-5, 0.1, 0.98, 150, 2_500, 0.1, 1.0),
}


@pytest.mark.parametrize('name', list(_PUBLISHED))
def test_a_benchmark_is_tuned_as_published(name):
  c = _config(name)
  t, o = c.tasks[name], c.optim
  assert o.param_groups[-1][0] == '.*'
  groups = optimizer.match_param_groups({'embed': {'word': 0, 'norm': {'scale': 0}}}, [
      group for group in o.param_groups if group[1] != schema.FREEZE])
  decay = 0.05 if name == 'vqa' or name in benchmarks.GLUE else 0.0  # of tables
  assert [groups['embed']['word'].weight_decay, groups['embed']['norm']['scale'].weight_decay] == [decay, 0.0]
  assert (t.batch_size, t.max_len, o.learning_rate, o.param_groups[-1][2], o.b2, o.warmup_steps, c.train.steps,
          c.model.drop_path, t.loss_weight) == _PUBLISHED[name]
  assert benchmarks.TUNING[name].dense_drop_path is None
  others = {'vqa': (1e-8, 0.0, 1e-8), 'imagenet1k': (1e-6, 0.1, 1e-8)}
  others |= dict.fromkeys(benchmarks.GLUE, (1e-8, 0.5, 1e-8))
  expected = others.get(name, (1e-6, 0.1, 1e-6))  # the last is the lowest learning rate
  assert (o.eps, o.grad_clip_norm, o.final_lr_fraction * o.learning_rate) == pytest.approx(expected)


@pytest.mark.parametrize('name', list(benchmarks.GLUE))
def test_records_of_glue_have_its_columns_and_classes(name, synthetic):
  c = _small(_config(name), synthetic)
  plan = make_plan(c)
  [t], data = plan.tasks, assemble.Data(c, plan)
  fields = next(evaluation_batches(data.examples(t, plan.evaluations[0].split), np.arange(4), 4))[0]
  slot = np.take_along_axis(fields['text'], fields['position'], 1)
  assert (slot == data.tokenizer.spe).all() and (fields['weight'] == 1).all()
  assert set(data.records(t.source, 'train').classes['label']) == {name for name, _ in benchmarks.GLUE[name][1]}


def test_benchmarks_are_evaluated_as_published(trained):
  search = lambda e: (e.beam_size, e.max_len, e.detokenize, e.length_penalty)
  names = [f'{data}_caption' for data in ('coco', 'flickr30k', 'msvd', 'msrvtt')]
  for mode, length_penalty in (('finetune', 0.0), ('prompts', 0.0), ('zero_shot', 2.0)):
    configs = [_config(f'task={name},run={trained},mode={mode}') for name in names]
    assert {search(c.evaluators[name]) for c, name in zip(configs, names)} == {(2, 21, False, length_penalty)}
  assert search(_config('size=tiny', 'pretrain').evaluators.coco_captions) == (2, 21, False, 0.0)
  lengths = {name: _config(f'task={name},run={trained},mode=zero_shot').tasks[name].max_len
             for name in ('coco_retrieval', 'msvd_retrieval', 'msrvtt_retrieval')}
  assert lengths == {'coco_retrieval': 30, 'msvd_retrieval': 77, 'msrvtt_retrieval': 77}
  videos = [_config(name).tasks[name] for name in ('kinetics400', 'msvd_caption', 'msvd_retrieval')]
  assert [(t.num_frames, t.frame_stride) for t in videos] == [(8, 32.0), (4, 32.0), (4, 32.0)]
  vqa = _config('vqa').tasks.vqa
  assert vqa.single_answer and vqa.random_flip and vqa.mirrored_words == (('left', 'right'),)


def test_coco_is_read_as_tfds_prepares_it(tmp_path):
  c = _config('coco_retrieval')
  with pytest.raises(FileNotFoundError, match="source 'tfds:coco_captions' is not in .*--tfds=coco_captions"):
    _run(_small(c, tmp_path))

  def example(i):
    return {'image': io.BytesIO(synthetic_records.image(i)), 'image/filename': f'{i}.jpg', 'image/id': i, 'objects': [],
            'captions': {'id': [2 * i, 2 * i + 1], 'text': [f'an image {i}', f'the shape {i}']}}

  # Written where and as TFDS would prepare it.
  builder = file_dataset.tfds_builder('tfds:coco_captions', tmp_path)
  splits = {'train': (0,), 'restval': (1,), 'val': (2,), 'test': (3, 4, 5)}
  tfds.dataset_builders.store_as_tfds_dataset(
      builder.name, builder.version, builder.info.features,
      {split: [(i, example(i)) for i in ids] for split, ids in splits.items()}, config=builder.builder_config.name,
      data_dir=tmp_path / 'tfds', file_format='array_record', disable_shuffling=True)
  run = _run(_small(_config('coco_retrieval'), tmp_path))
  [t] = run.plan.tasks
  assert run.data.examples(t, training=True).size == 3  # all but those of the test
  examples = run.data.examples(t, 'test')
  assert examples.references(np.arange(3)) == [(f'an image {i}', f'the shape {i}') for i in (3, 4, 5)]
  fields = next(evaluation_batches(examples, np.arange(3), 3))[0]
  red = fields['pixels'][:, 0].mean(axis=(1, 2))
  assert fields['pixels'].shape == (3, 1, 16, 16, 3) and (red[:, 0] > 150).all() and (red[:, 1:] < 60).all()
  with pytest.raises(ValueError, match="split 'tests' of source 'tfds:coco_captions'.*did you mean 'test'"):
    run.data.records(t.source, 'tests')


def _captioning():
  """A captioning config with small images and short texts."""
  c = config.base()
  c.tokenizer.update(dict(type='sentencepiece', path=tiny.tokenizer_file()))
  c.model.update(dict(num_layers=2, width=16, num_heads=2, mlp_dim=16, image_size=16, patch_size=8, max_text_len=80,
                      remat=False))
  c.moe.num_experts = 2
  c.target_sets.vocabulary = config.target_set('vocabulary', family='words')
  c.tasks.coco_words = config.task(
      'image_caption', 'tfds:coco_captions', batch_size=4, target_set='vocabulary',
      caption_templates=('{captions/text}',), max_len=20)
  c.train.update(dict(steps=1, log_every=1))
  return c


@pytest.fixture(name='trained', scope='module')
def _trained(tmp_path_factory):
  """The work directory of such a run; it has no steps yet."""
  folder = tmp_path_factory.mktemp('runs') / 'trained'
  workdir.claim_workdir(folder, _captioning(), 'print')
  return str(folder)


@pytest.mark.nightly
@pytest.mark.parametrize('name', ['cola', 'coco_caption', 'vqa'])
@pytest.mark.parametrize('mode', ['finetune', 'prompts', 'zero_shot'])
def test_a_run_is_adapted_to_a_benchmark_or_evaluated_on_it(name, mode, synthetic, tmp_path):
  first = _captioning()
  first.data.dir = str(synthetic)
  assert loop.train(first, str(tmp_path / 'first'), jax.devices()[:1]) == loop.FINISHED
  c = _config(f'task={name},run={tmp_path / "first"},mode={mode}')
  c.train.update(dict(steps=1, log_every=1))
  _small_batches(c)
  if mode != 'zero_shot':
    assert loop.train(c, str(tmp_path / 'then'), jax.devices()[:1]) == loop.FINISHED
  run, predictor, _ = saved_run.load(c, tmp_path / ('first' if mode == 'zero_shot' else 'then'))
  rows = suite.evaluate(run.plan, run.data, predictor, 1, tmp_path)
  assert {r['evaluator'] for r in rows} == set(c.evaluators) and all(np.isfinite(r['value']) for r in rows)
  assert {r['count'] for r in rows if 't2' not in r['metric']} == {_EXAMPLES}


@pytest.mark.parametrize('mode', ['', ',mode=finetune', ',mode=prompts', ',mode=zero_shot'])
@pytest.mark.parametrize('name', ['cola', 'coco_caption', 'vqa'])
def test_a_benchmark_starts_from_a_run(trained, name, mode):
  c = _config(f'task={name},run={trained}{mode}')
  plan, t = make_plan(c), c.tasks[name]
  assert (c.train.init, c.model.width, c.model.max_text_len) == (trained, 16, 80)
  assert t.max_len == min(80, _PUBLISHED[name][1])  # of the model
  assert {e.task.name for e in plan.evaluations} == {name}
  trains = {'': '.*', ',mode=finetune': '.*', ',mode=prompts': schema.FREEZE, ',mode=zero_shot': ''}[mode]
  assert [t.name for t in plan.tasks] == ([name] if trains else [])
  if trains == '.*':
    _, _, rate, decay, _, _, steps, *_ = _PUBLISHED[name]
    assert (c.optim.learning_rate, c.optim.param_groups[-1][2], c.train.steps) == (rate, decay, steps)
  elif trains and name != 'coco_caption':  # for which nothing was published
    expected = config.base()
    adaptation.train_prompts(expected)
    assert (c.optim, c.train.steps) == (expected.optim, expected.train.steps)
    assert c.model.num_deep_prompts == expected.model.num_deep_prompts
  assert t.linear_head == (bool(trains) and trains != '.*' and name != 'coco_caption')
  # A run has its own scales: the captions' is the only one here.
  assert t.temperature == ('image_caption' if name == 'coco_caption' or mode == ',mode=zero_shot' else '')
