"""Evaluation on eight devices is evaluation on one: features, captions, and every row of the table."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.eval import suite
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.train import run as train_run

_MESHES = {'one': {}, 'eight': dict(data=2, expert=2, model=2)}
_EVALUATED = 6  # examples in batches of five: neither divides over four batch shards


@functools.cache
def _on(router: str, mesh: str) -> tuple[train_run.Run, Predictor]:
  c = tiny.config('shape', 'caption', 'pair', data_dir=tiny.data_dir())
  c.tokenizer.path = tiny.tokenizer_file()
  for task in c.tasks.values():
    task.batch_size = 8
  for evaluator, task in (('classification', 'shape'), ('retrieval', 'pair'), ('caption', 'caption')):
    c.evaluators[task] = config_lib.evaluator(evaluator, task, split='train', batch_size=5, num_examples=_EVALUATED)
  c.evaluators.caption.beam_size = 2
  capacity_factor = 0.5 if router == 'token' else 0.0
  c.moe.update(dict(router=router, num_experts=8, top_k=2, gmm='batched', capacity_factor=capacity_factor))
  c.mesh.update({**dict(replica=1, data=1, expert=1, model=1), **_MESHES[mesh]})
  run = train_run.build(c, jax.devices()[:8 if mesh == 'eight' else 1])
  params = jax.device_put(small_model.params(run.spec.model.spec), run.shardings.params)
  plan = run.plan
  sets = {s.name: (s, run.data.target_sets[s.name]) for s in (*plan.sets, *plan.probe_sets)}
  return run, Predictor(run.spec.model, params, sets, run.data.tokenizer)


def _evaluated(router: str, mesh: str) -> dict[str, np.ndarray]:
  run, predictor = _on(router, mesh)
  tasks = {t.name: t for t in run.plan.tasks}
  batch = lambda name: next(evaluation_batches(run.data.examples(tasks[name], 'train'), np.arange(5), 5))[0]
  shape, pair = batch('shape'), batch('pair')
  features = predictor.inputs(tasks['shape'].type, shape)
  return {'inputs': features, 'pairs': predictor.pairs(tasks['pair'].type, pair),
          'set': np.asarray(predictor.target_set(tasks['shape'].target_set)),
          'log_p': predictor.log_probabilities(features, tasks['shape'])}


@pytest.mark.parametrize('router', ['attribute', pytest.param('token', marks=pytest.mark.nightly)])
def test_features_and_probabilities_are_those_of_one_device(router):
  one, eight = _evaluated(router, 'one'), _evaluated(router, 'eight')
  for name, value in one.items():
    assert eight[name].shape == value.shape
    np.testing.assert_allclose(eight[name], value, rtol=0, atol=2e-5, err_msg=name)
    assert np.abs(value[1] - value[0]).max() > 1e-3, name  # the control: examples do differ


@pytest.mark.nightly
@pytest.mark.parametrize('router, beams', [('attribute', 2), ('token', 1)])
def test_captions_are_those_of_one_device(router, beams):
  output = []
  for mesh in _MESHES:
    run, predictor = _on(router, mesh)
    [task] = [t for t in run.plan.tasks if t.name == 'caption']
    fields = next(evaluation_batches(run.data.examples(task, 'train'), np.arange(5), 5))[0]
    output.append(predictor.captions(task, fields['pixels'], beam_size=beams))
  assert output[0] == output[1]
  assert len(output[0]) == 5 and any(output[0])


@pytest.mark.nightly
def test_every_row_of_the_table_is_that_of_one_device_and_counts_each_example_once(tmp_path):
  tables = []
  for mesh in _MESHES:
    run, predictor = _on('attribute', mesh)
    tables.append(suite.evaluate(run.plan, run.data, predictor, 1, tmp_path, writes=mesh == 'one'))
  assert tables[0] == tables[1]
  assert {r['count'] for r in tables[0] if r['evaluator'] == 'shape'} == {_EVALUATED}


def test_one_device_in_the_mesh_computes_its_part_of_the_batch_alone():
  """What each of four batch shards multiplies: two of five examples, with three filled in."""
  from uni_moe_jax.eval import predictor as lib
  from uni_moe_jax.model.sequences import InputSequence
  run, predictor = _on('attribute', 'eight')
  [task] = [t for t in run.plan.tasks if t.name == 'shape']
  fields = next(evaluation_batches(run.data.examples(task, 'train'), np.arange(5), 5))[0]
  sequence = InputSequence.of_inputs(task.type, {k: v for k, v in fields.items() if k in lib.INPUTS})
  hidden = run.spec.model.spec.mlp_dim // 2  # over `model`
  text = lib.encode.lower(run.spec.model, predictor._params, sequence).compile().as_text()
  tokens = (tiny.IMAGE_SIZE // 8) ** 2 + 1
  assert f'f32[2,{tokens},{hidden}]' in text or f'f32[{2 * tokens},{hidden}]' in text
  assert f'f32[5,{tokens},' not in text.replace(' ', '').partition('ENTRY')[0]
