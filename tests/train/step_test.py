"""The training step on three tasks at once: what changes, what is counted, and gradient accumulation."""

import dataclasses
import functools
import re

import jax
import jax.extend.core as jax_core
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.mixtures import BatchLayout
from uni_moe_jax.parallel import sharding
from uni_moe_jax.train import forward, step
from uni_moe_jax.train import run as train_run
from uni_moe_jax.utils.tree_paths import by_path

TASKS = ('shape', 'text', 'pair')
FROZEN = ('blocks/block0/qkv/', 'tail/block0/ffn_router/gate', 'embed/patch$')
EMA = 0.7
WEIGHTS = {'shape': 2., 'text': .5, 'pair': 1.}


@functools.cache
def _run() -> train_run.Run:
  """Every trainable parameter has weight decay 0, so that only gradients move it; strong noise reaches every expert."""
  c = tiny.config(*TASKS, data_dir=tiny.data_dir())
  c.optim.param_groups = (*((pattern, 'freeze') for pattern in FROZEN), ('.*', 1., 0.))
  c.moe.noise_std = 8.  # over 4 experts: a standard deviation of 2
  c.train.ema_decay = EMA
  for name, weight in WEIGHTS.items():
    c.tasks[name].loss_weight = weight
  return _build(c)


def _build(c) -> train_run.Run:
  return train_run.build(c, jax.devices()[:1])


@functools.cache
def _step():
  """(jitted step, five batches, target sets)."""
  run = _run()
  return run.step_fn(), [run.put_batch(batch) for _, batch in run.mixture().iterate(0, 5)], run.target_sets()


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def _batch(i: int):
  return _step()[1][i]


def _take(state, batch, **numbers):
  """One step that does not change its arguments (the step itself donates the buffers of the state).

  numbers: other ones of the spec.
  """
  made, _, sets = _step()
  key, own = made._on_devices
  return made._jitted(_copy(state), batch, sets, key, {**own, **jax.device_put(numbers, made._replicated)})


@functools.cache
def _states():
  """States after 0, 1, … 5 steps, and the metrics of each."""
  states, metrics = [_run().init()], []
  for batch in _step()[1]:
    state, m = _take(states[-1], batch)
    states.append(state)
    metrics.append(jax.device_get(m))
  return states, metrics


def _by_path(tree):
  return {path: np.asarray(leaf) for path, leaf in by_path(tree).items()}


def _assert_identical(a, b):
  a, b = _by_path(a), _by_path(b)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def _equal(a, b):
  return all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_frozen_parameters_stay_bit_identical_and_every_other_leaf_moves():
  states, metrics = _states()
  assert all(m['learning_rate'] > 0 for m in metrics)
  before, after = _by_path(states[0].params), _by_path(states[5].params)
  still = {path for path in before if (before[path] == after[path]).all()}
  assert still == _run().spec.frozen
  assert len(still) == 4  # qkv has a bias


def test_every_expert_of_every_layer_moves():
  states, _ = _states()
  before, after = _by_path(states[0].params), _by_path(states[5].params)
  parts = ('/qkv/', '/attention_out/', '/ffn_in/', '/ffn_out/')
  seen = 0
  for path in before.keys() - _run().spec.frozen:
    if any(p in path for p in parts):
      experts = 2 if '/blocks/' in path else 1  # leading axes: [layers, E, …] or [E, …]
      moved = (before[path] != after[path]).reshape(*before[path].shape[:experts], -1).any(-1)
      assert moved.shape[-1] == 4 and moved.all(), path
      seen += 1
  assert seen == 2 * 2 * 4 - 2


def test_the_total_is_the_weighted_sum_of_the_tasks():
  for m in _states()[1]:
    np.testing.assert_allclose(m['loss/total'], sum(w * m[f'loss/{n}'] for n, w in WEIGHTS.items()), rtol=1e-6)


def test_metrics_of_a_step():
  first = _states()[1][0]
  assert set(first) == {
      'grad_norm', 'learning_rate', 'nonfinite_streak', 'skipped_steps', 'router/entropy', 'router/effective_experts',
      'router/condition_overlap', 'sampled_softmax/dropped_labels', 'loss/total',
      *(f'{metric}/{name}' for metric in ('loss', 'accuracy') for name in TASKS)}
  assert first['learning_rate'] == np.float32(.005)  # half of the peak: a warm-up of two steps
  assert 0 < first['router/entropy'] < np.log(2)  # of two kept experts
  assert all(0 <= first[f'accuracy/{n}'] <= 1 for n in TASKS)


