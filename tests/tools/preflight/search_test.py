"""The search for the largest batch and for a change that fits, on memory that is a formula: nothing is compiled."""

import pathlib

import pytest
from absl import flags
from ml_collections import config_flags

from tests.helpers import small_config
from uni_moe_jax import config
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.parallel import sharding
from uni_moe_jax.tools.preflight import changes, fit
from uni_moe_jax.tools.preflight.compiled_programs import Memory, Program
from uni_moe_jax.tools.preflight.cost import Cost
from uni_moe_jax.tools.preflight.roofline import Roofline, roofline
from uni_moe_jax.tools.preflight.topology import Chip


def _program(total: float, memory: float, says: bool = True) -> Program:
  """As a compiler would give it: none where it does not fit, and perhaps not even how much it would need."""
  if total > memory:
    return Program('train step', 8, None, total if says else None, None, 0.0)
  return Program('train step', 8, Memory(0, 0, 0, 0, total, 0), total, None, 0.0)


def _largest(own: int, bytes_of, memory: float, says: bool = True, fixed: float = 0.0) -> fit.Largest:
  at = lambda examples: _program(bytes_of(examples), memory, says)
  return fit.largest((own, at(own)), fixed, memory, lambda n: n, at)


def test_on_a_straight_line_the_largest_batch_is_found_with_three_compiles():
  # 100 + 7 · 128 = 996 fits 1000, 129 do not.
  found = _largest(4, lambda s: 100 + 7 * s, 1000)
  assert found.examples == 128
  assert found.estimate == pytest.approx(900 / 7)
  assert len(found.tried) <= fit.COMPILES


def test_where_memory_bends_upwards_what_is_told_was_compiled_and_fits():
  bytes_of = lambda s: 100 + 7 * s + 0.05 * s * s
  found = _largest(4, bytes_of, 1000)
  assert bytes_of(found.examples) <= 1000
  assert found.too_large is None or bytes_of(found.too_large) > 1000
  assert found.examples > 60  # of 75
  assert len(found.tried) <= fit.COMPILES


def test_a_config_that_is_too_large_is_searched_downwards():
  found = _largest(64, lambda s: 100 + 20 * s, 1000)
  assert found.examples == 45


def test_without_a_word_how_much_too_large_the_first_guess_is_half():
  found = _largest(64, lambda s: 100 + 20 * s, 1000, says=False)
  assert found.tried[:2] == ((64, None), (32, 740))
  assert found.examples >= 43 and found.too_large > 45


def test_nothing_fits():
  assert _largest(2, lambda s: 5000 + s, 1000).examples == 0


def test_nobody_asks_beyond_many_times_the_batch():
  assert _largest(4, lambda s: 100, 1000).examples <= 64 * 4


def test_at_most_four_programs_are_compiled():
  calls = []
  fit.largest((4, _program(104, 1e9)), 0.0, 1e9, lambda n: n, lambda n: calls.append(n) or _program(100 + n**1.7, 1e9))
  assert len(calls) <= fit.COMPILES - 1


def test_batches_come_in_steps_and_none_is_compiled_twice():
  # 100 + 7 · 128 = 996 fits 1000; there are batches of 50, 100, 150.
  tried = []
  at = lambda n: tried.append(n) or _program(100 + 7 * (50 * round(n / 50)), 1000)
  found = fit.largest((50, _program(450, 1000)), 0.0, 1000, lambda n: 50 * round(n / 50), at)
  assert [n for n, _ in found.tried] == [50, 100, 150]
  assert (found.examples, found.too_large) == (100, 150)
  assert len(tried) == 2


def test_the_search_ends_where_there_is_no_time():
  found = fit.largest((4, _program(128, 1000)), 100.0, 1000, lambda n: n, lambda n: pytest.fail('compiled'), lambda: False)
  assert found.examples == 4 and found.estimate == pytest.approx(900 / 7)


def test_batches_of_another_size_are_near_it_and_such_as_the_mesh_takes():
  c = small_config.config()  # 8, 4, 4, 4 and 4 examples, on two shards
  sizes = lambda c: {n: t.batch_size for n, t in c.tasks.items()}
  assert fit.examples(c, 2, c.tasks) == 12 and fit.examples(c, 2, ['shape']) == 4
  assert sizes(fit.scaled(c, 2, 1.5)) == dict(shape=12, text=6, name=6, pair=6, package=6)
  assert sizes(fit.scaled(c, 2, 0.2)) == dict(shape=2, text=2, name=2, pair=2, package=2)
  c.tasks.shape.mixup_alpha = 0.8
  assert fit.unit(c, 'shape', 2) == 4 and fit.unit(c, 'text', 2) == 2
  assert sizes(fit.scaled(c, 2, 0.7)) == dict(shape=4, text=2, name=2, pair=2, package=2)
  c.train.grad_accum_steps = 2
  assert fit.unit(c, 'text', 2) == 4
  assert c.tasks.text.batch_size == 4  # copies, all of them


_MESH = dict(replica=1, data=8, expert=1, model=1)


def _config():
  c = small_config.config()
  c.model.update(dict(remat=False))
  for t in c.tasks.values():
    t.batch_size = 64
  return c


def test_changes_come_from_cheap_to_dear_and_only_where_they_can_be_made():
  flags = [c.flags for c in changes.candidates(_config(), _MESH)]
  assert flags == [
      '--config.model.remat=True', '--config.model.dtype=bfloat16', '--config.mesh.fsdp=True', '--config.mesh.expert=8',
      '--config.train.grad_accum_steps=2', '--config.mesh.model=2',
      ' '.join(f'--config.tasks.{n}.batch_size=32' for n in ('name', 'package', 'pair', 'shape', 'text'))]
  c = _config()
  c.model.update(dict(remat=True, dtype='bfloat16', num_heads=3))
  c.mesh.fsdp, c.moe.router = True, 'dense'
  for t in c.tasks.values():
    t.batch_size = 8
  assert not list(changes.candidates(c, _MESH))
  c.tasks.shape.batch_size = 16  # one that can be halved is halved
  assert [x.flags for x in changes.candidates(c, _MESH)] == ['--config.tasks.shape.batch_size=8']


