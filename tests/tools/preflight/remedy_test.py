"""A change with which every program fits, on memory that is a formula: nothing is compiled."""

import pytest

from tests.helpers import small_config
from uni_moe_jax import config as config_lib
from uni_moe_jax.tools.preflight import remedy
from uni_moe_jax.tools.preflight.compiled_programs import EVALUATION, Memory, Program

_MEMORY = 600
_STEP = None  # of a mixed mixture


def _program(which, needs: float | None) -> Program:
  """As a compiler would give it: none where it does not fit."""
  fits = needs is not None and needs <= _MEMORY
  name = {EVALUATION: 'evaluation', _STEP: 'train step'}.get(which, f'train step, {which}')
  return Program(name, 8, Memory(0, 0, 0, 0, needs, 0) if fits else None, needs, None, 0.0)


class _Compiler:
  """Stands for `Compiler`: needs are a function of (which program, config)."""

  def __init__(self, needs, has_time: bool = True):
    self._needs, self._has_time = needs, has_time
    self.compiled = []

  def prepare(self, config):
    return config

  def program(self, config, which, words=''):
    self.compiled.append(which)
    return _program(which, self._needs(which, config))

  def has_time(self, which):
    return self._has_time

  def mesh(self, config):
    return dict(replica=1, data=8, expert=1, model=1)

  def state(self, config):
    return 0.0


def _config(remat: bool = False, evaluator: bool = True):
  c = small_config.config()
  c.model.update(dict(remat=remat, dtype='bfloat16'))
  for t in c.tasks.values():
    t.batch_size = 64
  if evaluator:
    c.evaluators.shape = config_lib.evaluator('classification', 'shape', split='test', batch_size=128)
  return c


def _find(needs, config, which=(_STEP,), has_time: bool = True):
  compiler = _Compiler(needs, has_time)
  made = {w: _program(w, needs(w, config)) for w in (*which, EVALUATION)}
  found = remedy.find(compiler, config, made, _MEMORY)
  return found, compiler.compiled, [(' '.join(c.flags for c in t.changes), t.lacks) for t in found.trials]


def test_evaluation_is_compiled_with_the_change_that_a_step_needs():
  needs = lambda which, c: 100 if which == EVALUATION else 500 if c.model.remat else 1000
  found, compiled, trials = _find(needs, _config())
  assert trials == [('--config.model.remat=True', '')]
  assert compiled == [_STEP, EVALUATION]
  assert found.config.model.remat and found.programs[_STEP].needs == 500


def test_an_evaluation_that_the_change_makes_too_large_is_changed_too():
  def needs(which, c):
    if which == EVALUATION:
      return (1000 if c.mesh.fsdp else 500) * c.evaluators.shape.batch_size / 128
    return 500 if c.mesh.fsdp else 1000
  found, compiled, trials = _find(needs, _config(remat=True))
  fsdp = '--config.mesh.fsdp=True'
  assert trials == [(fsdp, 'evaluation'), (f'{fsdp} --config.evaluators.shape.batch_size=64', '')]
  assert compiled == [_STEP, EVALUATION, EVALUATION]  # of an evaluator a step knows nothing
  assert found.config.mesh.fsdp and found.config.evaluators.shape.batch_size == 64
  assert (found.programs[_STEP].needs, found.programs[EVALUATION].needs) == (500, 500)


def test_a_batch_of_an_evaluator_is_halved_as_often_as_it_needs():
  def needs(which, c):
    if which == EVALUATION:
      return 500 if c.mesh.fsdp else 4000 * c.evaluators.shape.batch_size / 128
    return 700 if c.mesh.fsdp else 100
  found, _, trials = _find(needs, _config(remat=True))
  assert ('--config.mesh.fsdp=True', 'train step') in trials
  assert trials[-1] == ('--config.evaluators.shape.batch_size=16', '')
  assert found.config.evaluators.shape.batch_size == 16
  assert found.programs[_STEP].needs == 100  # and not that of a change that was not made


def test_what_saves_nothing_is_no_part_of_several_changes():
  """The batch of evaluators, where a target set needs more memory."""
  needs = lambda which, c: 100 if which == _STEP else 2000 / (2 if c.mesh.fsdp else 1) / (2 if c.mesh.expert > 1 else 1)
  _, _, trials = _find(needs, _config(remat=True))
  assert trials[0] == ('--config.evaluators.shape.batch_size=64', 'evaluation')
  assert trials[-1] == ('--config.mesh.fsdp=True --config.mesh.expert=8', '')


def test_every_step_that_did_not_fit_has_to_fit():
  def needs(which, c):
    if which == EVALUATION:
      return 100
    whole = dict(shape=1000, text=900, pair=500)[which]
    return whole * (0.5 if c.model.remat and which != 'text' else 1) * (0.6 if c.mesh.fsdp else 1)
  found, compiled, trials = _find(needs, _config(), ('pair', 'text', 'shape'))
  assert trials == [('--config.model.remat=True', 'train step, text'), ('--config.mesh.fsdp=True', '')]
  assert compiled == ['shape', 'text', 'shape', 'text', EVALUATION]  # the worst first; one that fitted is not asked again
  assert found.programs['text'].needs == 540


def test_a_change_that_evaluation_needs_must_leave_the_step_room():
  def needs(which, c):
    if which == EVALUATION:
      return 500 if c.mesh.fsdp or c.mesh.expert > 1 else 1000
    return 700 if c.mesh.fsdp else 550
  found, compiled, trials = _find(needs, _config(remat=True, evaluator=False))
  assert trials == [('--config.mesh.fsdp=True', 'train step'), ('--config.mesh.expert=8', '')]
  assert found.programs[_STEP].needs == 550


def test_where_nothing_fits_all_is_as_it_was():
  needs = lambda which, c: 100 if which == EVALUATION else 1000
  found, _, trials = _find(needs, _config())
  assert all(lacks == 'train step' for _, lacks in trials)
  assert not found.config.model.remat and found.programs[_STEP].needs == 1000


def test_without_time_nothing_is_compiled():
  found, compiled, trials = _find(lambda which, c: 1000, _config(), has_time=False)
  assert (compiled, trials) == ([], [])


@pytest.mark.parametrize('needs, worst', [
    (dict(a=500, b=550, c=100), 'b'), (dict(a=700, b=550, c=900), 'c'), (dict(a=700, b=None, c=900), 'b')])
def test_the_worst_step_needs_most_or_nobody_knows_how_much(needs, worst):
  made = {which: _program(which, n) for which, n in {**needs, EVALUATION: 2000}.items()}
  order = remedy.steps(made, _MEMORY)
  assert order[0] == worst and sorted(order) == ['a', 'b', 'c']