def test_the_average_follows_the_parameters_by_hand():
  states, _ = _states()
  expected = _by_path(states[0].params)
  _assert_identical(states[0].ema_params, states[0].params)
  for state in states[1:]:
    params = _by_path(state.params)
    expected = {path: EMA * e + (1 - EMA) * params[path] for path, e in expected.items()}
    for path, value in _by_path(state.ema_params).items():
      np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-7, err_msg=path)


def test_the_average_of_frozen_parameters_is_exactly_theirs():
  states, _ = _states()
  first, average = _by_path(states[0].params), _by_path(states[-1].ema_params)
  is_frozen = {path: any(re.search(pattern, path) for pattern in FROZEN) for path in first}
  assert sum(is_frozen.values()) == 4
  for path, value in average.items():
    assert np.array_equal(value, first[path]) == is_frozen[path], path


def _nonfinite(batch, group='image_classification'):
  """A batch whose loss is not a number."""
  return {**batch, group: {**batch[group], 'weight': batch[group]['weight'] * jnp.nan}}


@pytest.mark.parametrize('of_loss', [True, False])
def test_a_step_with_a_nonfinite_loss_or_gradient_changes_only_the_counters(of_loss):
  before, batch = _states()[0][2], _batch(2)
  after, metrics = _take(before, _nonfinite(batch)) if of_loss else _take(
      before, batch, loss_weights=tuple(np.float32([1e38, 0, 0])))
  assert np.isfinite(metrics['loss/total']) != of_loss and not np.isfinite(metrics['grad_norm'])
  assert np.isfinite(metrics['loss/text'])
  for name in ('params', 'opt_state', 'ema_params'):
    _assert_identical(getattr(after, name), getattr(before, name))
  assert (int(after.step), int(after.nonfinite_streak), int(after.skipped_steps)) == (3, 1, 1)


def test_a_task_without_weights_in_a_step_has_loss_zero_and_the_others_train():
  before, batch = _states()[0][2], _batch(2)
  fields = batch['image_classification']
  after, metrics = _take(before, {**batch, 'image_classification': {**fields, 'weight': 0 * fields['weight']}})
  assert (metrics['loss/shape'], metrics['accuracy/shape'], int(after.skipped_steps)) == (0, 0, 0)
  before, after = _by_path(before.params), _by_path(after.params)
  moved = {path for path in before if (before[path] != after[path]).any()}
  assert {'log_scale_text_mlm', 'log_scale_image_retrieval', 'embed/word'} <= moved


def test_the_same_step_on_finite_data_changes_all_of_them():
  before, after = _states()[0][2:4]
  for name in ('params', 'opt_state', 'ema_params'):
    assert not _equal(getattr(before, name), getattr(after, name))
  assert (int(after.step), int(after.nonfinite_streak), int(after.skipped_steps)) == (3, 0, 0)


def test_nonfinite_steps_are_counted_in_a_row_and_in_total_and_leave_the_schedule_where_it_was():
  (state, *_), (first, second, *_), counts, rates = *_states(), [], []
  for batch in (_nonfinite(_batch(0)), _nonfinite(_batch(0)), _batch(0), _nonfinite(_batch(0))):
    state, metrics = _take(state, batch)
    counts.append((int(metrics['nonfinite_streak']), int(metrics['skipped_steps'])))
    rates.append(metrics['learning_rate'])
  assert counts == [(1, 1), (2, 2), (0, 2), (1, 3)]
  assert rates == [first['learning_rate']] * 3 + [second['learning_rate']]


def test_a_step_is_deterministic():
  state, batch = _states()[0][1], _batch(1)
  (a, m), (b, n) = _take(state, batch), _take(state, batch)
  _assert_identical(a, b)
  _assert_identical(m, n)


def test_noise_differs_between_steps():
  one, two = _states()[0][1:3]
  first, second = (_take(one.replace(step=step), _batch(1))[1] for step in (one.step, two.step))
  assert float(first['loss/total']) != float(second['loss/total'])


