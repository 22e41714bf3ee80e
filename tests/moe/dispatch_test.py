"""Dispatch by hand-worked tables, and equal to the loop: for every token, the sum over its experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import gmm_backends, hlo, small_model
from tests.helpers.gmm_backends import normal
from uni_moe_jax.kernels import gmm
from uni_moe_jax.kernels.gmm import tiled as gmm_tiled
from uni_moe_jax.kernels.projection import project
from uni_moe_jax.moe import dispatch, layers, routers
from uni_moe_jax.tasks import router_names


def _output(expert, gates=None) -> routers.RouterOutput:
  """expert: [B, S, K] of up to three experts; gates even unless given."""
  expert = jnp.asarray(expert, jnp.int32)
  if gates is None:
    gates = jnp.full(expert.shape, 1 / expert.shape[-1])
  return routers.RouterOutput(jnp.zeros((*expert.shape[:2], 3)), expert, jnp.asarray(gates, jnp.float32))


_plan = small_model.jit(dispatch.make_plan, static_argnums=(2, 3, 4))


def _kept(plan: dispatch.DispatchPlan, *shape: int) -> list:
  return np.asarray(plan.kept).astype(int).reshape(shape).tolist()


def test_config_names_are_those_of_the_implementation():
  assert router_names.DISPATCHED == tuple(r for r in router_names.ROUTERS if routers.routes_tokens(r))


# ⌈1 · 2 · 12 / 8⌉ = 3; ⌈1.25 · 3⌉ = 4; ⌈.5 · 3⌉ = 2; at most every token once; 0: all tokens.
@pytest.mark.parametrize('factor, capacity', [(1.0, 3), (1.25, 4), (.5, 2), (9.0, 12), (0.0, 12)])
def test_capacity_by_hand(factor, capacity):
  assert dispatch.capacity_of(factor, tokens=12, top_k=2, num_experts=8) == capacity


def test_capacity_is_not_raised_by_a_rounding_error():
  assert 1.1 * 2 * 200 / 8 > 55 == dispatch.capacity_of(1.1, tokens=200, top_k=2, num_experts=8)


_BEHIND = [-1] * 255  # slots behind the groups, for the last tile


# Two examples of three positions, one expert each. Expert 0 is the choice of (example, position) 00, 01, 10, 12;
# expert 1 that of 02; expert 2 that of 11.
_EXPERT = [[[0], [0], [1]], [[0], [2], [0]]]


def test_exact_routing_sorts_by_expert_and_position():
  plan = _plan(_output(_EXPERT), None, 1, 0.0, 'tiled')
  assert plan.sizes.tolist() == [4, 1, 1]
  # Tokens are numbered 00 01 02 10 11 12. Expert 0: position 0 of both examples, then 01, then 12.
  assert plan.source.tolist() == [0, 3, 1, 5, 2, 4] + _BEHIND
  assert plan.slot[:, 0].tolist() == [0, 2, 4, 1, 5, 3]
  assert bool(plan.kept.all())


def test_capacity_is_given_to_earlier_positions_of_any_example():
  # C = ⌈1 · 1 · 6 / 3⌉ = 2: position 0 of both examples; 01 and 12 are dropped.
  plan = _plan(_output(_EXPERT), None, 1, 1.0, 'tiled')
  assert _kept(plan, 2, 3) == [[1, 0, 1], [1, 1, 0]]
  assert (plan.sizes.tolist(), int(plan.requested)) == ([2, 1, 1], 6)
  assert plan.source.tolist() == [0, 3, 2, 4, -1, -1] + _BEHIND


def test_batched_groups_have_equal_capacity_and_fill_registers():
  # Two slots for each of three experts; groups begin at multiples of 16 rows.
  plan = _plan(_output(_EXPERT), None, 1, 1.0, 'batched')
  empty = [-1] * 14
  assert plan.source.tolist() == [0, 3, *empty, 2, -1, *empty, 4, -1, *empty]
  assert np.asarray(plan.slot)[np.asarray(plan.kept)].tolist() == [0, 16, 1, 32]


def test_padding_is_neither_routed_nor_counted():
  # Position 0 of example 1 is padding: its slot goes to 01.
  valid = jnp.array([[True, True, True], [False, True, True]])
  plan = _plan(_output(_EXPERT), valid, 1, 1.0, 'tiled')
  assert _kept(plan, 2, 3) == [[1, 1, 1], [0, 1, 0]]
  assert (plan.sizes.tolist(), int(plan.requested)) == ([2, 1, 1], 5)


_ALL_TO_ZERO = [[[0]] * 4] * 2


@pytest.mark.parametrize('expert, groups, capacity, kept', [
    # C = ⌈.75 · 2 · 2 / 3⌉ = 1. At one position of two examples, expert 0 takes the first choice; an earlier second
    # choice is never evicted by a later first choice.
    ([[[1, 0]], [[0, 2]]], 1, .75, [[1, 0], [1, 1]]), ([[[1, 0], [0, 2]]], 1, .75, [[1, 1], [0, 1]]),
    # [words | queries]: separate capacities ⌈.5 · 1 · 4 / 3⌉ = 1, of example 0's first; together ⌈.5 · 8 / 3⌉ = 2.
    (_ALL_TO_ZERO, 2, .5, [[1, 0, 1, 0], [0, 0, 0, 0]]), (_ALL_TO_ZERO, 1, .5, [[1, 0, 0, 0], [1, 0, 0, 0]])])
def test_earlier_positions_come_first_then_first_choices_in_each_group(expert, groups, capacity, kept):
  plan = _plan(_output(expert), None, groups, capacity, 'tiled')
  assert _kept(plan, *np.shape(kept)) == kept


@pytest.mark.parametrize('backend', gmm_backends.ALL)
def test_tokens_are_conserved(backend):
  # Every kept choice has one slot, the source of that slot is the choice, and all other slots are empty.
  expert = np.random.default_rng(0).permuted(np.tile(np.arange(3), (4, 6, 1)), axis=-1)[..., :2]
  valid = jnp.asarray(np.random.default_rng(1).random((4, 6)) > .2)
  for capacity, groups in ((0.0, 1), (.5, 1), (.5, 2), (1.5, 2)):
    plan = _plan(_output(expert), valid, groups, capacity, backend)
    slots, source = np.asarray(plan.slot)[np.asarray(plan.kept)], np.asarray(plan.source)
    assert len(set(slots.tolist())) == len(slots)
    np.testing.assert_array_equal(source[slots], np.flatnonzero(plan.kept))
    assert (source >= 0).sum() == len(slots)
    assert int(plan.sizes.sum()) == len(slots)
    assert int(plan.requested) == 2 * int(valid.sum())
    if not capacity:
      assert len(slots) == 2 * int(valid.sum())
    elif capacity == .5:
      assert len(slots) < 2 * int(valid.sum())


def test_coefficients_are_the_kept_gates():
  plan = _plan(_output([[[1, 0], [0, 2]]], [[[.7, .3], [.6, .4]]]), None, 1, .75, 'tiled')
  np.testing.assert_allclose(plan.coef, [[.3, .7, 0], [0, 0, .4]], rtol=1e-6)


_B, _S, _K, _E = 3, 5, 2, 4
_VALID = np.arange(_S)[None] < np.array([[5], [3], [4]])


def _inputs():
  return normal(0, _B, _S, 2, 3), normal(1, _E, 2, 3, 5), normal(2, _E, 5), normal(3, _B, _S, _E)


def _dispatched(x, kernel, bias, logits, valid=None, capacity=0.0, groups=1, backend='tiled'):
  output = routers.RouterOutput(logits, *routers.keep_top_k(logits, _K))
  y = dispatch.project(x, kernel, bias, dispatch.make_plan(output, valid, groups, capacity, backend))
  return y.reshape(_B, _S, -1)


def _looped(x, kernel, bias, logits, kept=None):
  """For every token, the sum over its experts."""
  expert, gates = routers.keep_top_k(logits, _K)
  rows = []
  for b in range(_B):
    for s in range(_S):
      y = jnp.zeros(kernel.shape[-1])
      for k in range(_K):
        e = expert[b, s, k]
        if kept is None or kept[b, s, k]:
          y = y + gates[b, s, k] * (jnp.tensordot(x[b, s], kernel[e], 2) + bias[e])
      rows.append(y)
  return jnp.stack(rows).reshape(_B, _S, -1)


def _value_and_gradients(run):
  def loss(*operands):
    y = run(*operands)
    return jnp.sum(jnp.sin(y)), y
  (_, y), gradients = small_model.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*_inputs())
  return y, *gradients


@functools.cache
def _expected(kept=None):
  """Of the loop. kept: bytes of a bool array [B, S, K], or None; every backend keeps the same."""
  kept = None if kept is None else np.frombuffer(kept, bool).reshape(_B, _S, _K)
  return _value_and_gradients(functools.partial(_looped, kept=kept))


def _compare(actual, expected):
  for name, a, b in zip(('y', 'x', 'kernel', 'bias', 'logits'), actual, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize('backend', gmm_backends.ALL)
def test_exact_dispatch_equals_the_loop_in_values_and_gradients_and_so_does_enough_capacity(backend):
  _compare(_value_and_gradients(functools.partial(_dispatched, backend=backend)), _expected())
  assert all(np.abs(b).max() > .1 for b in _expected())
  # a slot for every token at every expert
  run = small_model.jit(functools.partial(_dispatched, capacity=_E / _K, backend=backend))
  np.testing.assert_allclose(run(*_inputs()), _expected()[0], atol=2e-5)


@pytest.mark.parametrize('backend', gmm_backends.ALL)
def test_dispatch_with_capacity_equals_the_loop_over_kept_choices(backend):
  logits = _inputs()[-1]
  output = routers.RouterOutput(logits, *routers.keep_top_k(logits, _K))
  kept = np.asarray(_plan(output, _VALID, 1, .5, backend).kept).reshape(_B, _S, _K)
  assert kept.any() and not kept[_VALID].all()
  run = functools.partial(_dispatched, valid=_VALID, capacity=.5, backend=backend)
  _compare(_value_and_gradients(run), _expected(kept.tobytes()))


@pytest.mark.parametrize('backend, at_once', [('batched', True), ('tiled', True), ('batched', False)])
def test_a_rematerialized_product_is_not_computed_again(backend, at_once):
  # Forward, and the gradients of x and of the kernels; a fourth computes the outputs of experts again, for the
  # gradient of the gates.
  def block(x, kernel, bias, logits):
    output = routers.RouterOutput(logits, *routers.keep_top_k(logits, _K))
    plan = dispatch.make_plan(output, None, 1, 1., backend)
    if at_once:
      return dispatch.project(x, kernel, bias, plan)
    rows = dispatch.permute(x.reshape(_B * _S, -1), plan.slots)
    y = gmm.grouped_matmul(rows, kernel.reshape(_E, -1, 5), plan.sizes, backend)
    return dispatch.combine(y, plan.gates, plan.slots)

  def loss(x, kernel, bias, logits):
    return jnp.sin(jax.checkpoint(block)(x, kernel, 0 * bias, logits)).sum()
  program = jax.jit(jax.grad(loss, argnums=(0, 1, 3))).lower(*_inputs()).compile()
  loops = len(gmm_tiled.TILES) if backend == 'tiled' else 1  # each has all of these products
  # At once: coef · bias is one more, with its gradient by coef; in equal groups a bias is added to rows.
  of_bias = {'tiled': 2, 'batched': 1}[backend]
  assert hlo.count_matmuls(program.as_text()) == (3 * loops + of_bias if at_once else 4)


def test_constant_gates_equal_the_merge():
  x, kernel, bias, _ = _inputs()
  logits = jnp.array([.3, -1., .9, .1])
  decision = routers.route(logits[None], _K)
  merged = project(x, *(layers.merge(w, decision.coef)[0] for w in (kernel, bias)))
  actual = small_model.jit(_dispatched)(x, kernel, bias, jnp.broadcast_to(logits, (_B, _S, _E)))
  np.testing.assert_allclose(actual, merged, atol=2e-5)


def test_padding_gets_zero_and_changes_nothing():
  actual = np.asarray(small_model.jit(_dispatched)(*_inputs(), _VALID))
  np.testing.assert_array_equal(actual[~_VALID], 0)
  np.testing.assert_allclose(actual[_VALID], _expected()[0][_VALID], atol=2e-5)
