"""Gradients of single tasks, against losses after real steps of a tiny model; the interference of a run."""

import dataclasses
import functools
import json

import chex
import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tests.helpers import tiny
from tests.helpers.small_model import jit
from uni_moe_jax.analysis import interference, param_subsets, run_interference
from uni_moe_jax.analysis.task_gradients import TaskGradients, quiet_spec, task_gradient
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.tree_paths import by_path

TASKS = ('answer', 'package')  # of one type, so that they share experts
PATTERN = r'ffn_out/kernel$'


_one_device = lambda: jax.devices()[:1]


def _config(*tasks, **train):
  c = tiny.config(*(tasks or TASKS), data_dir=tiny.data_dir())
  c.moe.noise_std = 8.
  c.model.num_layers = 1  # compiles fast
  for t in c.tasks.values():
    t.loss_weight = 3.0  # has no effect
  c.train.update(train)
  return c


_run = functools.cache(lambda: train_run.build(_config(), _one_device()))
_params = functools.cache(lambda: _run().init().params)
_slices = functools.cache(lambda: _select(_run()))
_gradients = functools.cache(lambda: TaskGradients(_run(), _params(), _slices(), 2, 0))


def _select(run):
  return param_subsets.select(run.shapes.params, run.spec.model.spec.stack, PATTERN)


def _spread(tree, slices, like):
  """Subsets, put back into a tree like the parameters; zero elsewhere."""
  flat = {path: np.zeros(leaf.shape, np.float32) for path, leaf in by_path(like).items()}
  for s in slices:
    array = flat[s.path] if s.period is None else flat[s.path][s.period]
    array[...] = np.asarray(tree[s.subset][s.path])
  return jax.tree.unflatten(jax.tree.structure(like), list(flat.values()))


@functools.cache
def _batches():
  """{task: [(batch 0, key), (batch 1, key)]}: the arguments of the gradient functions."""
  gradients, out = TaskGradients(_run(), _params(), _slices(), 2, 0), {name: [] for name in TASKS}
  for name in TASKS:
    gradients._functions[name] = lambda params, batch, sets, key, n=name: (out[n].append((batch, key)), None)
    for b in range(2):
      gradients(name, b)
  return out


def test_delta_is_the_decrease_of_the_loss_by_a_short_step():
  """L_i(θ) - L_i(θ - λ d) ≈ λ Δ_{j→i}, d the mean unit gradient of j (for i = j, of its other batch)."""
  slices, params, sets, length = _slices(), _params(), _run().target_sets(), 2e-3
  gradients = {(t, b): jax.device_get(_gradients()(t, b)) for t in TASKS for b in range(2)}
  measured = interference.products(lambda t, b: gradients[t, b], TASKS, 2)
  unit = {}
  for key, g in gradients.items():
    norm = np.linalg.norm(ravel_pytree(g)[0])
    unit[key] = _spread(jax.tree.map(lambda x, n=norm: x / n, g), slices, params)
  delta = np.array(measured[interference.ALL].rows)
  decrease = np.zeros_like(delta)
  for i, affected in enumerate(TASKS):
    for j, step_task in enumerate(TASKS):
      for a, (batch, key) in enumerate(_batches()[affected]):
        others = [b for b in range(2) if (i, a) != (j, b)]
        direction = jax.tree.map(lambda *x: sum(x) / len(x), *(unit[step_task, b] for b in others))
        before, after = (
            _gradients()._functions[affected](
                jax.tree.map(lambda p, d, s=s: p - s * length * d, params, direction), batch, sets, key)[1]
            for s in (0., 1.))
        decrease[i, j, a] = (before - after) / length
  scale = np.abs(delta).max()
  assert scale > 0.05
  np.testing.assert_allclose(decrease, delta, atol=0.02 * scale)
  assert np.abs(decrease - delta.swapaxes(0, 1)).max() > 0.1 * scale  # affected and step task are not interchangeable


