"""Changes of a config and the search for one that fits, with memory by a formula: nothing is compiled."""

import dataclasses
import math
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from tests.helpers import small_config
from tests.helpers.processes import ROOT
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.parallel import sharding
from uni_moe_jax.preflight import compiled_programs, findings, preflight, remedies, topology
from uni_moe_jax.preflight.compiled_programs import EVALUATION, Compiler, Memory, Program
from uni_moe_jax.preflight.cost import Cost

_MESH = dict(replica=1, data=8, expert=1, model=1)
_STEP = None  # of all tasks
_HALF_BATCHES = ' '.join(f'--config.tasks.{n}.batch_size=32' for n in ('name', 'package', 'pair', 'shape', 'text'))


def _config(evaluator: bool = False, **model):
  c = small_config.config()
  c.model.update(dict(remat=False) | model)
  for t in c.tasks.values():
    t.batch_size = 64
  if evaluator:
    c.evaluators.shape = config_lib.evaluator('classification', 'shape', split='test', batch_size=128)
  return c


def _flags(config, evaluation: bool = False) -> list[str]:
  return [remedies.as_flags(c.fields.items()) for c in remedies.candidates(config, _MESH, evaluation)]


def test_changes_are_ordered_by_cost_and_offered_only_where_they_are_possible():
  assert _flags(_config()) == [
      '--config.model.remat=True', '--config.model.dtype=bfloat16', '--config.mesh.fsdp=True', '--config.mesh.expert=8',
      '--config.train.grad_accum_steps=2', '--config.mesh.model=2', _HALF_BATCHES]
  c = _config(remat=True, dtype='bfloat16', num_heads=3)
  c.mesh.fsdp, c.moe.router = True, 'dense'
  for t in c.tasks.values():
    t.batch_size = 8
  assert not _flags(c)
  c.tasks.shape.batch_size = 16  # the only one that can be halved
  assert _flags(c) == ['--config.tasks.shape.batch_size=8']


def test_a_new_axis_takes_devices_from_a_fixed_data_axis_but_not_beside_another_inferred_axis():
  c = _config()
  c.mesh.data = 8
  assert '--config.mesh.data=-1 --config.mesh.expert=8' in _flags(c)
  c.mesh.replica = -1
  assert not [f for f in _flags(c) if 'mesh.data' in f or 'mesh.expert' in f]


def test_evaluation_that_does_not_fit_gets_a_smaller_batch_and_no_change_of_training():
  c = _config(evaluator=True)
  assert _flags(c, evaluation=True)[0] == '--config.evaluators.shape.batch_size=64'
  assert not [f for f in _flags(c, evaluation=True) if 'remat' in f or 'tasks' in f]
  assert not [f for f in _flags(c) if 'evaluators' in f]


def test_an_evaluator_whose_name_no_flag_can_have_is_changed_in_the_config_file():
  c = _config()
  for name in ('shape', 'class, held out', 'masked words'):
    c.evaluators[name] = config_lib.evaluator('classification', 'shape', split='test', batch_size=64)
  change = next(remedies.candidates(c, _MESH, evaluation=True))
  assert remedies.as_flags(change.fields.items()) == (
      '--config.evaluators.shape.batch_size=32, in the config file: '
      "config.evaluators['class, held out'].batch_size = 32; config.evaluators['masked words'].batch_size = 32")
  assert {e.batch_size for e in change.apply(c).evaluators.values()} == {32}


def _parse(file: str, *arguments: str):
  """The config of a command line."""
  argv, values = ['launch/train.py', f'--config={file}', *arguments], flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv, lock_config=False)
  values(argv)
  return values.config


@pytest.mark.parametrize('arg', ['size=large,router=token', 'size=base', 'size=base,stage=2,mixture=one_task'])
def test_the_flags_of_every_change_of_a_published_config_give_the_changed_config(arg):
  """Even if the smallest tasks have one example per device: the batches of the others can be halved."""
  file = f'{ROOT}/configs/pretrain.py:{arg}'
  c, mesh = _parse(file), {**_MESH, 'data': 256}
  changes = [change for evaluation in (False, True) for change in remedies.candidates(c, mesh, evaluation)]
  assert {'tasks', 'evaluators'} <= {name.split('.')[0] for change in changes for name in change.names}
  for change in changes:
    changed = change.apply(c)
    assert _parse(file, *remedies.as_flags(change.fields.items()).split(' ')) == changed
    mesh = sharding.mesh_shape({a: changed.mesh[a] for a in sharding.AXES}, 256)
    shards = mesh['replica'] * mesh['data'] * mesh['expert']
    make_plan(changed).check_batches(shards, changed.train.grad_accum_steps)


