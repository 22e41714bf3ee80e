"""Muon: which matrices it updates, and that a step changes each of them in all of its directions by the same amount."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import small_model
from uni_moe_jax import config as config_lib
from uni_moe_jax.train import muon, optimizer
from uni_moe_jax.utils.tree_paths import by_path, path_of

SPEC = small_model.spec('attribute')  # D 16, two heads of 8, F 24, four experts
QKV, OUT, MLP = (f'encoder/tail/block0/{name}/kernel' for name in ('qkv', 'attention_out', 'ffn_in'))


def _config(**changes):
  c = config_lib.base()
  c.optim.update(dict(learning_rate=1., warmup_steps=0, schedule='constant', grad_clip_norm=0.))
  c.optim.update(changes)
  c.optim.param_groups = changes.get('param_groups', (('.*', 1., 0.),))
  return c


def _names(spec=SPEC):
  boxed = jax.tree_util.tree_leaves_with_path(small_model.boxed(spec), is_leaf=lambda x: hasattr(x, 'names'))
  return {path_of(path): getattr(x, 'names', ()) for path, x in boxed}


@functools.cache
def _update(on_one_cpu, **changes):
  """(gradients, state or None) → (updates, state) of the small model, compiled."""
  params = small_model.params(SPEC)
  tx = optimizer.make_optimizer(_config(**changes), params, axis_names=_names(), on_one_cpu=on_one_cpu).tx
  return small_model.jit(lambda gradients, state: tx.update(
      gradients, tx.init(gradients) if state is None else state, params))


def _updates(gradients, state=None, on_one_cpu=True, **changes):
  """({path: update}, state) of the small model."""
  updates, state = _update(on_one_cpu, **changes)(gradients, state)
  return by_path(updates), state


@functools.cache
def _first_update(name):
  """({path: update}, state) of one gradient by an optimizer."""
  return _updates(_gradients(), name=name)


def _gradients():
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), small_model.params(SPEC))


def _matrices(kernel, name):
  """Every matrix of a kernel of the last block, [n, D, columns]."""
  if name == QKV:  # [E, D, 3, N, H]
    return np.moveaxis(kernel, 2, 1).reshape(-1, 16, 16)
  return kernel.reshape(-1, 16, 16 if name == OUT else 24)  # [E, N, H, D], [E, D, F]


@pytest.mark.parametrize('names, axes', [
    (('layers', 'experts', 'embed', 'qkv', 'heads', 'head_dim'), ((2,), (4, 5))),
    (('experts', 'heads', 'head_dim', 'embed'), ((3,), (1, 2))), (('embed', 'mlp'), ((0,), (1,))),
    (('layers', 'mlp', 'embed'), ((2,), (1,))), (('embed', 'feature'), ((0,), (1,))),
    (('patch', 'embed'), ((0,), (1,))), (('patch', 'feature'), ((0,), (1,))), (('vocab', 'embed'), None),
    (('position', 'embed'), None), (('experts', 'mlp'), None), (('layers', 'embed', 'gate_experts'), None),
    ((), None)])
def test_matrices_map_between_the_residual_stream_and_heads_or_mlp_or_between_features(names, axes):
  assert muon.matrix_axes(names) == axes


_OUTSIDE_OF_BLOCKS = {'embed/patch', 'similarity/kernel'}


def test_only_kernels_are_matrices():
  chosen = {path for path, names in _names().items() if muon.matrix_axes(names)}
  assert chosen == _OUTSIDE_OF_BLOCKS | {f'encoder/{at}/block0/{name}/kernel' for at in ('blocks', 'tail')
                                         for name in ('qkv', 'attention_out', 'ffn_in', 'ffn_out')}


def test_kernels_of_the_stem_of_neighbors_and_of_frame_differences_are_matrices():
  spec = small_model.spec('dense', stem='conv', patch_size=4, word_neighbors=1, frame_differences=True)
  chosen = {path for path, names in _names(spec).items() if path.startswith('embed/') and muon.matrix_axes(names)}
  assert chosen == {f'embed/{name}' for name in ('stem0', 'stem1', 'neighbors', 'difference')}


# Five iterations take every singular value to .68 … 1.27; 0.2 √(larger side) is the scale.
@pytest.mark.parametrize('name, side', [(QKV, 16), (OUT, 16), (MLP, 24)])
def test_all_singular_values_of_an_update_are_about_equal(name, side):
  singular = {optim: np.linalg.svd(_matrices(-np.asarray(_first_update(optim)[0][name]), name), compute_uv=False)
              for optim in ('muon', 'adamw')}
  size = singular['muon'] / (0.2 * np.sqrt(side))
  assert .6 < size.min() and size.max() < 1.3
  assert singular['adamw'].min() < singular['adamw'].max() / 5


@pytest.mark.parametrize('on_one_cpu', [True, False])
@pytest.mark.parametrize('name', [QKV, OUT, MLP])
def test_each_singular_value_goes_through_five_iterations(name, on_one_cpu):
  gradients, at = _gradients(), name.split('/')
  kernel = functools.reduce(operator.getitem, at[:-1], gradients)
  left, _, right = np.linalg.svd(_matrices(np.asarray(kernel['kernel']), name), full_matrices=False)
  sigma = np.logspace(0, -6, 16)
  matrices = (left * sigma @ right).astype(np.float32)
  if name == QKV:
    kernel['kernel'] = jnp.asarray(np.moveaxis(matrices.reshape(4, 3, 16, 2, 8), 1, 2))
  else:
    kernel['kernel'] = jnp.asarray(matrices.reshape(kernel['kernel'].shape))
  updates, _ = _updates(gradients, name='muon', on_one_cpu=on_one_cpu)
  x = sigma / np.linalg.norm(sigma)
  for _ in range(5):
    x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
  scale = .2 * np.sqrt(max(matrices.shape[1:]))
  assert x.min() < .001 and x.max() > 1  # the smallest ones remain small
  np.testing.assert_allclose(_matrices(-np.asarray(updates[name]), name), scale * (left * x @ right), atol=5e-4 * scale)


def test_every_expert_and_each_of_queries_keys_and_values_is_updated_on_its_own():
  two = _gradients()
  kernel = two['encoder']['tail']['block0']['qkv']['kernel']  # of queries of expert 1 alone
  two['encoder']['tail']['block0']['qkv']['kernel'] = kernel.at[1, :, 0].multiply(jnp.linspace(1, 9, 16)[:, None, None])
  differs = np.array(_first_update('muon')[0][QKV] - _updates(two, name='muon')[0][QKV])
  assert np.abs(differs[1, :, 0]).max() > .01
  differs[1, :, 0] = 0
  np.testing.assert_array_equal(differs, 0)


def test_momentum_by_hand():
  # Gradients g, then g / 1000: the second direction is that of g again, since momentum remembers it, whatever its
  # length. If the second is -3 g, it turns around.
  first, state = _first_update('muon')
  for factor, sign in (1e-3, 1), (-3, -1):
    second, _ = _updates(jax.tree.map(lambda g, f=factor: f * g, _gradients()), state, name='muon')
    np.testing.assert_allclose(second[MLP], sign * first[MLP], atol=1e-4)
  assert np.abs(first[MLP]).max() > .1


@pytest.mark.parametrize('on_one_cpu', [True, False])
def test_matrices_without_a_gradient_stay_where_they_are(on_one_cpu):
  # Expert 2 is chosen by nothing in the second step, and one weight of expert 3 alone has a gradient.
  gradients, state = _gradients(), _updates(_gradients(), name='muon', on_one_cpu=on_one_cpu)[1]
  kernel = gradients['encoder']['tail']['block0']['ffn_in']['kernel'].at[2:].set(0).at[3, 5, 7].set(1e-6)
  gradients['encoder']['tail']['block0']['ffn_in']['kernel'] = kernel
  updates, after = _updates(gradients, state, name='muon', on_one_cpu=on_one_cpu)
  np.testing.assert_array_equal(updates[MLP][2], 0)
  assert all(np.sqrt(np.mean(updates[MLP][e]**2)) > .15 for e in (0, 1, 3))
  # Momentum fades meanwhile, as everywhere.
  (path,) = (path for path in by_path(state) if path.endswith(MLP))
  before, now = by_path(state)[path][2], by_path(after)[path][2]
  np.testing.assert_allclose(now, muon.MOMENTUM * before, rtol=1e-6)


def test_all_other_parameters_are_updated_as_by_adamw():
  of_muon, of_adamw = (_first_update(name)[0] for name in ('muon', 'adamw'))
  matrices = {path for path, names in _names().items() if muon.matrix_axes(names)}
  for path, update in of_adamw.items():
    assert np.array_equal(update, of_muon[path]) == (path not in matrices), path


def test_frozen_kernels_have_no_momentum_and_others_decay():
  groups = ((r'tail/block0/qkv/kernel', 'freeze'), (r'ffn_in/kernel', .5, .1), (r'.*', 1., 0.))
  plain, _ = _first_update('muon')
  updates, state = _updates(_gradients(), name='muon', param_groups=groups)
  np.testing.assert_array_equal(updates[QKV], 0)
  np.testing.assert_allclose(
      updates[MLP], .5 * (plain[MLP] - .1 * by_path(small_model.params(SPEC))[MLP]), atol=1e-6)
  moments = [path for path in by_path(state) if path.endswith(QKV)]
  assert not moments
  assert any(path.endswith(MLP) for path in by_path(state))


def test_nothing_is_orthogonalized_where_all_kernels_are_frozen():
  updates, _ = _updates(_gradients(), name='muon', param_groups=((r'bias$', 1., 0.), (r'.*', 'freeze')))
  assert {path for path, update in updates.items() if np.any(update)} == {p for p in updates if p.endswith('bias')}


def test_a_state_restored_from_its_shapes_has_the_same_structure():
  tx = optimizer.make_optimizer(_config(name='muon'), _gradients(), axis_names=_names()).tx
  shapes = jax.eval_shape(tx.init, _gradients())
  mapped = optax.tree.map_params(tx, lambda moment: 'moment', shapes)
  assert sum(x == 'moment' for x in jax.tree.leaves(mapped)) == 10 + 2 * (len(by_path(_gradients())) - 10)