def test_gradients_are_those_of_the_unweighted_loss_without_noise_and_losses_of_routers():
  run, (batch, _) = _run(), _batches()['package'][0]
  spec = quiet_spec(run.spec, 'package')
  assert spec.plan.tasks[0].loss_weight == 1 and [s.name for s in spec.plan.sets] == ['packages']
  model = run.spec.model.clone(spec=dataclasses.replace(run.spec.model.spec, drop_path=.5, noise_std=1.))
  trained = dataclasses.replace(run.spec, model=model, auxiliary=(('balance', 10.),), cpu_bfloat16=True)
  assert quiet_spec(trained, 'package') == spec != dataclasses.replace(spec, auxiliary=trained.auxiliary)
  noisy = jit(functools.partial(task_gradient, spec=dataclasses.replace(spec, model=run.spec.model), slices=_slices()))
  for gradient, is_equal in ((_gradients()._functions['package'], True), (noisy, False)):
    one, other = (gradient(_params(), batch, run.target_sets(), jax.random.key(seed))[0] for seed in (1, 2))
    assert is_equal == jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_batches_repeat_with_their_seed_and_are_not_those_of_training():
  def ids(seed, order=(0, 1, 2)):
    batches, gradients = [], TaskGradients(_run(), _params(), _slices(), 3, seed)
    gradients._functions['package'] = lambda params, batch, sets, key: (batches.append(batch), None)
    for b in order:
      gradients('package', b)
    return {b: np.asarray(x['text_classification']['id']).tolist() for b, x in zip(order, batches, strict=True)}
  assert ids(0) == ids(0) == ids(0, (2, 0, 1))
  assert ids(0) != ids(1)
  trained = [np.asarray(b['text_classification']['id']).tolist() for _, b in _run().mixture().iterate(0, 3)]
  assert list(ids(0).values()) != trained
  assert len({x for batch in ids(0).values() for row in batch for x in row}) == 12  # 3 batches of 4, no example twice


@pytest.mark.parametrize('at_init', [False, True])
def test_a_run_that_trains_no_task_is_an_error_that_names_the_run_it_starts_from(tmp_path, at_init):
  init = str(tmp_path / 'trained')
  workdir.claim_workdir(init, _config(), 'print')
  c = tiny.untrained(init)
  with pytest.raises(UsageError, match=f'trains no task.*--workdir of the run that it starts from, {init!r}'):
    run_interference.measure_interference(c, tmp_path, None, at_init, PATTERN, None, 2, 0, _one_device())


def test_a_run_whose_mesh_does_not_fit_is_measured_on_one_device(tmp_path, capsys):
  c = _config()
  c.mesh.update(dict(expert=4, data=4))  # of 16 devices
  # It is built, and fails at the next step.
  with pytest.raises(UsageError, match="--parameters='nothing' matches nothing"):
    run_interference.measure_interference(c, tmp_path, None, True, 'nothing', None, 2, 0)
  assert 'does not fit here (devices: 8); one device is used' in capsys.readouterr().err


def test_only_parameters_are_read_and_averages_are_if_they_are_wanted(tmp_path):
  run, params = _run(), _params()
  with Checkpoints(tmp_path, 1) as checkpoints:  # without moments, as an export has it
    checkpoints.save(3, {'params': params, 'ema_params': jax.tree.map(lambda x: x + 1, params)})
  for averaged in (False, True):
    got, name = run_interference.load_params(run, tmp_path, None, False, averaged)
    assert name == 'step 3'
    chex.assert_trees_all_equal(got, jax.tree.map(lambda x: x + averaged, params))


@pytest.mark.nightly
def test_any_checkpoint_and_the_initial_parameters_can_be_measured(tmp_path):
  c, params = _config(), _params()
  with Checkpoints(tmp_path, 2) as checkpoints:
    for step, factor in ((3, 1.), (5, 1.1)):
      checkpoints.save(step, {'params': jax.tree.map(lambda x, f=factor: f * x, params),
                              'ema_params': jax.tree.map(lambda x: x + 1, params)})
  contents = {}
  for step, at_init in ((None, False), (5, False), (3, False), (None, True)):
    paths = run_interference.measure_interference(c, tmp_path, step, at_init, PATTERN, None, 2, 0, _one_device())
    assert all(p.stat().st_size > 100 for p in paths)
    contents[paths[0].name] = json.loads(paths[0].read_text())
  assert list(contents) == [
      'interference.json', 'interference_step_5.json', 'interference_step_3.json', 'interference_init.json']
  newest, named, first, initial = (content['subsets'] for content in contents.values())
  assert newest == named != first == initial  # not of the averages
  total, subset = newest
  assert (total['subset'], subset['subset']) == ('all', 'layer 0 ffn_out')
  assert (subset['layer'], subset['projection']) == (0, 'ffn_out')
  assert total['ratio_of_means'] == subset['ratio_of_means']  # it is the only subset
  assert np.shape(total['delta']['value']) == (2, 2)
  with pytest.raises(ValueError, match='has no checkpoint of step 4; it has those of 3, 5'):
    run_interference.measure_interference(c, tmp_path, 4, False, PATTERN, None, 2, 0, _one_device())
