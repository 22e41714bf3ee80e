"""Parameters that a step uses: experts of its conditions, tables of its modalities, scales of its tasks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.model.heads import MAX_SCALE
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks import task_types
from uni_moe_jax.train import used_params
from uni_moe_jax.utils.tree_paths import by_path

SUBLAYERS = {'qkv': 'attention', 'attention_out': 'attention', 'ffn_in': 'mlp', 'ffn_out': 'mlp'}
VISUAL = {'embed/patch', 'embed/patch_bias', 'embed/difference', 'embed/temporal', 'embed/spatial', 'embed/visual_type'}
TEXT = {'embed/position', 'embed/type', 'embed/neighbors'}


@functools.cache
def _spec(**changes):
  """Four experts; layers 0 and 1 are scanned, layer 2 is the tail. All tables, and two temperatures."""
  return small_model.spec(
      posemb='learned', modality_embedding=True, frame_differences=True, word_neighbors=1,
      temperature_groups=('group', 'other'), **changes)


def _shapes(spec):
  return {path: leaf.shape for path, leaf in by_path(small_model.params(spec)).items()}


# Conditions per expert in layers 0, 1 and 2. No two are equal.
USED_EXPERTS = {
    'blocks': ({'attention': jnp.array([[3, 3, 0, 0], [0, 1, 5, 0]]), 'mlp': jnp.array([[0, 0, 2, 4], [6, 0, 0, 0]])},),
    'tail': ({'attention': jnp.array([0, 2, 0, 4]), 'mlp': jnp.array([1, 1, 1, 0])},)}


def _used(
    contents=('head', 'target', 'text', 'visual'), temperatures=('group', 'other'), spec=None, params=None,
    used_experts=USED_EXPERTS):
  """{path: bool or bools}, on the host."""
  spec = spec or _spec()
  params = small_model.params(spec) if params is None else params
  used = jax.device_get(used_params.used_mask(spec, params, used_experts, contents, temperatures))
  assert jax.tree.structure(used) == jax.tree.structure(params)
  return by_path(used)


def _unused(**kw):
  """Paths of the parameters without experts that are not used."""
  return {path for path, used in _used(**kw).items() if used.ndim == 0 and not used}


def test_conditions_that_use_an_expert_are_counted_per_layer():
  # Two scanned layers and a tail, two conditions, two of four experts each: those with a coefficient.
  scanned = np.array([[[.6, .4, 0, 0], [0, .9, .1, 0]], [[0, 0, .5, .5], [0, 0, .2, .8]]])
  tail = np.array([[.7, 0, 0, .3], [.7, .3, 0, 0]])
  experts = lambda coef: np.broadcast_to(np.arange(4), coef.shape)
  decision = lambda coef: routers.RouterOutput(jnp.asarray(coef), experts(coef), jnp.asarray(coef))
  counts = used_params.used_experts({
      'blocks': ({'router_stats': {'attention': decision(scanned), 'mlp': decision(scanned[::-1])}},),
      'tail': ({'router_stats': {'attention': decision(tail)}}, {'router_stats': {}})})
  assert jax.tree.map(lambda x: x.tolist(), counts) == {
      'blocks': ({'attention': [[1, 2, 1, 0], [0, 0, 2, 2]], 'mlp': [[0, 0, 2, 2], [1, 2, 1, 0]]},),
      'tail': ({'attention': [2, 1, 0, 1]}, {})}


def test_used_experts_are_collected_by_the_encoder():
  spec = _spec()
  sequences = (small_model.sequence('image_classification'), small_model.target(task_types.families()['names']))
  _, collected = small_model.jit(functools.partial(small_model.encode, spec, sequences))()
  counts = used_params.used_experts(collected)
  assert jax.tree.map(jnp.shape, counts) == jax.tree.map(jnp.shape, USED_EXPERTS)
  for count in jax.tree.leaves(counts):
    assert (count.sum(-1) == 2 * 2).all()  # two conditions, two experts each


@pytest.mark.parametrize('changes, experts', [
    (dict(), set(SUBLAYERS.values())), (dict(sublayers=('mlp',)), {'mlp'}),
    (dict(router='dense', router_names=()), set())])
def test_parameters_with_an_expert_axis_belong_to_their_sublayer(changes, experts):
  spec = _spec(**changes)
  for path, shape in _shapes(spec).items():
    names = path.split('/')
    sublayer = SUBLAYERS.get(names[3]) if len(names) == 5 else None
    if sublayer in experts:
      assert used_params.expert_sublayer(spec, path) == (names[1], 0, sublayer)
      assert shape[used_params.unit_axes(spec, path) - 1] == spec.num_experts
    else:
      assert used_params.expert_sublayer(spec, path) is None
      assert used_params.unit_axes(spec, path) == 0


def test_slices_are_counted_over_periods_and_experts_or_experts_alone():
  spec = _spec()
  units = {path: shape[:used_params.unit_axes(spec, path)] for path, shape in _shapes(spec).items()}
  assert units['encoder/blocks/block0/ffn_in/kernel'] == units['encoder/blocks/block0/qkv/bias'] == (2, 4)
  assert units['encoder/tail/block0/ffn_in/kernel'] == units['encoder/tail/block0/qkv/bias'] == (4,)
  for path in ('encoder/blocks/block0/scale1', 'encoder/blocks/block0/ffn_router/gate', 'embed/word'):
    assert units[path] == ()


@pytest.mark.parametrize('num_layers, placement, axes', [
    (4, 'every_2', {'blocks': [2, 0], 'tail': [1, 0]}),  # layers 0 and 2: a period of two blocks, and a tail of two
    (6, (0, 5), {'tail': [1, 0, 0, 0, 0, 1]})])  # they repeat no period of up to four blocks: all six are the tail
def test_a_block_without_experts_has_no_slices(num_layers, placement, axes):
  spec = _spec(num_layers=num_layers, placement=placement)
  for subtree, expected in axes.items():
    for kernel in ('ffn_in', 'qkv'):
      paths = [f'encoder/{subtree}/block{i}/{kernel}/kernel' for i in range(len(expected))]
      assert [used_params.unit_axes(spec, path) for path in paths] == expected


def test_experts_of_scanned_and_tail_layers_are_those_that_were_chosen():
  used = _used()
  expected = {
      'blocks': {'attention': [[1, 1, 0, 0], [0, 1, 1, 0]], 'mlp': [[0, 0, 1, 1], [1, 0, 0, 0]]},
      'tail': {'attention': [0, 1, 0, 1], 'mlp': [1, 1, 1, 0]}}
  for subtree, sublayers in expected.items():
    for name, sublayer in SUBLAYERS.items():
      for leaf in ('kernel', 'bias'):
        assert used[f'encoder/{subtree}/block0/{name}/{leaf}'].tolist() == sublayers[sublayer], (subtree, name, leaf)


def test_a_step_with_all_contents_uses_all_parameters_but_the_experts_that_nothing_chose():
  assert _unused() == set()
  idle = {path for path, used in _used().items() if not used.all()}
  assert idle == {path for path in _shapes(_spec()) if used_params.expert_sublayer(_spec(), path)}


def test_a_convolutional_stem_is_used_by_what_has_pixels():
  stem = {f'embed/stem{i}{suffix}' for i in (0, 1) for suffix in ('', '_bias')}
  spec = _spec(stem='conv')
  assert _unused(spec=spec, contents=('head', 'target', 'text')) == VISUAL - {'embed/patch', 'embed/patch_bias'} | stem
  assert not _unused(spec=spec)


@pytest.mark.parametrize('modalities, unused', [(('text',), VISUAL), (('visual',), TEXT), (('text', 'visual'), set())])
def test_tables_of_a_modality_that_is_not_encoded_are_unused(modalities, unused):
  assert _unused(contents=modalities) == unused


PREFIX = dict(num_prefix_prompts=2, label_prompts=(('names', 3), ('target', 2)))
DEEP = dict(num_deep_prompts=2, head=3)


@pytest.mark.parametrize('changes, contents, unused', [
    (PREFIX, ('text',), {'embed/prompts/target', 'embed/prompts/label_names', 'embed/prompts/label_target'}),
    (PREFIX, ('text', 'target'), {'embed/prompts/label_names', 'embed/prompts/label_target'}),
    (PREFIX, ('text', 'target', 'label_names'), {'embed/prompts/label_target'}),
    (PREFIX, ('text', 'target', 'label_target'), {'embed/prompts/label_names'}),
    (DEEP, ('text', 'head', 'target'), set()),
    (DEEP, ('text', 'target'), {'linear_head/kernel', 'linear_head/bias', 'linear_head/similarity_weight'}),
    (DEEP, ('text', 'head'), {f'encoder/{block}/prompts/target' for block in ('blocks/block0', 'tail/block0')})])
def test_prompts_are_used_by_their_side_and_set_and_a_head_by_tasks_with_heads(changes, contents, unused):
  spec = small_model.spec(prompt_sharing='separate', temperature_groups=(), **changes)
  assert _unused(contents=contents, spec=spec) - VISUAL == unused


def test_a_step_uses_the_label_prompts_of_the_sets_it_encodes():
  c = tiny.config('shape', 'package')
  c.target_sets.shapes.label_prompts = c.target_sets.packages.label_prompts = True
  plan = make_plan(c)
  assert used_params.contents(plan) == ('label_packages', 'label_shapes', 'target', 'text', 'visual')
  assert used_params.contents(plan.only('package')) == ('label_packages', 'target', 'text')
  c.target_sets.shapes.label_prompts = False
  assert 'label_shapes' not in used_params.contents(make_plan(c))


def test_a_word_as_readout_token_has_a_position_in_every_sequence():
  assert _unused(contents=('visual',), spec=_spec(prefix_word=5)) == {'embed/neighbors'}
  assert _unused(contents=('visual',), spec=_spec()) == TEXT


@pytest.mark.parametrize('temperatures, unused', [
    (('group',), {'log_scale_other'}), (('other',), {'log_scale_group'}), ((), {'log_scale_group', 'log_scale_other'}),
    (('group', 'other'), set())])
def test_scales_of_other_temperature_groups_are_unused(temperatures, unused):
  assert _unused(temperatures=temperatures) == unused


@pytest.mark.parametrize('scale, unused', [(MAX_SCALE - 1, set()), (MAX_SCALE + 1, {'log_scale_group'})])
def test_a_scale_above_its_clamp_is_unused(scale, unused):
  params = {**small_model.params(_spec()), 'log_scale_group': jnp.float32(math.log(scale))}
  assert _unused(params=params) == unused
  gradient = jax.grad(lambda p: UniPerceiver(_spec()).apply({'params': p}, 'group', method='scale'))(params)
  assert (gradient['log_scale_group'] == 0) == bool(unused)  # as the model computes it


def test_a_dense_model_has_no_unused_experts():
  spec = _spec(router='dense', router_names=())
  used = _used(spec=spec, used_experts={'blocks': ({},), 'tail': ({},)})
  assert all(x.shape == () and x for x in used.values())
