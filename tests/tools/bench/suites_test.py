"""Suites are chosen by name. Every suite runs at the smallest sizes and returns its rows; no time is judged."""

import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches import in_flight
from uni_moe_jax.tasks import router_names
from uni_moe_jax.tools.bench import (
    caption_rate,
    cases,
    input_rate,
    results_table,
    settings,
    suites,
    timing,
    training_steps,
)

_SIZES = settings.Sizes(
    rounds=1, num_layers=1, width=16, num_heads=2, mlp_dim=16, image_size=16, patch_size=8, experts=2, batch_size=4,
    small_batch=2, names=20, name_tokens=4, vocabulary=30, words=3, gemm=16, compiled_layers=(1, 2), steps=1, files=4,
    mixed_routers=('dense', 'task'), reduced=True)


def _config():
  return tiny.config('shape', 'motion', 'pair', data_dir=tiny.data_dir())


def _texts():
  return tiny.config('package', data_dir=tiny.data_dir())


@functools.cache
def _context() -> cases.Context:
  return cases.Context(_SIZES, None, 'float32', 1e9, jax.devices()[:1])


@functools.cache
def _measure(suite: str, dtype: str):
  with mock.patch.multiple(in_flight, num_in_flight=lambda: 1, num_together=lambda *_: 1):  # few batches are skipped
    header, rows = suites.measure(suite, _SIZES, _config(), dtype)
  assert header['dtype of products'] == dtype
  rate, *own = rows
  assert {r.suite for r in rows} == {suite} and rate.name == 'GEMM 16 x 16 x 16'
  return {r.name: r for r in own}


_slow, _nightly = (functools.partial(pytest.param, marks=m) for m in (pytest.mark.slow, pytest.mark.nightly))


@pytest.mark.parametrize('names, suites_in_order', [
    ([], settings.SUITES), (['compile', 'mixed', 'routers', 'mixed'], ('routers', 'mixed', 'compile')),
    (['routers', 'gpu'], ('gpu', 'routers'))])
def test_chosen_suites_are_in_order_with_compile_last_and_all_but_gpu_are_the_default(names, suites_in_order):
  assert settings.choose(names) == suites_in_order


def test_an_unknown_name_is_reported_with_the_nearest():
  with pytest.raises(ValueError, match="--suites: 'decodin' is unknown; did you mean 'decoding'"):
    settings.choose(['routers', 'decodin'])


def test_every_suite_has_a_function_every_router_a_case_and_only_the_quick_benchmark_is_reduced():
  assert set(router_names.ROUTERS) <= set(training_steps.router_cases())
  assert tuple(suites.SUITE_FUNCTIONS) == (*settings.SUITES, settings.GPU)
  assert set(settings.FROM_CONFIG) <= set(settings.SUITES)
  assert settings.QUICK.reduced and not settings.FULL.reduced


@pytest.mark.parametrize('suite, dtype', [
    ('decoding', 'float32'), _nightly('decoding', 'bfloat16'), _slow('files', 'float32'), _nightly('input', 'float32'),
    _nightly('mixed', 'float32'), _nightly('published', 'float32'), _nightly('compile', 'float32'),
    _nightly('routers', 'float32')])
def test_every_figure_is_finite_and_has_a_unit_and_a_note(suite, dtype):
  rows = _measure(suite, dtype)
  assert rows
  for row in rows.values():
    assert math.isfinite(row.figure.value), row
    assert row.unit and row.note, row


@pytest.mark.nightly
def test_every_router_is_compared_with_dense_in_both_modes_and_has_a_budget():
  rows = _measure('routers', 'float32')
  routers = (*router_names.MERGED, *router_names.DISPATCHED)
  assert rows.keys() >= {f'{router} / dense, {mode}' for router in routers for mode in ('train', 'inference')}
  assert str(rows['task / dense, train'].budget) == '<= 1.04 (1.02)'
  assert str(rows['token / dense, inference'].budget) == '<= 2.1 (1.9)'
  assert rows['context / token, train'].figure.value == pytest.approx(
      rows['context / dense, train'].figure.value / rows['token / dense, train'].figure.value, rel=0.5)
  assert str(_measure('mixed', 'float32')['task / dense'].budget) == '<= 1.15 (1.05)'


@pytest.mark.nightly
def test_the_recorded_seconds_are_scaled_by_the_peak():
  # At twice the recorded rate the published code would take half: 1.55 s.
  context = dataclasses.replace(_context(), peak=2 * 195e9)
  rows = {r.name: r for r in training_steps.published(context)}
  seconds = rows['train step, all names 4 tokens'].figure.value
  assert rows["all names 4 tokens / the published code's"].figure.value == pytest.approx(seconds / 1.55)


