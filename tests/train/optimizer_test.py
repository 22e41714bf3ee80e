"""The optimizer: which group a parameter gets, one update worked out by hand, the learning rate over a run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import small_model
from uni_moe_jax import config as config_lib
from uni_moe_jax.config import presets, schema
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.model.uni_perceiver import UniPerceiver, param_shapes
from uni_moe_jax.train import optimizer
from uni_moe_jax.train.optimizer import ParamGroup
from uni_moe_jax.utils.tree_paths import by_path


def _config(groups=(('.*', 1., 0.),), **changes):
  c = config_lib.base()
  c.optim.update(dict(learning_rate=.1, warmup_steps=0, schedule='constant', grad_clip_norm=0., b1=.9, b2=.95, eps=1.))
  c.optim.update(changes)
  c.optim.param_groups = groups
  return c


PARAMS = {'block': {'kernel': jnp.array([2., -2.]), 'bias': jnp.array([1.])}, 'word': jnp.array([[5., 5., 5.]])}


def test_the_first_matching_pattern_applies():
  groups = (('bias$', 1., 0.), ('block/', .5, .1), ('block/kernel', 9., 9.), ('.*', 2., .2))
  assert optimizer.match_param_groups(PARAMS, groups) == {
      'block': {'kernel': ParamGroup(.5, .1), 'bias': ParamGroup(1., 0.)}, 'word': ParamGroup(2., .2)}


def test_a_parameter_without_a_group_is_named_with_the_fix():
  with pytest.raises(ValueError, match=r"no pattern matches parameter 'word'; end with \('\.\*', 1\.0, 0\.0\) or "
                                       r"\('\.\*', 'freeze'\)"):
    optimizer.match_param_groups(PARAMS, (('block/', 1., 0.),))


@pytest.mark.parametrize('groups', [(('blok/', 'freeze'), ('.*', 1., 0.)), (('.*', 1., 0.), ('block/', 'freeze'))])
def test_a_pattern_that_freezes_nothing_is_an_error(groups):
  with pytest.raises(ValueError, match="'blo.*/' freezes nothing"):
    optimizer.match_param_groups(PARAMS, groups)


def test_a_pattern_that_only_scales_may_match_nothing():
  # The default groups serve dense models, too, which have no routers.
  assert optimizer.match_param_groups(PARAMS, (('_router/', 1., 0.), ('.*', 2., 0.)))['word'] == ParamGroup(2., 0.)


@pytest.mark.parametrize('router', ['attribute', 'task', 'dense'])
def test_the_default_groups_decay_kernels_and_nothing_else(router):
  spec = ModelSpec(
      num_layers=3, width=8, num_heads=2, mlp_dim=8, vocab_size=9, spe_id=2, image_size=4, patch_size=2, router=router,
      num_experts=2, posemb='learned', router_names=('names',) if router == 'task' else (), temperature_groups=('a',),
      num_deep_prompts=2, prompt_sharing='separate', num_prefix_prompts=2, label_prompts=(('names', 3),), spe_bias=True,
      head=3)
  shapes = param_shapes(UniPerceiver(spec))
  groups = optimizer.match_param_groups(shapes, config_lib.base().optim.param_groups)
  decays = {path: group.weight_decay for path, group in by_path(groups).items()}
  decayed = {path.split('/')[-2] + '/' + path.split('/')[-1] for path, decay in decays.items() if decay}
  assert decayed == {
      'qkv/kernel', 'attention_out/kernel', 'ffn_in/kernel', 'ffn_out/kernel', 'similarity/kernel', 'embed/patch',
      'linear_head/kernel'}
  assert {decays[p] for p in decays if p.endswith('ffn_in/kernel')} == {.05}


def _update(config, *gradients, params=None):
  """(parameters after an update per gradient, optimizer state)."""
  params = PARAMS if params is None else params
  made = optimizer.make_optimizer(config, params)
  tx, frozen = made.tx, optimizer.frozen_paths(made.groups)
  state = tx.init(params)
  for g in gradients:
    norm = optax.tree.norm([x for path, x in by_path(g).items() if path not in frozen])
    updates, state = tx.update(g, state, params, grad_norm=norm)
    params = jax.tree.map(jnp.add, params, updates)
  return jax.device_get(params), state


def _gradient(kernel, bias=0., word=0.):
  return {'block': {'kernel': jnp.asarray(kernel, jnp.float32), 'bias': jnp.full((1,), bias)},
          'word': jnp.full((1, 3), word)}


def test_one_update_by_hand():
  # The first step's corrected moments are g and g²: the update is g / (|g| + eps) = 3/4 and -1/2. Decoupled decay adds
  # 0.2 · p; both are multiplied by lr · factor = 0.1 · 0.5.
  groups = (('kernel', .5, .2), ('.*', 1., 0.))
  params, _ = _update(_config(groups), _gradient([3., -1.], bias=1.))
  np.testing.assert_allclose(
      params['block']['kernel'], [2 - .05 * (.75 + .2 * 2), -2 - .05 * (-.5 + .2 * -2)], rtol=1e-6)
  np.testing.assert_allclose(params['block']['bias'], 1 - .1 * .5, rtol=1e-6)
  np.testing.assert_array_equal(params['word'], PARAMS['word'])  # no gradient, no decay


def test_the_second_update_by_hand():
  # Gradients 3, then 1: m = 0.9 · 0.3 + 0.1, v = 0.95 · 0.45 + 0.05, corrected by 1 - 0.9² and 1 - 0.95².
  m, v = .37 / (1 - .81), .4775 / (1 - .9025)
  params, _ = _update(_config(), _gradient([3., 3.]), _gradient([1., 1.]))
  np.testing.assert_allclose(params['block']['kernel'][0], 2 - .1 * .75 - .1 * m / (math.sqrt(v) + 1), rtol=1e-6)


def test_decay_does_not_depend_on_the_gradient():
  groups = (('.*', 1., .5),)
  params, _ = _update(_config(groups), _gradient([0., 0.]))
  np.testing.assert_allclose(params['word'], 5 * (1 - .1 * .5), rtol=1e-6)


def test_gradients_are_clipped_to_their_global_norm():
  # Norm 5 over kernel (3, 0) and bias 4: clipped to 1 they are 0.6 and 0.8.
  params, _ = _update(_config(grad_clip_norm=1.), _gradient([3., 0.], bias=4.))
  np.testing.assert_allclose(params['block']['kernel'][0], 2 - .1 * .6 / 1.6, rtol=1e-6)
  np.testing.assert_allclose(params['block']['bias'], 1 - .1 * .8 / 1.8, rtol=1e-6)


def test_clipping_leaves_short_and_zero_gradients_unchanged():
  for gradient in ([.3, .4], [0., 0.]):
    clipped, plain = (_update(_config(grad_clip_norm=norm), _gradient(gradient))[0] for norm in (1., 0.))
    np.testing.assert_array_equal(clipped['block']['kernel'], plain['block']['kernel'])
    assert np.isfinite(clipped['block']['kernel']).all()


FROZEN = (('word', 'freeze'), ('.*', 1., .5))


def test_frozen_parameters_have_no_moments():
  shapes = [x.shape for x in jax.tree.leaves(_update(_config(FROZEN))[1]) if x.ndim]
  assert sorted(shapes) == [(1,), (1,), (2,), (2,)]  # two moments of bias and kernel each


def test_frozen_gradients_do_not_count_in_the_clipped_norm():
  gradient = _gradient([.6, .8], 0., 100.)  # of norm 1 without the frozen one
  params, _ = _update(_config(FROZEN, grad_clip_norm=1.), gradient)
  np.testing.assert_allclose(params['block']['kernel'][0], 2 - .1 * (.6 / 1.6 + .5 * 2), rtol=1e-6)


def test_frozen_paths():
  assert optimizer.frozen_paths(optimizer.match_param_groups(PARAMS, FROZEN)) == {'word'}
  assert optimizer.frozen_paths(optimizer.match_param_groups(PARAMS, (('block/', 'freeze'), ('.*', 1., 0.)))) == {
      'block/kernel', 'block/bias'}
  assert optimizer.frozen_paths(optimizer.match_param_groups(PARAMS, (('.*', 1., 0.),))) == set()


@pytest.mark.parametrize('groups', [
    config_lib.base().optim.param_groups, schema.published_param_groups(.05), (('.*', 1., .1),),
    (('embed/spa', 'freeze'), ('.*', 1., 0.))])
def test_a_frozen_position_table_does_not_train_whatever_the_groups_are(groups):
  params = {'embed': {'spatial': jnp.ones((4, 2)), 'word': jnp.ones((3, 2))}}
  c = _config(groups)
  for posemb, is_frozen in (('frozen', True), ('learned', any(group[1] == 'freeze' for group in groups))):
    c.model.posemb = posemb
    expected = {'embed/spatial'} if is_frozen else set()
    assert optimizer.frozen_paths(optimizer.make_optimizer(c, params).groups) == expected
    assert optimizer.frozen_paths(optimizer.param_groups(c, params)) == expected


@pytest.mark.parametrize('sharing', ['shared', 'separate', 'inputs'])
def test_prompt_tuning_trains_prompts_norms_the_bias_of_spe_and_the_head(sharing):
  c = config_lib.base()
  presets.prompt_tune(c, num_prompts=3, sharing=sharing)
  assert (c.model.num_deep_prompts, c.model.prompt_sharing, c.model.spe_bias) == (3, sharing, True)
  spec = small_model.spec(num_deep_prompts=3, prompt_sharing=sharing, spe_bias=True, num_prefix_prompts=1,
                          label_prompts=(('names', 2),), head=2)
  groups = optimizer.match_param_groups(small_model.params(spec), c.optim.param_groups)
  trained = {path: group for path, group in by_path(groups).items() if not group.frozen}
  tables = {'input', 'target'} if sharing == 'separate' else {'input'}
  layers = ('encoder/blocks/block0', 'encoder/tail/block0')
  norms = ('embed/norm', 'similarity/norm', *(f'{at}/norm{i}' for at in layers for i in (1, 2)))
  assert set(trained) == {
      'embed/spe_bias', 'embed/prompts/label_names', 'linear_head/kernel', 'linear_head/bias',
      'linear_head/similarity_weight',
      *(f'{at}/prompts/{table}' for at in ('embed', *layers) for table in tables),
      *(f'{norm}/{leaf}' for norm in norms for leaf in ('scale', 'bias'))}
  assert set(trained.values()) == {ParamGroup(1., 0.)}


def test_the_router_multiplier_scales_only_routers():
  params = {'ffn_router': {'gate': jnp.array([2.])}, 'router_of_old': jnp.array([2.]), 'kernel': jnp.array([2.])}
  c = _config((('kernel', 1., 0.), ('.*', .5, .2)), router_lr_multiplier=.1)
  groups = optimizer.make_optimizer(c, params).groups
  assert groups == {
      'ffn_router': {'gate': ParamGroup(.05, .2)}, 'router_of_old': ParamGroup(.5, .2), 'kernel': ParamGroup(1., 0.)}
  # First directions 3 / (3 + 1); the decay .2 · 2 has the same factor as in every group.
  params, _ = _update(c, jax.tree.map(lambda p: jnp.full_like(p, 3.), params), params=params)
  np.testing.assert_allclose(params['ffn_router']['gate'], [2 - .1 * .05 * (.75 + .4)], rtol=1e-6)
  np.testing.assert_allclose(params['router_of_old'], [2 - .1 * .5 * (.75 + .4)], rtol=1e-6)


def test_the_router_multiplier_leaves_frozen_routers_frozen():
  groups = optimizer.make_optimizer(_config((('gate', 'freeze'), ('.*', 1., 0.)), router_lr_multiplier=.1), {
      'ffn_router': {'gate': jnp.ones(1)}, 'kernel': jnp.ones(1)}).groups
  assert groups['ffn_router']['gate'].frozen


# Peak 0.1, four warm-up updates, then half a cosine over 8 to a fifth of the peak; after the end it stays there.
# Published, of the same peak and end: t / 4; then the cosine, (1 + cos(π (t - 4) / 8)) / 2, where it is more than 1/5.
# At 10 and 14 it is (1 - √½) / 2 = .146, whatever the end is, at 12 zero; at 16 it has risen to 1/2, at 20 to 1.
@pytest.mark.parametrize('changes, rates', [
    ({}, {0: .025, 1: .05, 3: .1, 4: .1, 6: .02 + .08 * (1 + math.sqrt(.5)) / 2, 8: .06, 12: .02, 13: .02, 1000: .02}),
    (dict(schedule='published'), {0: 0., 1: .025, 3: .075, 4: .1, 6: .05 * (1 + math.sqrt(.5)), 8: .05, 10: .02,
                                  12: .02, 14: .02, 16: .05, 20: .1}),
    (dict(schedule='published', final_lr_fraction=0.), {10: .05 * (1 - math.sqrt(.5))}),
    (dict(schedule='published', final_lr_fraction=.1), {10: .05 * (1 - math.sqrt(.5))}),
    (dict(schedule='constant'), {0: .025, 3: .1, 4: .1, 12: .1, 100: .1}),
    # A schedule may end before or after the run, which ends at 12.
    (dict(decay_steps=8), {4: .1, 6: .06, 8: .02, 12: .02}),
    (dict(decay_steps=20), {4: .1, 12: .06, 20: .02}), (dict(schedule='published', decay_steps=20), {12: .05, 20: .02}),
    # Warm-up may be nothing, or longer than the run.
    (dict(warmup_steps=0), {0: .1}), (dict(warmup_steps=12), {11: .1}), (dict(warmup_steps=20), {9: .05}),
    (dict(schedule='published', warmup_steps=0), {0: .1}),
    (dict(schedule='published', warmup_steps=12), {11: .1 * 11 / 12}),
    (dict(schedule='published', warmup_steps=20), {9: .045})])
def test_the_learning_rate_over_a_run(changes, rates):
  c = _config(**{**dict(schedule='cosine', final_lr_fraction=.2, warmup_steps=4), **changes})
  c.train.steps = 12
  rate = optimizer.make_optimizer(c, PARAMS).learning_rate
  assert {t: float(rate(t)) for t in rates} == pytest.approx(rates, rel=1e-5, abs=1e-9)


def test_the_first_published_update_only_fills_the_moments():
  # Rate 0, then a quarter of the peak. Constant gradients keep |update| = 3/4.
  once, (masked, _) = _update(_config(schedule='published', warmup_steps=4), _gradient([3., 3.]))
  np.testing.assert_array_equal(once['block']['kernel'], PARAMS['block']['kernel'])
  np.testing.assert_allclose(masked.inner_state[0].mu['block']['kernel'], .1 * 3, rtol=1e-6)
  twice, _ = _update(_config(schedule='published', warmup_steps=4), _gradient([3., 3.]), _gradient([3., 3.]))
  np.testing.assert_allclose(twice['block']['kernel'][0], 2 - .025 * .75, rtol=1e-6)


def test_layers_above_count_from_the_output():
  # Five layers in periods of two (a block with experts, one without): one period is scanned, three blocks are the tail.
  stack = ModelSpec(num_layers=5, width=8, num_heads=2, mlp_dim=8, vocab_size=9, spe_id=2, image_size=4, patch_size=2,
                    placement='every_2').stack
  above = lambda path: optimizer.layers_above(stack, path).tolist()
  assert (stack.periods, len(stack.tail)) == (1, 3)
  assert above('embed/word') == 5
  assert above('encoder/blocks/block0/norm1/scale') == [4]
  assert above('encoder/blocks/block1/norm1/scale') == [3]
  assert [above(f'encoder/tail/block{i}/qkv/kernel') for i in range(3)] == [2, 1, 0]
  assert above('similarity/kernel') == above('log_scale_a') == 0


def test_lower_layers_learn_more_slowly_by_the_decay():
  # Adam's first direction is 3 / (3 + 1) = .75; the rate .1 is multiplied by .5^2 and .5^1 in a stack, and by .5^3
  # below it.
  params = {'stacked': jnp.zeros((2, 1)), 'low': jnp.zeros((1,)), 'top': jnp.zeros((1,))}
  depth = {'stacked': np.array([2, 1]), 'low': np.array(3), 'top': np.array(0)}
  c = _config(layerwise_lr_decay=.5)
  tx = optimizer.make_optimizer(c, params, depth=depth.get).tx
  updates, _ = tx.update(jax.tree.map(lambda p: jnp.full_like(p, 3.), params), tx.init(params), params)
  np.testing.assert_allclose(updates['stacked'], -.1 * .75 * np.array([[.25], [.5]]), rtol=1e-6)
  np.testing.assert_allclose(updates['low'], [-.1 * .75 * .125], rtol=1e-6)
  np.testing.assert_allclose(updates['top'], [-.1 * .75], rtol=1e-6)
