"""Exported float32 programs of every task type equal the model with experts, after training in bfloat16.

Videos have three frames, their own normalization and frame differences; texts are padded.
"""

import jax
import ml_collections
import numpy as np
import pytest

from tests.helpers import shipped, tiny
from tests.helpers.shipped import assert_close
from uni_moe_jax import config as config_lib
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.export import artifact, contents
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tasks import task_types
from uni_moe_jax.train import run as train_run

_EXAMPLES = 3
_TRAINED = {'motion', 'package'}


def _config(router: str) -> ml_collections.ConfigDict:
  """Tasks of every type for a model that trains in bfloat16; most have no training."""
  c = tiny.config('shape', 'motion', 'text', 'caption', 'pair', 'package', data_dir=tiny.data_dir())
  c.tasks.pair.max_len = 16
  options = dict(batch_size=4, caption_templates=('{name}',), max_len=12)
  c.tasks.video_caption = config_lib.task('video_caption', 'videos', target_set='words', **options)
  c.tasks.video_pair = config_lib.task('video_retrieval', 'videos', **options)
  c.target_sets.answers = config_lib.target_set('glyphs/class', family='words')
  c.tasks.question = config_lib.task(
      'vqa', 'glyphs', batch_size=4, target_set='answers', label_column='class', template='{face} {name} ? <spe> <eot>',
      max_len=12)
  c.model.update(dict(dtype='bfloat16', video_mean=(0.4,), video_std=(0.3,), frame_differences=True,
                      word_neighbors=2))
  c.model.extra_temperature_groups = tuple({t.type for t in c.tasks.values()})
  for name in {*c.tasks} - _TRAINED:
    c.tasks[name].batch_size = 0  # a training step of every type takes half a minute to compile
  c.moe.router = router
  return c


def _trained(run: train_run.Run):
  """Parameters after two steps from random values, including biases and gates."""
  state, step, sets = run.state_from(shipped.random_params(run.shapes.params)), run.step_fn(), run.target_sets()
  for _, batch in run.mixture().iterate(0, 2):
    state, _ = step(state, run.put_batch(batch), sets)
  return jax.device_get(state.params)


@pytest.fixture(name='compile_fast')
def _compile_fast():
  """Disables most optimizations: compilation takes longer than computation."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.mark.usefixtures('compile_fast')
@pytest.mark.nightly
@pytest.mark.parametrize('router', ['attribute', 'task', 'modality'])
def test_programs_of_every_task_type_equal_the_model_with_experts(tmp_path, router):
  run = train_run.build(_config(router), jax.devices()[:1])
  params = _trained(run)
  assert {t.type.name for t in (*run.plan.tasks, *run.plan.probes)} == set(task_types.TASK_TYPES)
  exported = contents.make_contents(run.spec.model.spec, params, run.plan, run.data, dtype='float32', bake_targets=True)
  assert not exported.spec.router_names  # it has no router
  artifact.write(tmp_path / 'model', exported, {'name': 'mine'}, [])
  model = shipped.module(tmp_path / 'model').Model(tmp_path / 'model')
  spec = contents.portable(run.spec.model.spec, 'float32')
  expected = Predictor(UniPerceiver(spec), params, exported.target_sets, run.data.tokenizer)
  for task in (*run.plan.tasks, *run.plan.probes):
    [(fields, _)] = evaluation_batches(run.data.examples(task, 'train'), np.arange(_EXAMPLES), _EXAMPLES)
    frames = fields['pixels'].shape[1] if task.type.visual else 0
    assert frames == (tiny.NUM_FRAMES if task.source == 'videos' else task.type.visual), task.name
    if task.type.readout == 'queries':
      captions = model.run(task.name, 'caption', pixels=fields['pixels'])
      words = exported.features[task.target_set]
      want = shipped.search(spec, params, task, run.data.tokenizer, fields['pixels'], words)
      np.testing.assert_array_equal(captions['tokens'], want.tokens[:, 0], task.name)
      assert_close(captions['score'], want.scores[:, 0], task.name)
      continue
    inputs = {name: fields[name] for name in model.manifest['tasks'][task.name]['programs']['encode']['inputs']}
    features = expected.inputs(task.type, fields)
    if task.type.target == 'pair':
      image = model.run(task.name, 'encode', **inputs)['features']
      text = model.run(task.name, 'encode_text', text=fields['target'], text_valid=fields['target_valid'])['features']
      targets = expected.pairs(task.type, fields)
      assert not fields['target_valid'].all()
      assert_close(image, normalize(features[:, 0]), task.name)
      assert_close(text, normalize(targets), task.name)
      scale = np.exp(params[f'log_scale_{task.temperature}'])
      scores = model.run(task.name, 'score', features=image, texts=text)['scores']
      assert_close(scores, scale * expected.similarities(features[:, 0], targets), task.name)
    else:
      want = expected.log_probabilities(features, task)
      log_p = model.run(task.name, 'classify', **inputs)['log_p']
      assert_close(log_p, want if task.type.readout == 'masked' else want[:, 0], task.name)
