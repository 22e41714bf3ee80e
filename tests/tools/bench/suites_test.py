"""Every subject runs at the smallest sizes and says what it should; no time is judged here."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from tests.helpers import tiny
from uni_moe_jax.moe import routers
from uni_moe_jax.tools.bench import caption_rate, cases, settings, step_parts, suites, training_steps

_SIZES = settings.Sizes(
    rounds=1, num_layers=1, width=16, num_heads=2, mlp_dim=16, image_size=16, patch_size=8, experts=2, batch_size=4, small_batch=2, names=20,
    name_tokens=4, vocabulary=30, words=3, gemm=16, compiled_layers=(1, 2), steps=1, files=4,
    mixed_routers=('dense', 'task'), reduced=True)


def _config():
  return tiny.config('shape', 'motion', 'pair', data_dir=tiny.data_dir())


@functools.cache
def _measure(subject: str, dtype: str = 'float32'):
  header, rows = suites.measure((subject,), _SIZES, _config(), dtype)
  assert header['dtype of products'] == dtype
  return {r.what: r for r in rows if r.subject == subject}


class SubjectsTest(parameterized.TestCase):

  @parameterized.parameters('sets', 'decoding', 'files')
  def test_every_figure_is_finite_and_has_a_unit(self, subject):
    self._check(subject)

  @pytest.mark.slow
  def test_every_figure_of_an_exported_model_is_finite_and_has_a_unit(self):
    self._check('exported')

  @parameterized.parameters('optimizer', 'input', 'mixed', 'published', 'compile')
  @pytest.mark.nightly
  def test_every_figure_of_the_others_is_finite_and_has_a_unit(self, subject):
    self._check(subject)

  def _check(self, subject):
    rows = _measure(subject)
    self.assertNotEmpty(rows)
    for row in rows.values():
      self.assertTrue(math.isfinite(row.figure.value), row)
      self.assertNotEmpty(row.unit, row)
      self.assertNotEmpty(row.note, row)

  @pytest.mark.nightly
  def test_every_router_is_compared_with_dense_in_both_modes(self):
    self._check('routers')
    rows = _measure('routers')
    for router in routers.ROUTERS:
      for mode in ('train', 'inference'):
        self.assertIn(f'{router} / dense, {mode}', rows)
    self.assertEqual(str(rows['task / dense, train'].budget), '<= 1.1 (1.03)')
    self.assertIsNone(rows['task / dense, inference'].budget)

  def test_every_router_is_a_case(self):
    self.assertLessEqual({routers.DENSE, *routers.ROUTERS}, set(training_steps.cases()))

  @pytest.mark.nightly
  def test_a_mixed_step_has_a_budget_too(self):
    self.assertEqual(str(_measure('mixed')['task / dense'].budget), '<= 1.15 (1.05)')

  @pytest.mark.nightly
  def test_the_recorded_seconds_are_scaled_by_the_peak(self):
    # At twice the recorded rate the published code would take half: 1.6 s.
    context = cases.Context(_SIZES, None, 'float32', 2 * 195e9, jax.devices()[:1])
    rows = {r.what: r for r in training_steps.published(context)}
    seconds = rows['train step, all names 4 tokens'].figure.value
    self.assertAlmostEqual(rows["all names 4 tokens / the published code's"].figure.value, seconds / 1.6)

  @pytest.mark.nightly
  def test_pictures_and_clips_are_counted_apart(self):
    self.assertEqual({r.what: r.unit for r in _measure('input').values() if r.unit.endswith('/s')}, {
        'shape, batches of 8': 'pictures/s', 'motion, batches of 4': 'clips/s', 'pair, batches of 4': 'pictures/s'})

  def test_files_are_counted_by_sort_beside_what_was_recorded(self):
    rows = _measure('files')
    self.assertEqual([(r.what.split()[0], r.unit) for r in rows.values()], [
        ('JPEG', 'pictures/s'), ('PNG', 'pictures/s'), ('mp4', 'clips/s')])
    for row, recorded in zip(rows.values(), ('1,000', '7,200', '90,000'), strict=True):
      self.assertIn(recorded, row.note.partition('recorded')[2])

  def test_products_in_bfloat16(self):
    for row in _measure('sets', 'bfloat16').values():
      self.assertTrue(math.isfinite(row.figure.value), row)

  @pytest.mark.nightly
  def test_the_compilation_cache_is_used_again_afterwards(self):
    before = jax.config.jax_enable_compilation_cache
    _measure('compile')
    self.assertEqual(jax.config.jax_enable_compilation_cache, before)


class CompileTest(absltest.TestCase):

  def test_both_depths_are_compiled_twice_in_turn_after_one_that_does_not_count(self):
    depths, seconds = [], iter((99., 10., 12., 14., 11.))
    sizes = dataclasses.replace(_SIZES, rounds=11, compiled_layers=(12, 24))
    context = cases.Context(sizes, _config(), 'float32', 1e9, jax.devices()[:1])
    with mock.patch.object(step_parts, '_compile_seconds', lambda _, layers: depths.append(layers) or next(seconds)):
      small, large, growth = step_parts.compile_(context)
    self.assertEqual(depths, [12, 12, 24, 24, 12])
    self.assertEqual((small.figure.value, large.figure.value), (10.5, 13.))
    self.assertAlmostEqual(growth.figure.value, 13 / 10.5)
    self.assertIn('at D 16 on 1 cpu device;', growth.note)


class RepeatedTest(absltest.TestCase):

  def test_the_state_goes_from_step_to_step(self):
    context = cases.Context(_SIZES, None, 'float32', 1e9, jax.devices()[:1])
    step = cases.Repeated(context.synthetic(context.pictures_and_names()))
    losses = [float(step()['loss/total']) for _ in range(3)]
    self.assertEqual(int(step.state.step), 3)
    self.assertLen(set(losses), 3)


class CaptionerTest(absltest.TestCase):

  def test_both_ways_find_the_same_captions(self):
    context = cases.Context(_SIZES, None, 'float32', 1e9, jax.devices()[:1])
    captioner = caption_rate.Captioner(context, 'attribute')
    for beams in (1, 2):
      found = np.asarray(captioner.cached(beams))
      self.assertEqual(found.shape, (2, beams, 3))
      np.testing.assert_array_equal(found, captioner.uncached(beams))
    self.assertGreater(len(np.unique(found)), 3)  # they are not one word over and over


if __name__ == '__main__':
  absltest.main()