def test_scaled_batches_are_near_the_factor_and_valid_on_the_mesh():
  c = small_config.config()  # 8, 4, 4, 4 and 4 examples, on two shards
  sizes = lambda c: {n: t.batch_size for n, t in c.tasks.items()}
  assert sizes(remedies.scale_batches(c, 2, 1.5)) == dict(shape=12, text=6, name=6, pair=6, package=6)
  assert sizes(remedies.scale_batches(c, 2, 0.2)) == dict(shape=2, text=2, name=2, pair=2, package=2)
  c.tasks.shape.mixup_alpha = 0.8
  assert remedies.batch_unit(c, 'shape', 2) == 4 and remedies.batch_unit(c, 'text', 2) == 2
  assert sizes(remedies.scale_batches(c, 2, 0.7)) == dict(shape=4, text=2, name=2, pair=2, package=2)
  c.train.grad_accum_steps = 2
  assert remedies.batch_unit(c, 'text', 2) == 4
  assert c.tasks.text.batch_size == 4  # the scaled ones are copies


class _Compiler(Compiler):
  """A compiler for eight devices whose programs need memory by a formula of (which program, config).

  A program that does not fit is refused, and its need is reported unless the formula gives None.
  """

  def __init__(self, needs, memory: float, state=lambda c: 0.0):
    super().__init__(None, range(8), lambda _: None, math.inf)
    self._needs, self._memory, self._state, self.compiled = needs, memory, state, []

  def run(self, config):
    return config

  def state_bytes(self, config):
    return self._state(config)

  def program(self, config, which, note=''):
    with mock.patch.object(compiled_programs, 'compile_program', self._compile):
      return super().program(config, which, note)

  def _compile(self, config, which, topology):
    self.compiled.append(which)
    return _program(which, self._needs(which, config), self._memory)


def _program(which, needs: float | None, memory: float) -> Program:
  name = {EVALUATION: 'evaluation, mlm', _STEP: 'train step'}.get(which, f'train step, {which}')
  fits = needs is not None and needs <= memory
  return Program(name, 8, Memory(0, 0, 0, 0, needs, 0) if fits else None, needs, None, 0.0)


def _search(needs, config, steps=(_STEP,), memory=600, expired: bool = False, **kwargs):
  """(trials as (flags, program that is too large), programs that the search compiled, all trials)."""
  compiler = _Compiler(needs, memory, **kwargs)
  programs = {which: compiler.program(config, which) for which in (*steps, EVALUATION)}
  compiler.compiled.clear()
  if expired:
    compiler._deadline = -math.inf
  trials = remedies.search(compiler, config, programs, memory)
  return [(t.flags, t.too_large) for t in trials], compiler.compiled, trials


def test_evaluation_is_compiled_with_the_change_that_a_step_needs():
  needs = lambda which, c: 100 if which == EVALUATION else 500 if c.model.remat else 1000
  trials, compiled, _ = _search(needs, _config(dtype='bfloat16', evaluator=True))
  assert trials == [('--config.model.remat=True', '')]
  assert compiled == [_STEP, EVALUATION]


def test_evaluation_that_a_change_makes_too_large_is_changed_too():
  def needs(which, c):
    if which == EVALUATION:
      return (1000 if c.mesh.fsdp else 500) * c.evaluators.shape.batch_size / 128
    return 500 if c.mesh.fsdp else 1000
  trials, compiled, objects = _search(needs, _config(dtype='bfloat16', remat=True, evaluator=True))
  fsdp = '--config.mesh.fsdp=True'
  assert trials == [(fsdp, 'evaluation, mlm'), (f'{fsdp} --config.evaluators.shape.batch_size=64', '')]
  assert compiled == [_STEP, EVALUATION, EVALUATION]  # a step does not depend on evaluators
  assert objects[-1].needs == 500