def test_a_step_transfers_nothing_implicitly():
  run = _run()
  state, host = _copy(_states()[0][1]), next(run.mixture().iterate(1, 2))[1]
  _take(state, run.put_batch(host))  # compiled
  with jax.transfer_guard('disallow'):
    state, metrics = _step()[0](state, run.put_batch(host), _step()[2])
    jax.block_until_ready(metrics)
    jax.device_get(metrics)


def test_the_transfer_guard_detects_arguments_on_the_host():
  with jax.transfer_guard('disallow'), pytest.raises(Exception, match='Disallowed host-to-device'):
    jax.jit(jnp.negative)(next(_run().mixture().iterate(1, 2))[1]['text_mlm']['weight'])


@pytest.mark.parametrize('platform, deterministic, exact', [
    ('cpu', False, True), ('tpu', False, True), ('gpu', False, False), ('gpu', True, True), ('tpu', True, True)])
def test_steps_on_gpus_are_deterministic_by_the_config_alone(monkeypatch, platform, deterministic, exact):
  made = []
  monkeypatch.setattr(sharding, 'platform', lambda mesh: platform)
  monkeypatch.setattr(step.jax, 'jit', lambda f, **options: made.append(options))
  c = _run().config.copy_and_resolve_references()
  c.train.deterministic = deterministic
  run = dataclasses.replace(_run(), config=c)
  run.step_fn()
  assert run.resumes_exactly == exact
  options = {'xla_gpu_deterministic_ops': True} if platform == 'gpu' and deterministic else {}
  assert made[0]['compiler_options'] == options


def test_the_compiler_knows_the_option_of_deterministic_steps():
  option = 'xla_gpu_deterministic_ops'
  assert jax.jit(jnp.negative, compiler_options={option: True})(1.) == -1
  with pytest.raises(Exception, match='No such compile option'):
    jax.jit(jnp.negative, compiler_options={option + 'x': True})(1.)