def test_a_mesh_of_fixed_sizes_gives_up_some_of_its_data_axis():
  c = _config()
  c.mesh.data = 8
  assert '--config.mesh.data=-1 --config.mesh.expert=8' in [x.flags for x in changes.candidates(c, _MESH)]


def test_where_another_axis_is_inferred_the_data_axis_gives_nothing():
  c = _config()
  c.mesh.update(dict(replica=-1, data=8))
  assert not [x.flags for x in changes.candidates(c, _MESH) if 'mesh.data' in x.flags or 'mesh.expert' in x.flags]


def _typed(file: str, *arguments: str):
  """The config of a command line."""
  argv, values = ['launch/train.py', f'--config={file}', *arguments], flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv, lock_config=False)
  values(argv)
  return values.config


@pytest.mark.parametrize('arg', ['large-token-1', 'base-attribute-1', 'base-attribute-2-sampled'])
def test_every_change_of_a_published_config_is_a_config_that_can_be_typed(arg):
  """Also those whose smallest tasks have one example a device: others can be fewer."""
  file = f'{pathlib.Path(__file__).parents[3]}/configs/pretrain.py:{arg}'
  c = _typed(file)
  mesh = dict(replica=1, data=256, expert=1, model=1)
  found = [x for evaluation in (False, True) for x in changes.candidates(c, mesh, evaluation)]
  assert {'tasks', 'evaluators'} <= {name.split('.')[0] for x in found for name, _ in x.fields}
  for change in found:
    changed = change.apply(c)
    assert _typed(file, *change.flags.split(' ')) == changed
    mesh = sharding.mesh_shape({a: changed.mesh[a] for a in sharding.AXES}, 256)
    shards = mesh['replica'] * mesh['data'] * mesh['expert']
    make_plan(changed).check_batches(shards, changed.train.grad_accum_steps)


def test_an_evaluation_that_does_not_fit_is_asked_less_at_once():
  c = _config()
  c.evaluators.shape = config.evaluator('classification', 'shape', split='test', batch_size=64)
  first = next(changes.candidates(c, _MESH, evaluation=True))
  assert first.flags == '--config.evaluators.shape.batch_size=32'
  assert not [x for x in changes.candidates(c, _MESH, evaluation=True) if 'remat' in x.flags or 'tasks' in x.flags]
  assert not [x for x in changes.candidates(c, _MESH) if 'evaluators' in x.flags]


def test_an_evaluator_that_no_flag_can_name_is_changed_in_the_config_file():
  c = _config()
  for name in ('shape', 'class, held out', 'masked words'):
    c.evaluators[name] = config.evaluator('classification', 'shape', split='test', batch_size=64)
  first = next(changes.candidates(c, _MESH, evaluation=True))
  assert first.flags == ("--config.evaluators.shape.batch_size=32, in the config file: config.evaluators['class, held out'].batch_size = 32; "
                         "config.evaluators['masked words'].batch_size = 32")
  assert {e.batch_size for e in first.apply(c).evaluators.values()} == {32}


def _need(c) -> float:
  """State 400, activations 1000 at 64 examples."""
  state = 400 / (8 if c.mesh.fsdp else 1)
  activations = 1000 * (0.5 if c.model.remat else 1) * (0.6 if c.model.dtype == 'bfloat16' else 1)
  return state + activations / c.train.grad_accum_steps * c.tasks.shape.batch_size / 64


def _cheapest(memory: float) -> list[changes.Trial]:
  state = lambda c: 400 / (8 if c.mesh.fsdp else 1)
  return changes.cheapest(_config(), _need(_config()), lambda c: _MESH, state, memory,
                          lambda c: (_need(c), '' if _need(c) <= memory else 'train step'))


def test_the_first_change_that_fits_ends_the_search():
  trials = _cheapest(950)  # 400 + 500 with remat
  assert [[c.flags for c in t.changes] for t in trials] == [['--config.model.remat=True']]
  assert trials[-1].fits and trials[-1].needs == 900


def test_where_one_change_is_not_enough_several_are_made_together():
  trials = _cheapest(450)  # 400 / 8 + 1000 · 0.5 · 0.6 = 350
  assert trials[-1].fits
  assert [c.flags for c in trials[-1].changes] == [
      '--config.model.remat=True', '--config.model.dtype=bfloat16', '--config.mesh.fsdp=True']


def test_a_train_state_that_is_too_large_is_not_compiled_in_vain():
  trials = _cheapest(390)  # the state alone is 400
  assert all(any('fsdp' in c.flags for c in t.changes) for t in trials)
  assert trials[-1].fits


def test_that_nothing_fits_is_an_answer():
  trials = _cheapest(10)
  assert not trials or not trials[-1].fits


def test_a_roofline_is_the_longest_of_three_times():
  chip = Chip(memory=1, flops=100, hbm=10, links=2, source='')
  work = Cost(flops=300, bytes=50, sent={'all-reduce': 4, 'all-gather': 8})
  found = roofline(work, chip)
  assert found == Roofline(compute=3, memory=5, interconnect=6)
  assert (found.seconds, found.bound) == (6, 'interconnect')
  assert roofline(work, Chip(None, None, None, None, '')) is None
