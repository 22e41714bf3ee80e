"""Auxiliary losses of routers reach the step's loss and gradients, also through accumulation; metrics of routing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax.data.batches.mixtures import BatchLayout
from uni_moe_jax.moe.routers import RouterOutput
from uni_moe_jax.moe.usage import Usage
from uni_moe_jax.train import forward, router_metrics, step
from uni_moe_jax.train import run as train_run
from uni_moe_jax.utils.tree_paths import by_path

WEIGHTS = {'balance': .5, 'importance': .25, 'z': .125}


@functools.cache
def _run() -> train_run.Run:
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.moe.update(dict(router='token', gmm='batched', capacity_factor=.75))
  c.moe.update({f'{name}_loss_weight': weight for name, weight in WEIGHTS.items()})
  return train_run.build(c, jax.devices()[:1])


_params = functools.cache(lambda: _run().init().params)


@functools.cache
def _problem(accum: int):
  """(spec, parameters, batch, sets, key)."""
  run = _run()
  spec = dataclasses.replace(run.spec, grad_accum_steps=accum)
  batch = next(dataclasses.replace(run.mixture(), layout=BatchLayout(accum)).iterate(0, 1))[1]
  return spec, _params(), batch, run.target_sets(), jax.random.key(7)


@functools.cache
def _gradients(accum: int, weights: tuple = tuple(WEIGHTS.items())):
  spec, params, batch, sets, key = _problem(accum)
  spec = dataclasses.replace(spec, auxiliary=weights)
  return small_model.jit(functools.partial(step.gradients, spec))(params, batch, sets, key)


def test_loss_weights_come_from_the_config():
  assert dict(_run().spec.auxiliary) == WEIGHTS


@pytest.mark.nightly
def test_the_total_is_that_of_the_tasks_and_of_the_routers():
  output = _gradients(1)
  routed = sum(f * output.metrics[f'router/{n}'] for n, f in WEIGHTS.items())
  np.testing.assert_allclose(output.loss, output.tallies['shape'].loss + routed, rtol=1e-5)
  assert float(routed) > .1


def _plain(spec, params, batch, sets, key):
  """The loss of an accumulated step, written down: sets and micro-steps weigh as their tokens do.

  8 images of 4 patches in 2 micro-steps of 16 tokens each; 3 names as texts."""
  def auxiliary(collected):
    usages = [d for out in collected['tail'] for d in out['router_stats'].values()]
    return sum(f * jnp.stack([u.losses[n] for u in usages]).mean() for n, f in WEIGHTS.items())

  def loss(params):
    features, collected = forward.forward(spec, params, {}, sets, {}, key)
    of_sets = features.target_sets
    names = sum(b['text'].size for b in sets['shapes']['buckets'])
    total = names * auxiliary(collected) / (names + 32)
    for i in range(2):
      micro = jax.tree.map(lambda x: x[i], batch)
      features, collected = forward.forward(spec, params, micro, {}, {}, key)
      features = features.replace(target_sets=of_sets)
      scores = forward.task_losses(spec, params, micro, features, {}, forward.weight_sums(spec, batch, {}))[0]
      total = total + scores + 16 * auxiliary(collected) / (names + 32)
    return total
  return small_model.jit(jax.value_and_grad(loss))(params)


@pytest.mark.nightly
def test_accumulation_includes_auxiliary_losses_of_micro_steps_and_target_sets():
  total, gradients = _plain(*_problem(2))
  output = _gradients(2)
  np.testing.assert_allclose(output.loss, total, rtol=1e-5)
  without = _gradients(2, ()).grads
  moved = 0
  gradients, without = by_path(gradients), by_path(without)
  for path, g in by_path(output.grads).items():
    np.testing.assert_allclose(g, gradients[path], atol=2e-5, err_msg=path)
    moved += np.abs(np.asarray(g) - without[path]).max() > 1e-3
  assert moved > 3  # the comparison sees them


@pytest.mark.nightly
def test_a_step_reports_drop_rate_and_expert_balance():
  for accum in (1, 2):
    extra = _gradients(accum).metrics
    assert set(extra) == {f'router/{name}' for name in (
        'entropy', 'drop_rate', 'effective_experts', 'condition_overlap', 'auxiliary_loss', *WEIGHTS)}
    assert 1 < extra['router/effective_experts'] <= 4 and 0 < extra['router/condition_overlap'] <= 1
    assert 0 < extra['router/drop_rate'] < 1 and 0 < extra['router/entropy'] <= np.log(2) + 1e-6
    assert extra['router/balance'] > 0
    weighted = sum(weight * extra[f'router/{name}'] for name, weight in WEIGHTS.items())
    np.testing.assert_allclose(extra['router/auxiliary_loss'], weighted, rtol=1e-5)


def test_the_logged_total_is_that_of_the_tasks_alone():
  output, (spec, params, *arguments) = _gradients(1), _problem(1)
  tasks = tuple(dataclasses.replace(t, loss_weight=3.) for t in spec.plan.tasks)
  spec = dataclasses.replace(spec, plan=dataclasses.replace(spec.plan, tasks=tasks))
  with pytest.MonkeyPatch.context() as patch:  # which are compiled already
    patch.setattr(step, 'gradients', lambda *_: output)
    _, metrics = small_model.jit(lambda params: step.train_step(
        step.init_state(spec, params), *arguments, spec=spec))(params)
  np.testing.assert_allclose(metrics['loss/total'], 3 * output.tallies['shape'].loss, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss/shape'] + metrics['router/auxiliary_loss'], output.loss, rtol=1e-5)


def test_experts_with_a_filled_slot_are_used():
  chosen = _gradients(1).used_experts
  for part in ('attention', 'mlp'):
    assert chosen['tail'][0][part].shape == (4,) and chosen['tail'][0][part].sum() > 8


def _output(coef) -> RouterOutput:
  """The router output with these coefficients [..., A, E]."""
  return RouterOutput(coef, jnp.broadcast_to(jnp.arange(coef.shape[-1]), coef.shape), coef)


def _usage(requested, kept) -> Usage:
  one = Usage.zero(2).replace(requested=jnp.float32(requested), kept=jnp.asarray(kept, jnp.float32))
  return jax.tree.map(lambda x: x[None], one)


def _collected(blocks=(), tail=()):
  """What an encoder with these routers of its FFNs collects."""
  return {subtree: tuple({'router_stats': {'mlp': stats}} for stats in routers)
          for subtree, routers in (('blocks', blocks), ('tail', tail))}


def test_metrics_are_means_over_layers_and_routers():
  # Drop rates 1/4 and 0 of two stacked layers, 1/2 of the tail.
  stacked = jax.tree.map(lambda *x: jnp.stack(x), _usage(4, [2, 1]), _usage(4, [2, 2]))
  metrics = router_metrics.metrics(_collected([stacked], [_usage(4, [1, 1])]))
  assert float(metrics['router/drop_rate']) == pytest.approx(1 / 4)


def test_merging_routers_report_entropy_and_expert_usage_and_dense_models_nothing():
  # Conditions share half an expert; together they take .75 and .25: exp(.75 ln 4/3 + .25 ln 4) experts.
  collected = _collected(tail=[_output(jnp.array([[.5, .5], [1., 0.]]))])
  assert {k: float(v) for k, v in router_metrics.metrics(collected).items()} == {
      'router/entropy': pytest.approx(np.log(2) / 2), 'router/condition_overlap': pytest.approx(.5),
      'router/effective_experts': pytest.approx(4 / 3 ** .75)}
  assert router_metrics.metrics({'blocks': (), 'tail': ({'router_stats': {}},)}) == {}
  assert float(router_metrics.auxiliary_loss((), collected)) == 0


def test_usage_is_a_mean_over_layers_and_a_single_condition_overlaps_fully():
  # Two stacked layers of three conditions: all the same expert; three different ones.
  coef = jnp.array([[[1., 0, 0]] * 3, np.eye(3)])
  metrics = router_metrics.metrics(_collected([_output(coef)]))
  assert float(metrics['router/effective_experts']) == pytest.approx(2)
  assert float(metrics['router/condition_overlap']) == pytest.approx(.5)
  one = router_metrics.metrics(_collected(tail=[_output(coef[0, :1])]))
  assert float(one['router/condition_overlap']) == 1


def test_without_a_router_auxiliary_losses_are_zero():
  nothing = {'blocks': (), 'tail': ({'router_stats': {}},)}  # token routing with placement='none'
  assert float(router_metrics.auxiliary_loss(tuple(WEIGHTS.items()), nothing)) == 0
  some = jax.tree.map(lambda x: x[None], Usage.zero(2).replace(tokens=jnp.float32(2), z=jnp.float32(8)))
  assert float(router_metrics.auxiliary_loss(tuple(WEIGHTS.items()), _collected(tail=[some]))) == 8 / 2 * WEIGHTS['z']


def test_conditions_without_tokens_do_not_count():
  # The last MLP has tokens of the readout alone: here of condition 0, an eighth of them on each of eight experts.
  usage = jax.tree.map(lambda x: jnp.stack([x, x]), Usage.zero(8)).replace(
      tokens=jnp.array([8., 0.]), importance=jnp.array([[1.] * 8, [0.] * 8]))
  metrics = router_metrics.metrics(_collected(tail=[usage]))
  assert float(metrics['router/effective_experts']) == pytest.approx(8)
  assert float(metrics['router/condition_overlap']) == 1


def test_tokens_of_a_condition_count_equally():
  # Condition 0: 3 tokens on expert 0 and 1 on expert 1; condition 1: 2 tokens on expert 1. Shares (.75, .25) and (0, 1)
  # have .25 in common.
  usage = jax.tree.map(lambda x: jnp.stack([x, x]), Usage.zero(2)).replace(
      tokens=jnp.array([4., 2.]), importance=jnp.array([[3., 1.], [0., 2.]]))
  metrics = router_metrics.metrics(_collected(tail=[usage]))
  assert float(metrics['router/condition_overlap']) == pytest.approx(.25)
  assert float(metrics['router/effective_experts']) == pytest.approx(np.exp(-.375 * np.log(.375) - .625 * np.log(.625)))
