"""Five training steps of the published system, in both conventions for unused parameters."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from tests.helpers import small_model
from tests.parity import fixtures
from tests.parity.fixtures import Arrays, assert_close
from tests.parity.problem import fields, sized, step_spec, target_sets, task_spec
from uni_moe_jax import config as config_lib
from uni_moe_jax.config import presets
from uni_moe_jax.convert import torch_layout
from uni_moe_jax.model.uni_perceiver import UniPerceiver, param_shapes
from uni_moe_jax.train import optimizer, step
from uni_moe_jax.train.used_params import unit_axes
from uni_moe_jax.utils.tree_paths import by_path

BOUND = 1e-5
EMA = 'final_ema'


def _config(hyper, convention: str):
  """The published preset with the hyperparameters of a case."""
  c = config_lib.base()
  presets.published(c, weight_decay=hyper['weight_decay'])
  b1, b2 = hyper['betas']
  c.optim.update(dict(learning_rate=hyper['base_lr'], warmup_steps=hyper['warmup'],
                      final_lr_fraction=hyper['min_lr'] / hyper['base_lr'], b1=b1, b2=b2, eps=hyper['eps'],
                      grad_clip_norm=hyper['grad_clip'], unused_params=convention))
  c.train.steps = hyper['max_iter']
  return c


def _groups(entry):
  groups = entry['param_groups']
  if isinstance(groups, str):  # 'same as NAME'
    groups = fixtures.entry(groups.removeprefix('same as '))['param_groups']
  return groups


@pytest.mark.parametrize('name', fixtures.cases('optimizer'))
def test_optimizer_steps(name):
  entry = fixtures.entry(name)
  arrays, given = Arrays(name), Arrays(entry['inputs_in'].removesuffix('.npz'))
  if entry['inputs_in'] == entry['file']:
    given = arrays
  model = fixtures.model_of(entry['weights'])
  c = _config(entry['hyper'], 'settonone' if entry['zero_grad_set_to_none'] else 'zerograd')
  specs, sets, _ = target_sets(model, given)
  batches = [fields(task_spec(t), given, f'step{i}.', entry.get('temporal_pos_offset', 0))
             for i, t in enumerate(entry['tasks'])]
  ema_key = {re.split(r'\.(?:loss_prepare|fused|token|video)', k)[0] for k in arrays.keys(EMA)}
  ema_key = min(ema_key, default=f'{EMA}0')
  made = optimizer.make_optimizer(c, param_shapes(UniPerceiver(fixtures.model_spec(model))),
                                  functools.partial(unit_axes, fixtures.model_spec(model)))
  spec = step_spec(
      model, (), specs, optimizer=made, ema_decay=float(ema_key.removeprefix(EMA)),
      contrastive_reduction=c.train.contrastive_reduction, mask_duplicate_texts=c.train.mask_duplicate_texts,
      unused_params=c.optim.unused_params, frozen=optimizer.frozen_paths(made.groups))
  _compare_groups(entry, spec, made.groups)
  for key in arrays.keys('lr_schedule'):
    rates = [made.learning_rate(i) for i in range(len(arrays[key]))]
    np.testing.assert_allclose(rates, arrays[key], rtol=BOUND, atol=1e-12)

  names = fixtures.manifest()['models'][model]['param_names']
  state = small_model.jit(functools.partial(step.init_state, spec))(fixtures.params(model))
  compiled = functools.cache(lambda one: small_model.jit(functools.partial(step.train_step, spec=one)))
  for i, (task_name, batch) in enumerate(zip(entry['tasks'], batches)):
    task = sized(task_spec(task_name), batch)
    # As a sampled mixture steps: one task, and every set.
    one = dataclasses.replace(spec, plan=dataclasses.replace(spec.plan, tasks=(task,)).only(task_name))
    state, metrics = compiled(one)(state, {task.group: batch}, sets, jax.random.key(0))
    at = f'step{i}.'
    np.testing.assert_allclose(float(metrics['learning_rate']), arrays[at + 'lr'][0], rtol=BOUND, atol=1e-12)
    assert_close(metrics['grad_norm'], arrays[at + 'grad_norm_before_clip'], BOUND, at + 'gradient norm')
    assert_close(metrics['loss/total'], arrays[at + 'loss'], BOUND, at + 'loss')
    ours = _state_dict(model, state.params, spec)
    for key, theirs in zip(names, arrays[at + 'param_norms'], strict=True):
      assert_close(np.linalg.norm(ours[key].astype(np.float64)), theirs, BOUND, f'{at}norm of {key}')
  ema = _state_dict(model, state.ema_params, spec) if state.ema_params else {}
  for prefix, actual in (('final.', ours), (ema_key + '.', ema)):
    for key in arrays.keys(prefix):
      _compare_final(actual[key.removeprefix(prefix)], arrays[key], key, entry)
  assert not arrays.unread, sorted(arrays.unread)


def _compare_final(ours: np.ndarray, theirs: np.ndarray, key: str, entry) -> None:
  """Parameters after the last step.

  The gradient of a key's bias is zero in exact arithmetic. The rest is rounding, which Adam divides by its own size, so
  key biases are only bounded by the learning rate. The manifest has the distance of the published float32 from float64;
  both sides may have as much.
  """
  if re.search(r'(in_proj_|qkv_proj\.(.*\.)?)bias$', key):
    D = len(theirs) // 3
    assert np.abs(ours[D:2 * D] - theirs[D:2 * D]).max() <= entry['hyper']['base_lr'], key
    ours, theirs = (np.concatenate([x[:D], x[2 * D:]]) for x in (ours, theirs))
  rounding = 2 * entry.get('fp64_check', {}).get('final_param_abs_max', 0.0)
  if np.abs(ours - theirs).max() > rounding:
    assert_close(ours, theirs, BOUND, key)


def _state_dict(model: str, params, spec) -> dict[str, np.ndarray]:
  """Published names; parameters that our tree lacks never had a gradient there, and keep their values."""
  ours, report = torch_layout.to_torch(params, spec.model.spec)
  return {**ours, **{k: fixtures.weights(model)[k] for k in report.made if k not in _ALIASES}}


_ALIASES = ('video_embed.embeddings_norm.weight', 'video_embed.embeddings_norm.bias')


def _compare_groups(entry, spec, rules) -> None:
  """Learning rate and weight decay of every published parameter that our tree has."""
  flat = by_path(rules)
  path_of = {e.key: e.path for e in torch_layout.entries(spec.model.spec)}
  theirs = {g['name']: g for g in _groups(entry)}
  for key, path in path_of.items():
    if flat[path].frozen:
      assert key not in theirs, key
    else:
      group = theirs[key]
      base = entry['hyper']['base_lr']
      assert (flat[path].lr_factor * base, flat[path].weight_decay) == (group['initial_lr'], group['weight_decay']), key
