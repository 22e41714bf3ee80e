"""Prompt tuning of the benchmarks with 1 % of their data, as the published files have it."""

import runpy

import jax
import pytest

from tests.helpers.processes import ROOT
from uni_moe_jax import config
from uni_moe_jax.config import schema
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.preflight import compiled_programs
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.tree_paths import by_path


def _config(arg: str):
  return runpy.run_path(str(ROOT / 'configs/benchmark.py'))['get_config'](arg)


@pytest.fixture(name='runs', scope='module')
def _runs(tmp_path_factory):
  """Work directories of a run with experts and of one without, which have no steps."""
  folders = tmp_path_factory.mktemp('runs')
  for router in ('attribute', 'dense'):
    c = config.base()
    c.tokenizer.update(dict(type='clip', merges_path='a file that users have'))
    c.model.update(dict(num_layers=2, width=16, num_heads=2, mlp_dim=16, image_size=16, patch_size=8, remat=False))
    c.moe.update(dict(router=router, num_experts=2))
    c.tasks.match = config.task('image_retrieval', 'own:photos', batch_size=4, caption_templates=('{captions}',),
                                max_len=20)
    workdir.claim_workdir(folders / router, c, 'print')
  return [str(folders / router) for router in ('attribute', 'dense')]


# Benchmark → batch, learning rate, warmup, steps, prompts of the two sides, head, label prompts, stochastic depth of a
# model with experts and without, loss weight: the published files of prompt tuning, by hand.
_PUBLISHED_PROMPTS = {
    'imagenet1k': (64, 1e-4, 500, 2500, 'shared', True, True, 0.0, 0.0, 1.0),
    'kinetics400': (4, 5e-4, 200, 2000, 'shared', True, False, 0.1, 0.1, 1.0),
    'coco_caption': (32, 1e-3, 100, 1000, 'shared', False, False, 0.2, 0.0, 2.0),
    'coco_retrieval': (256, 1e-3, 50, 500, 'separate', False, False, 0.2, 0.2, 0.5),
    'flickr30k_caption': (32, 1e-3, 50, 500, 'shared', False, False, 0.1, 0.1, 1.0),
    'flickr30k_retrieval': (256, 1e-3, 50, 1000, 'separate', False, False, 0.1, 0.1, 1.0),
    'msvd_caption': (2, 1e-3, 25, 200, 'shared', False, False, 0.1, 0.1, 1.0),
    'msvd_retrieval': (16, 1e-3, 10, 100, 'separate', False, False, 0.1, 0.1, 1.0),
}


@pytest.mark.parametrize('name', list(_PUBLISHED_PROMPTS))
def test_prompts_of_a_benchmark_are_tuned_as_published(runs, name):
  *expected, moe_drop_path, dense_drop_path, loss_weight = _PUBLISHED_PROMPTS[name]
  for run, drop_path in zip(runs, (moe_drop_path, dense_drop_path)):
    c = _config(f'task={name},run={run},mode=prompts')
    plan, t, o = make_plan(c), c.tasks[name], c.optim
    assert [task.name for task in plan.tasks] == [name]
    label_prompts = bool(t.target_set) and c.target_sets[t.target_set].label_prompts
    assert [t.batch_size, o.learning_rate, o.warmup_steps, c.train.steps, c.model.prompt_sharing, t.linear_head,
            label_prompts] == expected
    assert (c.model.drop_path, t.loss_weight) == (drop_path, loss_weight)
    # Of every benchmark: 1 % of the data, ten prompts per layer, and these fields of the optimizer.
    assert (t.train_fraction, t.shots, t.label_smoothing, c.model.num_deep_prompts) == (0.01, 0, 0.1, 10)
    assert (o.schedule, o.b1, o.b2, o.eps, o.grad_clip_norm) == ('published', 0.9, 0.95, 1e-6, 0.1)
    assert o.final_lr_fraction * o.learning_rate == pytest.approx(1e-6)
    (_, *trains), frozen = o.param_groups
    assert trains == [1.0, 0.0] and frozen == ('.*', schema.FREEZE)
    assert c.train.checkpoint_every % c.train.log_every == c.train.steps % c.train.checkpoint_every == 0


@pytest.mark.parametrize('arg, fraction', [('', 1.0), ('mode=prompts', 0.01), ('mode=prompts,data=all', 1.0),
                                           ('mode=finetune,data=few', 0.01), ('mode=zero_shot', 1.0)])
@pytest.mark.parametrize('name', ['imagenet1k', 'cola', 'msvd_caption'])
def test_prompts_read_one_percent_of_the_data_and_others_all(runs, name, arg, fraction):
  assert _config(f'task={name},run={runs[0]},{arg}'.strip(',')).tasks[name].train_fraction == fraction


@pytest.mark.parametrize('mode', ['prompts', 'zero_shot'])
def test_what_adapts_a_run_needs_one(mode):
  with pytest.raises(ValueError, match=f'mode={mode} adapts a run; give run=RUN'):
    _config(f'task=cola,mode={mode}')


def test_the_prompts_of_imagenet_are_the_only_parameters_that_train(runs):
  """Ten prompts per layer, a token per class of one name each, a linear head: with norms and the bias of `spe`."""
  c = _config(f'task=imagenet1k,run={runs[0]},mode=prompts')
  c.train.init = ''  # of shapes alone
  assert not c.target_sets.imagenet1k.synonyms  # a token is of one name
  run = compiled_programs.prepare(c, jax.devices()[:1])
  batch = compiled_programs.batch_shapes(run, run.plan.tasks)
  state, metrics = run.step_fn().lower(
      run.abstract_state(), batch, train_run.target_set_arrays(run.data, run.plan)).out_info
  assert metrics['loss/total'].shape == ()
  shapes = {path: x.shape for path, x in by_path(state.params).items()}
  trains = {path: shape for path, shape in shapes.items() if path not in run.spec.frozen}
  assert trains.pop('linear_head/kernel') == (16, 1000) and trains.pop('linear_head/bias') == (1000,)
  assert trains.pop('linear_head/similarity_weight') == () and trains.pop('embed/spe_bias') == (16,)
  assert {path: shape for path, shape in trains.items() if '/prompts/' in path} == {
      'embed/prompts/label_imagenet1k': (1000, 16), 'encoder/blocks/block0/prompts/input': (1, 10, 16),
      'encoder/tail/block0/prompts/input': (10, 16)}  # both sides have the same
  assert all('/norm' in path for path in trains if '/prompts/' not in path) and len(trains) < len(shapes) / 2
