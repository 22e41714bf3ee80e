"""Dispatch on a mesh: equal to the loop over tokens on one device, with every transport."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import hlo, small_model
from uni_moe_jax.moe import dispatch, expert_parallel
from uni_moe_jax.moe.layers import Projection
from uni_moe_jax.moe.routers import RouterOutput
from uni_moe_jax.parallel import sharding

_B, _S, _D, _N, _H, _E, _K = 8, 5, 6, 2, 3, 4, 2
_NAMES = ('x', 'logits', 'kernel in', 'bias in', 'kernel out', 'bias out')
_ENOUGH = _E / _K  # a capacity with a slot for every token at every expert


@functools.cache
def _operands():
  rng = np.random.default_rng(0)
  shapes = (_B, _S, _D), (_B, _S, _E), (_E, _D, _N, _H), (_E, _N, _H), (_E, _N, _H, _D), (_E, _D)
  return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


@functools.cache
def _mesh(**axes):
  shape = {**dict(replica=1, data=1, expert=1, model=1), **axes}
  return sharding.make_mesh(shape, jax.devices()[:int(np.prod(list(shape.values())))])


def _route(logits, mesh=None):
  return expert_parallel.route_tokens(logits, _K, mesh)


def _block(x, logits, *weights, valid=None, capacity=0.0, mesh=None, backend='batched'):
  """([B, S, D], plan) of two projections with one plan: to heads and back, as in attention."""
  plan = expert_parallel.make_plan(_route(logits, mesh), valid, 1, capacity, backend, mesh)
  first = Projection(weights[0], weights[1], ('embed',), ('heads', 'head_dim'))
  second = Projection(weights[2], weights[3], ('heads', 'head_dim'), ('embed',))
  hidden = expert_parallel.project(x, first, plan, mesh, jnp.sin)
  return expert_parallel.project(hidden, second, plan, mesh, jnp.arctan), plan


def _looped(x, logits, *weights, kept=None):
  """The same, every token through every expert."""
  output = _route(logits)
  gates = output.gates if kept is None else output.gates * kept
  coef = (gates[..., None] * jax.nn.one_hot(output.expert, _E)).sum(2)
  def project(x, kernel, bias, letters):
    return jnp.einsum(f'bs{letters[0]},e{letters},bse->bs{letters[1:]}' if letters == 'dnh' else 'bsnh,enhd,bse->bsd',
                      x, kernel, coef) + jnp.tensordot(coef, bias, axes=1)
  return jnp.arctan(project(jnp.sin(project(x, weights[0], weights[1], 'dnh')), weights[2], weights[3], 'nhd'))


def _with_gradients(run, operands=None):
  """(results of `run`, of which y is the first, gradients of Σ sin y by every operand)."""
  def loss(*operands):
    actual = run(*operands)
    return jnp.sum(jnp.sin(actual[0])), actual
  grad = jax.value_and_grad(loss, argnums=range(len(_NAMES)), has_aux=True)
  (_, actual), gradients = small_model.jit(grad)(*(operands or _operands()))
  return actual, gradients


@functools.cache
def _expected(kept=None):
  """As `_with_gradients`, of the loop. kept: bytes of a bool array [B, S, K], or None."""
  kept = None if kept is None else np.frombuffer(kept, bool).reshape(_B, _S, _K)
  return _with_gradients(lambda *operands: (_looped(*operands, kept=kept),))


def _assert_equal(actual, gradients, kept=None):
  expected, wanted = _expected(kept)
  np.testing.assert_allclose(actual[0], expected[0], atol=2e-5)
  for name, a, b in zip(_NAMES, gradients, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5, err_msg=name)
    assert np.abs(b).max() > .1, name


def test_no_choice_depends_on_rounding():
  # The smallest lead of the last expert that is kept over the first that is not.
  order = np.sort(np.asarray(_operands()[1]), axis=-1)
  assert (order[..., -_K] - order[..., -_K - 1]).min() > 1e-4


@pytest.mark.parametrize('axes, capacity, transport', [
    (dict(replica=2, data=4), 0.0, expert_parallel.LOCAL), (dict(data=2, expert=4), 0.0, expert_parallel.ALL_GATHER),
    (dict(data=2, expert=2, model=2), 0.0, expert_parallel.ALL_GATHER),
    (dict(expert=4), _ENOUGH, expert_parallel.ALL_TO_ALL),
    (dict(data=2, expert=2, model=2), _ENOUGH, expert_parallel.ALL_TO_ALL)])
def test_values_and_gradients_are_those_of_one_device(axes, capacity, transport):
  actual, gradients = _with_gradients(functools.partial(_block, capacity=capacity, mesh=_mesh(**axes)))
  assert actual[1].transport == transport
  _assert_equal(actual, gradients)
  chosen = np.bincount(np.asarray(_route(_operands()[1]).expert).reshape(-1), minlength=_E)
  np.testing.assert_array_equal(actual[1].slots_given, chosen)
  assert int(actual[1].requested.sum()) == _B * _S * _K


@pytest.mark.parametrize('unrounded, expected', [(jnp.ones((1, 1, 1)), 257), (None, 256)])
def test_gradients_of_rounded_experts_are_added_over_devices_in_float32(unrounded, expected):
  # Tokens of 1, 256 of the first device and one of the second; bfloat16 has no 257.
  x, mesh = jnp.ones((2, 256, 1), jnp.bfloat16), _mesh(data=2)
  output = RouterOutput(jnp.zeros((2, 256, 1)), jnp.zeros((2, 256, 1), jnp.int32), jnp.ones((2, 256, 1)))
  valid = jnp.arange(256)[None] < jnp.array([[256], [1]])

  def loss(kernel, unrounded):
    plan = expert_parallel.make_plan(output, valid, 1, 0.0, 'tiled', mesh)
    projection = Projection(kernel, jnp.zeros((1, 1)), ('embed',), ('mlp',), unrounded)
    return expert_parallel.project(x, projection, plan, mesh).astype(jnp.float32).sum()

  gradients = small_model.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones((1, 1, 1), jnp.bfloat16), unrounded)
  gradient = gradients[0] if unrounded is None else gradients[1]
  assert float(gradient.reshape(())) == expected


def test_uneven_batches_are_padded_and_padding_is_not_routed():
  x, logits, *weights = _operands()
  valid = jnp.arange(_S)[None] < jnp.array([[5], [3], [4]])
  run = small_model.jit(functools.partial(_block, valid=valid, mesh=_mesh(data=2, expert=4), backend='tiled'))
  y, plan = run(x[:3], logits[:3], *weights)
  expected = np.asarray(_expected()[0][0][:3])
  np.testing.assert_allclose(y, np.where(valid[..., None], expected, 0), atol=2e-5)
  assert plan.slots_given.sum() == 12 * _K


def test_every_device_bounds_its_own_tokens_and_earlier_positions_go_first():
  mesh, capacity = _mesh(data=2, expert=2), .5
  actual, gradients = _with_gradients(functools.partial(_block, capacity=capacity, mesh=mesh))
  of_shard = small_model.jit(dispatch.make_plan, static_argnums=(1, 2, 3, 4))
  output = _route(_operands()[1])
  shards = [jax.tree.map(lambda x, i=i: x[2 * i:2 * i + 2], output) for i in range(4)]
  plans = [of_shard(shard, None, 1, capacity, 'batched') for shard in shards]
  kept = np.concatenate([np.asarray(plan.kept) for plan in plans])
  np.testing.assert_array_equal(actual[1].kept, kept)
  assert .3 <= kept.mean() <= .7  # C = ⌈.5 · 2 · 2 · 5 / 4⌉ = 3 of 5 on average
  np.testing.assert_array_equal(actual[1].slots_given, sum(np.asarray(plan.sizes) for plan in plans))
  _assert_equal(actual, gradients, kept.tobytes())


def test_an_all_to_all_carries_the_slots_of_a_device():
  mesh, capacity = _mesh(data=2, expert=4), 1.0
  run = small_model.jit(lambda *operands: _block(*operands, capacity=capacity, mesh=mesh)[0])
  sent = hlo.collectives(run.lower(*_operands()).compile().as_text())
  # C = ⌈1 · 2 · 5 / 4⌉ = 3 of the five tokens of a device, in 16 slots for each of four experts; widths there and back:
  # D → N · H → D.
  expected = sum(64 * width * 4 for width in (_D, _N * _H, _N * _H, _D))
  assert sum(s.bytes for s in sent if s.opcode == 'all-to-all') == expected
  assert [s for s in sent if s.opcode in ('all-gather', 'reduce-scatter')] == []
