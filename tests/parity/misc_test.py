"""What the published code computes once: position tables, their resizing, and how parameters start."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import small_model
from tests.parity import fixtures
from tests.parity.fixtures import Arrays, assert_close
from uni_moe_jax.convert import torch_layout
from uni_moe_jax.model.embedders import sincos_table
from uni_moe_jax.model.uni_perceiver import UniPerceiver, init_params

BOUND = 1e-5


@pytest.mark.parametrize('name', fixtures.cases('misc'))
def test_tables_and_their_resizing(name):
  arrays = Arrays(name)
  rows, width = arrays['sincos_spatial'].shape
  side = round(rows**0.5)
  assert_close(sincos_table(side, width), arrays['sincos_spatial'], BOUND, 'spatial table')
  assert_close(sincos_table(side, width, 160 / 224), arrays['sincos_spatial_scale160over224'], BOUND, 'scaled table')
  for key in [k for k in arrays.keys('resize') if k.endswith('_in')]:
    function = torch_layout.resize_spatial if '.spatial' in key else torch_layout.resize_linear
    theirs = arrays[key.replace('_in', '_out')]
    assert_close(function(arrays[key], len(theirs)), theirs, BOUND, key)
  assert not arrays.unread, sorted(arrays.unread)


def _start(model: str):
  """(fresh parameters under published names, published parameters that our tree lacks)."""
  spec = fixtures.model_spec(model)
  init = small_model.jit(functools.partial(init_params, UniPerceiver(spec)))
  return torch_layout.to_torch(init(jax.random.key(0)), spec)


@pytest.mark.parametrize('name, model', [
    (name, model) for name in fixtures.cases('misc') for model in fixtures.entry(name)['init_stats']
    if model in fixtures.manifest()['models']])
def test_parameters_start_as_published(name, model):
  ours, report = _start(model)
  for key, stats in fixtures.entry(name)['init_stats'][model].items():
    assert list(ours[key].shape) == stats['shape'], key
    if key in report.made:
      continue  # gates that nothing evaluates, and one unused row
    x, n = ours[key].astype(np.float64), ours[key].size
    if stats['std'] == 0:  # constants, and a single value
      np.testing.assert_allclose(x, stats['mean'], rtol=1e-6, atol=1e-9, err_msg=key)
      continue
    # Two samples of n: means differ by std · √(2/n), standard deviations by at most std / √n. Five of those.
    assert abs(x.mean() - stats['mean']) < 5 * stats['std'] * (2 / n) ** .5, key
    assert abs(x.std() - stats['std']) < 5 * stats['std'] / n ** .5, key
    # A uniform law ends at its bound; a normal one goes on.
    uniform = abs(stats['max'] / (3 ** .5 * stats['std']) - 1) < .1 and n > 500
    if uniform:
      assert abs(x.max() / stats['max'] - 1) < .05 and abs(x.min() / stats['min'] - 1) < .05, key
