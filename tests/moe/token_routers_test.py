"""Token routers: gates, pools, losses and statistics by hand, and noise that follows examples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.moe import dispatch, routers
from uni_moe_jax.moe.token_routers import TokenRouter, token_noise
from uni_moe_jax.moe.usage import Usage
from uni_moe_jax.utils.tree_paths import by_path

_KEY = jax.random.key(0)


def _router(context: bool = False, noise_std: float = 0.0) -> TokenRouter:
  return TokenRouter(small_model.spec(
      'context' if context else 'token', width=2, num_heads=1, num_experts=3, top_k=2, noise_std=noise_std))


def _decide(values, x, pool=None, key=None, **options):
  x = jnp.asarray(x, jnp.float32)
  B, S = x.shape[:2]
  ids, positions = jnp.arange(B, dtype=jnp.uint32), jnp.broadcast_to(jnp.arange(S), (B, S))
  return _router(pool is not None, **options).apply({'params': values}, x, None, pool, key, ids, positions)


_GATE = jnp.array([[math.log(2), 0., 0.], [0., 0., math.log(3)]])
_CONTEXT = {
    'gate': _GATE, 'context_gate': jnp.array([[0., math.log(6), 0.], [0., 0., 0.]]), 'query': jnp.array([1., 0.])}


def test_each_token_has_its_own_experts_by_hand():
  # x = (1, 0): logits log (2, 1, 1) keep 2/3, 1/3 (of equals the first). x = (0, 1): log (1, 1, 3): 3/4, 1/4.
  choice = _decide({'gate': _GATE}, [[[1, 0], [0, 1]]])
  assert choice.expert.tolist() == [[[0, 1], [2, 0]]]
  np.testing.assert_allclose(choice.gates, [[[2 / 3, 1 / 3], [3 / 4, 1 / 4]]], rtol=1e-6)


def test_context_adds_the_pool_of_the_sequence_by_hand():
  # Pool (1, ·) adds log 6 to expert 1: (2, 6, 1) keeps 6/8, 2/8 and (1, 6, 3) keeps 6/9, 3/9. Pool 0 adds nothing.
  choice = _decide(_CONTEXT, [[[1, 0], [0, 1]], [[1, 0], [0, 1]]], jnp.array([[1., 5.], [0., 5.]]))
  assert choice.expert.tolist() == [[[1, 0], [1, 2]], [[0, 1], [2, 0]]]
  np.testing.assert_allclose(choice.gates[0], [[3 / 4, 1 / 4], [2 / 3, 1 / 3]], rtol=1e-6)


# The first bit chooses experts 0 and 1 with gates 3/4 and 1/4, the second one experts 2 and 1.
_BITS = {'embed': {'kernel': jnp.array([[1., -1.], [-1., 1.], *[[0., 0.]] * 6]), 'bias': jnp.zeros(2)},
         'norm': {'scale': jnp.ones(2), 'bias': jnp.zeros(2)},
         'gate': jnp.array([[math.log(3), 0., -9.], [0., 0., 0.]])}


def test_tokens_choose_among_the_experts_of_their_condition_by_hand():
  def choose(bits):
    ids, positions = jnp.zeros(1, jnp.uint32), jnp.arange(2)[None]
    router = TokenRouter(small_model.spec(
        'token', width=2, num_heads=1, num_experts=3, top_k=2, experts_per_condition=2))
    return router.apply(
        {'params': {'gate': _GATE, 'condition': _BITS}}, jnp.array([[[1., 0.], [0., 1.]]]), bits, None, None, ids,
        positions)
  first, second = choose((1, *[0] * 7)), choose((0, 1, *[0] * 6))
  # x = (1, 0): (2, 1) times (3, 1) over 4. x = (0, 1) likes expert 2 best, which its condition does not have: (3, 1).
  assert first.expert.tolist() == [[[0, 1], [0, 1]]]
  np.testing.assert_allclose(first.gates, [[[6 / 7, 1 / 7], [3 / 4, 1 / 4]]], rtol=1e-4)
  assert second.expert.tolist() == [[[2, 1], [2, 1]]]


@pytest.mark.nightly
def test_a_condition_has_no_other_experts_in_any_layer_and_its_router_learns():
  key, sequences = jax.random.key(0), [small_model.sequence('image_caption', 6)]  # two conditions

  def used(experts_per_condition):
    spec = small_model.spec('token', num_layers=2, top_k=1, experts_per_condition=experts_per_condition)
    _, collected = small_model.run(spec, sequences, key, taps=True, all_rows=True)
    last = collected['tail'][0]['token_routing']['mlp']
    return [len(np.unique(routing.expert)) for sequence in last for routing in sequence]

  assert max(used(2)) <= 2 < min(used(0))
  spec = small_model.spec('token', num_layers=2, experts_per_condition=3)
  loss = lambda values: sum((x**2).sum() for x in small_model.encode(spec, sequences, values=values, key=key)[0])
  gradient = small_model.jit(jax.grad(loss))(small_model.params(spec))
  norms = {path: np.abs(x).max() for path, x in by_path(gradient).items() if '/condition/' in path}
  assert len(norms) == 5 * 2 * 2 and min(norms.values()) > 1e-6, norms  # of two routers, scanned and in the tail


def _pool(*arrays, valid=None):
  arrays = tuple(jnp.asarray([a], jnp.float32) for a in arrays)
  return _router(True).apply({'params': _CONTEXT}, arrays, valid or (None,) * len(arrays), method='pool')[0]


def test_the_pool_by_hand_without_padding():
  # Query (1, 0): weights 1 : 3 of the tokens (0, 4) and (log 3, 8).
  tokens, expected = [[0, 4], [math.log(3), 8], [9, 9]], [.75 * math.log(3), 7]
  np.testing.assert_allclose(_pool(tokens[:2]), expected, rtol=1e-6)
  np.testing.assert_allclose(_pool(tokens, valid=(jnp.array([[True, True, False]]),)), expected, rtol=1e-6)


def test_the_softmax_is_over_all_segments():
  tokens = np.random.default_rng(0).normal(size=(5, 2))
  np.testing.assert_allclose(_pool(tokens[:2], tokens[2:]), _pool(tokens), rtol=1e-5)
  assert np.abs(_pool(tokens[:2]) - _pool(tokens)).max() > .1


_IDS, _POSITIONS = jnp.array([7, 3], jnp.uint32), jnp.array([[0, 1, 2], [0, 1, 2]])


def _noise(ids, positions, key=_KEY):
  return np.asarray(token_noise(key, ids, positions, 4, 2.0))


def test_noise_follows_example_and_position_not_the_batch_index():
  noise = _noise(_IDS, _POSITIONS)
  np.testing.assert_array_equal(_noise(_IDS[::-1], _POSITIONS), noise[::-1])
  np.testing.assert_array_equal(_noise(_IDS, _POSITIONS[:, 2:]), noise[:, 2:])


def test_examples_positions_and_keys_have_separate_draws():
  draws = np.concatenate([_noise(_IDS, _POSITIONS, k).reshape(-1, 4) for k in (_KEY, jax.random.key(1))])
  gaps = np.abs(draws[:, None] - draws[None]).max(-1) + 9 * np.eye(len(draws))
  assert gaps.min() > 1e-2


def test_the_standard_deviation_of_noise_is_divided_by_the_experts():
  # 2 / 4; 4000 draws, standard error .5/√8000 = .006.
  noise = _noise(_IDS[:1], jnp.arange(1000)[None])
  assert noise.std() == pytest.approx(.5, abs=.03)


def test_evaluation_has_no_noise():
  x = np.random.default_rng(0).normal(size=(2, 3, 2))
  calm, noisy = (_decide({'gate': _GATE}, x, key=key, noise_std=1.0).logits for key in (None, _KEY))
  np.testing.assert_allclose(calm, jnp.asarray(x, jnp.float32) @ _GATE, rtol=1e-6)
  assert np.abs(noisy - calm).max() > .1


_plan = small_model.jit(dispatch.make_plan, static_argnums=(2, 3, 4))


def _of(output, plan, valid) -> Usage:
  return jax.tree.map(lambda x: x[None], Usage.of_segment(output, plan, valid))


def _usage(expert, logits=None, valid=None, capacity=0.0) -> Usage:
  """Usage by one segment; expert [B, S, K] of three, even gates."""
  expert = jnp.asarray(expert, jnp.int32)
  logits = jnp.zeros((*expert.shape[:2], 3)) if logits is None else jnp.asarray(logits, jnp.float32)
  output = routers.RouterOutput(logits, expert, jnp.full(expert.shape, 1 / expert.shape[2]))
  return small_model.jit(_of)(output, _plan(output, valid, 1, capacity, 'tiled'), valid)


def test_counts_by_hand():
  # Two samples, two positions; the last token is padding. C = ⌈.5 · 2 · 4 / 3⌉ = 2: three choices of expert 0.
  usage = _usage([[[0, 1], [0, 2]], [[0, 1], [0, 1]]], valid=jnp.array([[True, True], [True, False]]), capacity=.5)
  assert (usage.tokens.tolist(), usage.chosen.tolist()) == ([3], [[3, 2, 1]])
  assert (usage.requested.tolist(), usage.kept.tolist()) == ([6], [[2, 2, 1]])
  assert usage.importance.tolist() == [[1.5, 1, .5]]
  np.testing.assert_allclose(usage.drop_rate, 1 / 6, rtol=1e-6)
  np.testing.assert_allclose(usage.entropy, math.log(2), rtol=1e-6)
  assert usage.used.tolist() == [2, 2, 1]


def test_the_drop_rate_is_zero_when_capacity_allows():
  expert = np.random.default_rng(0).permuted(np.tile(np.arange(3), (4, 6, 1)), axis=-1)[..., :2]
  assert float(_usage(expert, capacity=0.0).drop_rate) == 0
  assert float(_usage(expert, capacity=1.5).drop_rate) == 0  # every token at every expert
  assert float(_usage(expert, capacity=.5).drop_rate) > .3


def test_rows_that_are_dispatched_twice_request_slots_twice():
  usage = _usage([[[0], [0]]])
  output = routers.RouterOutput(jnp.zeros((1, 1, 3)), jnp.array([[[0]]]), jnp.ones((1, 1, 1)))
  both = jax.tree.map(lambda x: x[0], usage) + Usage.of_repeated_dispatch(_plan(output, None, 1, 0.0, 'tiled'))
  assert (float(both.tokens), float(both.requested), both.kept.tolist()) == (2, 3, [3, 0, 0])


@pytest.mark.parametrize('loss, expert, weights, expected', [
    # Shares of choices (1/2, 1/2, 0); probabilities (1/2, 1/4, 1/4) of both tokens: 3 · (1/4 + 1/8).
    ('balance', [[[0], [1]]], [[[2., 1., 1.], [2., 1., 1.]]], 9 / 8),
    # Even routing balances at 1, and collapse at the number of experts.
    ('balance', [[[0], [1], [2]]], [[[1., 1., 1.]] * 3], 1),
    ('balance', [[[0], [0], [0]]], [[[math.exp(50.), 1., 1.]] * 3], 3),
    # Gates sum to (2, 1, 0): mean 1, variance 2/3.
    ('importance', [[[0], [0], [1]]], [[[1., 1., 1.]] * 3], 2 / 3),
    ('importance', [[[0], [1], [2]]], [[[1., 1., 1.]] * 3], 0),
    # log Σ exp: log 3 and log 6.
    ('z', [[[0], [0]]], [[[1., 1., 1.], [4., 1., 1.]]], (math.log(3)**2 + math.log(6)**2) / 2)])
def test_losses_by_hand(loss, expert, weights, expected):
  actual = _usage(expert, jnp.log(jnp.array(weights))).losses[loss]
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=0 if expected else 1e-7)


def test_losses_are_over_the_tokens_of_all_conditions_without_padding():
  expert, logits = [[[0], [1], [2]]], np.random.default_rng(0).normal(size=(1, 3, 3))
  complete = _usage(expert, logits).losses
  one, two = _usage([expert[0][:1]], logits[:, :1]), _usage([expert[0][1:]], logits[:, 1:])
  parts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, two).losses
  padded = _usage([expert[0] + [[0]]], np.concatenate([logits, np.full((1, 1, 3), 9.)], 1),
                  jnp.array([[True] * 3 + [False]])).losses
  for name in complete:
    np.testing.assert_allclose(parts[name], complete[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(padded[name], complete[name], rtol=1e-5, err_msg=name)


def test_a_step_down_the_balance_loss_moves_probability_to_idle_experts():
  def loss(logits):
    output = routers.RouterOutput(logits, *routers.keep_top_k(logits, 1))
    return _of(output, dispatch.make_plan(output, None, 1, 0.0, 'tiled'), None).losses['balance']
  gradient = small_model.jit(jax.grad(loss))(jnp.array([[[1., .5, 0.], [2., 0., 1.]]]))
  assert float(gradient[..., 0].min()) > 1e-3
  assert float(gradient[..., 1:].max()) < -1e-3