# Accumulation. One layer: what is compared is how micro-steps add up.
@functools.cache
def _set_run():
  c = tiny.config('text', data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.train.grad_accum_steps = 2
  return _build(c)


def _global_batch(run, accum):
  """The same global batch, in micro-steps or at once."""
  return next(dataclasses.replace(run.mixture(), layout=BatchLayout(accum)).iterate(0, 1))[1]


@functools.cache
def _gradients(accum):
  """Output of one step from the same parameters."""
  run = _set_run()
  spec = dataclasses.replace(run.spec, grad_accum_steps=accum)
  return jax.device_get(jax.jit(functools.partial(step.gradients, spec))(
      small_model.params(spec.model.spec), _global_batch(run, accum), run.target_sets(), jax.random.key(7)))


def test_accumulated_losses_are_those_of_one_big_batch():
  one, two = _gradients(1), _gradients(2)
  assert two.loss == pytest.approx(one.loss, rel=1e-5)
  assert two.tallies['text'].hits == pytest.approx(one.tallies['text'].hits, rel=1e-5)


def test_accumulated_gradients_are_those_of_one_big_batch():
  ones, twos = (_by_path(_gradients(accum).grads) for accum in (1, 2))
  norm = np.sqrt(sum((g**2).sum() for g in ones.values()))
  differences = {path: np.linalg.norm(twos[path] - g) for path, g in ones.items()}
  assert np.sqrt(sum(d**2 for d in differences.values())) <= 1e-5 * norm
  for path, g in ones.items():  # a leaf whose gradient is next to nothing is compared with the whole gradient
    assert differences[path] <= 3e-5 * max(np.linalg.norm(g), 1e-2 * norm), path
  assert norm > .1


def test_micro_steps_and_sets_use_the_experts_of_one_big_batch():
  # The conditions of the texts and of their words use two experts each; that of the texts in both micro-steps.
  [ones], [twos] = (_gradients(accum).used_experts['tail'] for accum in (1, 2))
  for part in ('attention', 'mlp'):
    np.testing.assert_array_equal(ones[part] > 0, twos[part] > 0)
    assert (ones[part].sum(), twos[part].sum()) == (4, 6) and ones[part].shape == (4,)


def test_unequal_weights_make_no_mean_of_means():
  # The number of masked words of a text varies, here by one, so micro-batches differ in weight: their norm is that of
  # the global batch.
  run = _set_run()
  batch = jax.device_get(_global_batch(run, 2))
  weight = batch['text_mlm']['weight'] = batch['text_mlm']['weight'].copy()
  weight[(0, *np.argwhere(weight[0])[0])] = 0
  norm = forward.weight_sums(run.spec, batch, forward.sample_vocabularies(run.spec, batch, jax.random.key(7)))
  per_micro = weight.sum((1, 2, 3))
  assert float(norm['text']) == per_micro.sum()
  assert per_micro[0] != per_micro[1]


def test_a_task_gets_its_own_rows_of_its_group_in_every_shard():
  # Package (batch 4) and answer (batch 8) over 2 shards and 2 micro-steps: a shard of a micro-step holds two rows of
  # `answer`, then one of `package`; rows are numbered.
  c = tiny.config('package', 'answer')
  c.tasks.answer.batch_size = 8
  plan = make_plan(c)
  model = dataclasses.replace(_set_run().spec.model, shards=2)
  spec = dataclasses.replace(_set_run().spec, plan=plan, model=model, grad_accum_steps=2)
  numbers = np.arange(6).reshape(2, 3, 1)
  micro = {'text_classification': {'label': numbers, 'weight': numbers / 2, 'text': numbers}}
  rows = {t.name: forward.task_fields(spec, micro, t) for t in plan.tasks}
  assert {name: fields['label'][:, 0].tolist() for name, fields in rows.items()} == {
      'answer': [0, 1, 3, 4], 'package': [2, 5]}
  assert rows['package']['weight'].tolist() == [[1.], [2.5]]


# Seven texts: no other array of the step has this leading axis.
@functools.cache
def _shapes(accum):
  """(shapes inside the scan over micro-steps, shapes outside) of the traced gradient."""
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.target_sets.shapes = config_lib.target_set(tiny.CLASSES + tiny.COLORS, family='names')
  c.model.num_layers = 1
  c.train.grad_accum_steps = accum
  run = _build(c)
  traced = jax.make_jaxpr(functools.partial(step.gradients, run.spec))(
      run.shapes.params, _global_batch(run, accum), run.target_sets(), jax.random.key(0))
  inside, outside = set(), set()
  _collect(traced.jaxpr, accum, False, inside, outside)
  return inside, outside


def _collect(jaxpr, accum, within, inside, outside):
  for eqn in jaxpr.eqns:
    (inside if within else outside).update(v.aval.shape for v in eqn.outvars)
    micro = eqn.primitive.name == 'scan' and eqn.params['length'] == accum
    for sub in jax_core.jaxprs_in_params(eqn.params):
      _collect(sub, accum, within or micro, inside, outside)


def test_target_sets_are_encoded_once_for_all_micro_steps():
  inside, outside = _shapes(4)
  encoded = {s for s in outside if len(s) == 3 and s[0] == 7 and s[2] == 16}  # [V, S, D]
  assert encoded
  assert not encoded & inside
  assert (2, 5, 16) in inside  # while the images of a micro-step, 2 of [spe, 4 patches], are encoded in it


# A sampled mixture: one task a step.
def test_a_one_task_step_has_only_the_loss_of_its_task_whose_weight_does_not_scale_it():
  c = tiny.config('shape', 'pair', data_dir=tiny.data_dir())
  c.model.num_layers = 1
  c.train.mixture = 'one_task'
  c.tasks.shape.loss_weight = 3.
  c.optim.param_groups = (('.*', 1., 0.),)
  run = _build(c)
  batch = next(batch for name, batch in run.mixture().iterate(0, 20) if name == 'shape')
  state = run.init()
  before = _by_path(jax.device_get(state.params))
  state, metrics = run.step_fn('shape')(state, run.put_batch(batch), run.target_sets())
  after = _by_path(state.params)
  assert [k for k in metrics if k.startswith('loss/')] == ['loss/shape', 'loss/total']
  moved = {path for path in before if (before[path] != after[path]).any()}
  assert 'log_scale_image_classification' in moved
  assert 'log_scale_image_retrieval' not in moved
  assert metrics['loss/total'] == metrics['loss/shape']