def test_the_batch_of_an_evaluator_is_halved_repeatedly():
  def needs(which, c):
    if which == EVALUATION:
      return 500 if c.mesh.fsdp else 4000 * c.evaluators.shape.batch_size / 128
    return 700 if c.mesh.fsdp else 100
  trials, _, _ = _search(needs, _config(dtype='bfloat16', remat=True, evaluator=True))
  assert ('--config.mesh.fsdp=True', 'train step') in trials
  assert trials[-1] == ('--config.evaluators.shape.batch_size=16', '')


def test_a_change_that_saves_nothing_is_not_combined():
  """The batch of evaluators, where a target set needs more memory."""
  needs = lambda which, c: 100 if which == _STEP else 2000 / (2 if c.mesh.fsdp else 1) / (2 if c.mesh.expert > 1 else 1)
  trials, _, _ = _search(needs, _config(dtype='bfloat16', remat=True, evaluator=True))
  assert trials[0] == ('--config.evaluators.shape.batch_size=64', 'evaluation, mlm')
  assert trials[-1] == ('--config.mesh.fsdp=True --config.mesh.expert=8', '')


def test_every_step_that_did_not_fit_has_to_fit():
  def needs(which, c):
    if which == EVALUATION:
      return 100
    own = dict(shape=1000, text=900, pair=500)[which]
    return own * (0.5 if c.model.remat and which != 'text' else 1) * (0.6 if c.mesh.fsdp else 1)
  trials, compiled, _ = _search(needs, _config(dtype='bfloat16', evaluator=True), ('pair', 'text', 'shape'))
  assert trials == [('--config.model.remat=True', 'train step, text'), ('--config.mesh.fsdp=True', '')]
  # The largest first; the one that did fit is not compiled again.
  assert compiled == ['shape', 'text', 'shape', 'text', EVALUATION]


def test_a_change_that_evaluation_needs_must_keep_the_step_small_enough():
  def needs(which, c):
    if which == EVALUATION:
      return 500 if c.mesh.fsdp or c.mesh.expert > 1 else 1000
    return 700 if c.mesh.fsdp else 550
  trials, _, _ = _search(needs, _config(dtype='bfloat16', remat=True))
  assert trials == [('--config.mesh.fsdp=True', 'train step'), ('--config.mesh.expert=8', '')]


def test_if_nothing_fits_every_trial_names_the_program():
  needs = lambda which, c: 100 if which == EVALUATION else 1000
  trials, _, objects = _search(needs, _config(dtype='bfloat16', evaluator=True))
  assert trials and all(too_large == 'train step' for _, too_large in trials)
  assert not any(t.fits for t in objects)


def test_without_time_nothing_is_compiled():
  trials, compiled, _ = _search(lambda which, c: 1000, _config(evaluator=True), expired=True)
  assert (compiled, trials) == ([], [])


def _state(c) -> float:
  return 400 / (8 if c.mesh.fsdp else 1)


def _with_state(which, c) -> float:
  """State 400, activations 1000 at 64 examples; evaluation always fits."""
  activations = 1000 * (0.5 if c.model.remat else 1) * (0.6 if c.model.dtype == 'bfloat16' else 1)
  step = _state(c) + activations / c.train.grad_accum_steps * c.tasks.shape.batch_size / 64
  return 0.0 if which == EVALUATION else step


def test_the_first_change_that_fits_ends_the_search_and_several_are_combined_if_one_is_not_enough():
  trials, _, objects = _search(_with_state, _config(), memory=950, state=_state)  # 400 + 500 with remat
  assert trials == [('--config.model.remat=True', '')]
  assert objects[-1].fits and objects[-1].needs == 900
  trials, _, _ = _search(_with_state, _config(), memory=450, state=_state)  # 400 / 8 + 1000 · 0.5 · 0.6 = 350
  assert trials[-1] == ('--config.model.remat=True --config.model.dtype=bfloat16 --config.mesh.fsdp=True', '')


def test_nothing_is_compiled_whose_train_state_alone_is_too_large():
  trials, _, _ = _search(_with_state, _config(), memory=390, state=_state)  # the state without FSDP is 400
  assert all('fsdp' in changed for changed, _ in trials)
  assert trials[-1][1] == ''
  _, compiled, trials = _search(_with_state, _config(), memory=10, state=_state)  # with FSDP it is 50
  assert (compiled, trials) == ([], ())


@pytest.mark.parametrize('needs, first', [
    (dict(a=500, b=550, c=100), 'b'), (dict(a=700, b=550, c=900), 'c'), (dict(a=700, b=None, c=900), 'b')])