def test_tasks_without_images_and_videos_have_no_rate_of_the_pipeline():
  mixture = mock.Mock(num_ahead=lambda _: 1, iterate=lambda *_: ((None, {}) for _ in range(9)))
  step = mock.Mock(return_value=np.zeros(()), run=mock.Mock(plan=make_plan(_texts()), mixture=lambda: mixture))
  with mock.patch.object(input_rate, 'RepeatedStep', lambda _: step):
    rows = input_rate.input_rate(mock.Mock(sizes=_SIZES, own_config=_texts))
  assert [row.name for row in rows] == ['constant-batch step', 'real-data step / constant-batch step']


def test_every_router_takes_a_config_of_token_routing_and_token_routers_keep_its_fields():
  c, fields = _config(), dict(
      capacity_factor=1.5, balance_loss_weight=.1, importance_loss_weight=.2, z_loss_weight=.3, experts_per_condition=2)
  c.moe.update(dict(fields, router='token'))
  context = dataclasses.replace(_context(), config=c)
  for router in router_names.ROUTERS:
    made = training_steps.with_router(context.own_config(), router)
    make_plan(made)  # it is valid
    kept = router in router_names.DISPATCHED
    assert {name: made.moe[name] for name in fields} == (fields if kept else dict.fromkeys(fields, 0)), router
  assert c.moe.capacity_factor == 1.5


def test_the_rows_of_a_suite_are_printed_when_it_ends_so_that_they_survive_a_failure_of_the_next(capsys):
  row = results_table.Row('routers', 'dense train step', timing.Estimate(0.25), 's', note='on random data')
  with mock.patch.dict(suites.SUITE_FUNCTIONS, routers=lambda _: [row]):
    suites.measure('routers', _SIZES, _config(), 'float32')
  out, err = capsys.readouterr()
  assert not out and re.search('routers +dense train step +0.250 +s', err) and '[2] on random data' in err


@pytest.mark.nightly
def test_images_and_videos_are_counted_separately():
  assert {r.name: r.unit for r in _measure('input', 'float32').values() if r.unit.endswith('/s')} == {
      'shape, batches of 8': 'images/s', 'motion, batches of 4': 'videos/s', 'pair, batches of 4': 'images/s'}


@pytest.mark.slow
def test_files_are_counted_by_type_and_images_beside_the_same_work_by_hand():
  rows, types = _measure('files', 'float32'), [t.name for t in input_rate._FILE_TYPES.values()]
  types.insert(1, f"{types[0]}, resize='pillow'")
  assert [(name, row.unit) for name, row in rows.items() if name in types] == list(
      zip(types, ('images/s', 'images/s', 'images/s', 'videos/s'), strict=True))
  *images, _ = types
  for name in images:
    assert rows[f'{name} / by hand'].unit == 'x' and rows[f'{name}: by hand'].unit == rows[name].unit
  assert rows.keys() == {*types, *(f'{name}{suffix}' for name in images for suffix in (': by hand', ' / by hand'))}


@pytest.mark.nightly
def test_the_compilation_cache_is_enabled_again_afterwards():
  before = jax.config.jax_enable_compilation_cache
  _measure('compile', 'float32')
  assert jax.config.jax_enable_compilation_cache == before


def test_both_depths_are_compiled_twice_in_turn_after_an_uncounted_compile():
  depths, seconds = [], iter(((90., 9.), (2., 1.), (4., 1.5), (4., 6.), (5., 7.), (6., 8.), (5., 6.)))
  sizes = dataclasses.replace(_SIZES, rounds=11, compiled_layers=(12, 24))
  context = dataclasses.replace(_context(), sizes=sizes, config=_config())

  def compiled(_, layers, cache=None, **changes):
    depths.append((layers, bool(cache), bool(changes)))
    return next(seconds)

  with mock.patch.object(training_steps, '_compile_seconds', compiled):
    small, large, growth, lowering, reading = training_steps.compile_time(context)
  assert depths[:3] == [(12, True, False), (12, True, True), (12, True, True)]
  assert depths[3:] == [(layers, False, False) for layers in (12, 24, 24, 12)]
  assert (lowering.figure.value, reading.figure.value) == (3., 1.25)
  assert (small.figure.value, large.figure.value) == (10.5, 13.)
  assert growth.figure.value == pytest.approx((12 / 10 + 14 / 11) / 2)  # of the rounds' own ratios
  assert 'at D 16 on 1 cpu device;' in growth.note


@pytest.mark.slow
def test_a_repeated_step_continues_from_its_last_state():
  step = cases.RepeatedStep(_context().synthetic(_context().images_and_names()))
  losses = [float(step()['loss/total']) for _ in range(3)]
  assert int(step.state.step) == 3
  assert len(set(losses)) == 3


def test_cached_and_uncached_search_return_the_same_captions():
  cached, uncached = caption_rate.captioner(_context(), 'attribute')
  for beam_size in (1, 2):
    tokens = np.asarray(cached(beam_size))
    assert tokens.shape == (2, beam_size, 3)
    np.testing.assert_array_equal(tokens, uncached(beam_size))
  assert len(np.unique(tokens)) > 3  # not one word over and over
