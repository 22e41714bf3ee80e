"""The tiled product equals the plain sum over slots, in values and gradients, whatever the sizes of groups are."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from tests.helpers.gmm_backends import SIZES, normal
from uni_moe_jax.kernels.gmm import tiled as gmm_tiled

_E, _T, _D, _F, _G = 4, 16, 6, 5, 16
_TILES = (4, 2), (2, 0)  # of four slots while more than two are left, then of two


def _slots(sizes) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, experts) of all slots: an expert has a token once, others may have it, too."""
  rng = np.random.default_rng(3)
  tokens = np.concatenate([rng.permutation(_T)[:n] for n in sizes]).astype(np.int32)
  return tokens, np.repeat(np.arange(_E), sizes)


@functools.cache
def _tiled():
  @small_model.jit
  def run(x, kernel, gates, bias, tokens, sizes, dy):
    y, pull_back = jax.vjp(lambda *a: gmm_tiled.routed_matmul(*a, tokens, sizes), x, kernel, gates, bias)
    return y, *pull_back(dy)
  return run


def _plain(x, kernel, gates, bias, tokens, experts, dy):
  def products(x, kernel, gates, bias):
    rows = gates[:, None] * jnp.einsum('gd,gdf->gf', x[tokens], kernel[experts])
    return bias + jax.nn.one_hot(tokens, _T).T @ rows
  y, pull_back = jax.vjp(products, x, kernel, gates, bias)
  return y, *pull_back(dy)


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_tiles_equal_the_plain_sum_over_slots(sizes):
  tokens, experts = _slots(sizes)
  x, kernel, gates, bias, dy = (normal(i, *s) for i, s in enumerate(
      ((_T, _D), (_E, _D, _F), (len(tokens),), (_T, _F), (_T, _F))))
  # Slots behind the groups change nothing, whatever token and gate they have.
  behind = _G + _TILES[0][0] - 1 - len(tokens)
  padded = jnp.pad(gates, (0, behind), constant_values=7.0), jnp.pad(tokens, (0, behind), constant_values=_T - 1)
  with mock.patch.object(gmm_tiled, 'TILES', _TILES):  # read when the program is traced: by its first call
    actual = _tiled()(x, kernel, padded[0], bias, padded[1], jnp.asarray(sizes), dy)
  expected = _plain(x, kernel, gates, bias, tokens, experts, dy)
  for name, a, b in zip(('y', 'x', 'kernel', 'gates', 'bias'), actual, expected, strict=True):
    np.testing.assert_allclose(a[:len(b)], b, atol=1e-5, err_msg=name)


def test_a_token_that_is_not_finite_stays_in_its_own_row():
  # The last tile of a group computes tokens of the next group, too.
  tokens, sizes = jnp.arange(_G + _TILES[0][0] - 1) % _T, jnp.array([3, 0, 9, 4])
  x, kernel, dy = normal(0, _T, _D).at[3].set(jnp.nan), normal(1, _E, _D, _F), normal(2, _T, _F)
  with mock.patch.object(gmm_tiled, 'TILES', _TILES):
    y, dx, *_ = _tiled()(x, kernel, jnp.ones(tokens.shape), jnp.zeros((_T, _F)), tokens, sizes, dy)
  assert np.flatnonzero(np.isnan(y).any(1)).tolist() == [3]
  assert np.isfinite(dx).all()


def test_a_token_is_not_changed_by_the_product_of_an_expert_that_it_does_not_have():
  # The last tile of expert 0 computes token 3 of expert 1, too; there the product is infinite, and 0 times it is NaN.
  tokens, sizes = jnp.arange(_G + _TILES[0][0] - 1) % _T, jnp.array([3, 13, 0, 0])
  x = jnp.ones((_T, _D)).at[3].set(1e30)
  kernel = jnp.ones((_E, _D, _F)).at[0].set(1e30)
  with mock.patch.object(gmm_tiled, 'TILES', _TILES):
    y, dx, *_ = _tiled()(x, kernel, jnp.ones(tokens.shape), jnp.zeros((_T, _F)), tokens, sizes, jnp.ones((_T, _F)))
  assert np.isfinite(y).all() and np.isfinite(dx).all()
  np.testing.assert_allclose(y[3], _D * 1e30, rtol=1e-6)
  assert not np.isfinite(x[3] @ kernel[0]).any()  # control


# Products of 256 rows while more than 192 slots are left, then of 64.
@pytest.mark.parametrize('slots, large, small', [
    (1, 0, 1), (64, 0, 1), (192, 0, 3), (193, 1, 0), (257, 1, 1), (449, 2, 0)])
def test_products_of_a_group_by_hand(slots, large, small):
  filled = jnp.arange(slots + gmm_tiled.BEHIND)
  over_tiles = gmm_tiled._loop(jnp.ones(filled.shape), filled, jnp.array([slots]), slots)
  counted = over_tiles(0, lambda counts, token, *_: counts.at[int(len(token) < 256)].add(1), jnp.zeros(2, jnp.int32))
  assert counted.tolist() == [large, small]