def test_steps_are_ordered_by_need_and_an_unknown_one_is_first(needs, first):
  programs = {which: _program(which, n, 600) for which, n in {**needs, EVALUATION: 2000}.items()}
  order = remedies.steps_by_need(programs, 600)
  assert order[0] == first and sorted(order) == ['a', 'b', 'c']


_CHIP = topology.Chip(memory=600, flops=1.0, hbm=1.0, links=1.0, source='')  # seconds are FLOPs, or bytes


def _compare(config, expired: bool = False, chip=_CHIP, **costs: tuple[float, float]):
  """(comparison, programs that it compiled); costs: (FLOPs, bytes) of steps. FSDP halves the bytes."""
  class WithCosts(_Compiler):
    def _compile(self, config, which, topology):
      flops, moved = costs.get(which, (0, 1e6))  # evaluation, which is not compared
      cost = Cost(bfloat16_flops=flops, bytes=moved / (2 if config.mesh.fsdp else 1))
      return dataclasses.replace(super()._compile(config, which, topology), cost=cost)
  compiler = WithCosts(lambda which, c: 1, 600)
  programs = {which: compiler.program(config, which) for which in (*costs, EVALUATION)}
  compiler.compiled.clear()
  if expired:
    compiler._deadline = -math.inf
  return remedies.compare_fsdp(compiler, config, programs, chip), compiler.compiled


def test_where_memory_traffic_bounds_the_slowest_step_it_is_compiled_with_fsdp():
  comparison, compiled = _compare(_config(), shape=(3, 8), text=(5, 6))
  assert compiled == ['shape']
  assert (comparison.step, comparison.before.seconds, comparison.after.seconds) == ('train step, shape', 8, 4)
  result = findings.Findings('own', topology.parse('v5e:2x4'), _MESH, 8, 600, dict(total=1, active=1), (), (), 1.0,
                            comparison=comparison)
  assert ('Memory traffic bounds train step, shape. With --config.mesh.fsdp=True its roofline is 4000.0 instead of '
          '8000.0 ms (parameters are gathered in every layer).') in findings.render(result)
  as_json = findings.as_json(result)['comparison']
  assert as_json['flags'] == '--config.mesh.fsdp=True' and as_json['after']['memory'] == 4


@pytest.mark.parametrize('change, kwargs', [
    ({}, dict(text=(9, 6))),  # products bound the slowest step
    ({'mesh.fsdp': True}, {}), ({'model.width': 30, 'model.num_heads': 3}, {}),  # 8 devices do not divide it
    ({}, dict(expired=True)), ({}, dict(chip=topology.CHIPS['cpu']))])
def test_fsdp_is_not_compiled_where_it_is_set_impossible_or_no_help(change, kwargs):
  config = _config()
  config.update_from_flattened_dict(change)
  assert _compare(config, **{'shape': (3, 8), **kwargs}) == (None, [])


def _estimate(needs, memory: float, config=None):
  """The estimated largest batch of a mixed step of `needs` bytes by examples per device."""
  config = config or _config()
  examples = lambda c: sum(t.batch_size for t in c.tasks.values()) // 8
  compiler = _Compiler(lambda which, c: needs(examples(c)), memory)
  compiler.program(config, _STEP)
  return preflight.estimate_largest_batch(compiler, config, _STEP, memory)


@pytest.mark.parametrize('memory, compiled, examples', [
    (1000, ((40, 380), (80, 660)), 900 / 7), (300, ((40, 380), (20, 240)), 200 / 7)])
def test_the_largest_batch_is_estimated_by_a_line_through_twice_the_batch_or_half_of_it(memory, compiled, examples):
  estimate = _estimate(lambda n: 100 + 7 * n, memory)  # own batch: 5 · 64 examples on 8 devices, 380 bytes
  assert estimate.compiled == compiled
  assert estimate.examples == pytest.approx(examples)


def test_the_largest_batch_is_not_estimated_without_two_batches_and_their_needs():
  assert _estimate(lambda n: 100, 1000) is None  # memory does not grow
  assert _estimate(lambda n: None if n > 40 else 100, 1000) is None
  smallest = _config()
  for t in smallest.tasks.values():
    t.batch_size = 8
  assert _estimate(lambda n: 2000, 1000, smallest) is None
