"""The convolutional stem: its windows, its equality with convolutions, and what a token sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.kernels import projection
from uni_moe_jax.kernels.gelu import gelu
from uni_moe_jax.model import stem
from uni_moe_jax.model.embedders import Embed
from uni_moe_jax.utils.tree_paths import by_path

SPEC = small_model.spec(stem='conv')  # images of 8 pixels, patches of 4, D 16: two convolutions, of 8 and 16 channels
SHAPES = {'embed/stem0': (9, 8), 'embed/stem0_bias': (8,), 'embed/stem1': (72, 16), 'embed/stem1_bias': (16,)}


def _params(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
  return ((draw((9, 8)), draw(8)), (draw((72, 16)), draw(16)))


def _pixels(frames=1, batch=2):
  return jnp.asarray(np.random.default_rng(1).normal(size=(batch, frames, 8, 8, 1)), jnp.float32)


@functools.partial(jax.jit, static_argnames='dtype')
def _stem(pixels, dtype=jnp.float32, params=None):
  return stem.conv_stem(pixels, params or _params(), dtype, projection.PLAIN)


def test_windows_by_hand():
  image = jnp.arange(1, 17).reshape(1, 4, 4, 1)
  assert stem.windows(image)[0].tolist() == [
      [[0, 0, 0, 0, 1, 2, 0, 5, 6], [0, 0, 0, 2, 3, 4, 6, 7, 8]],
      [[0, 5, 6, 0, 9, 10, 0, 13, 14], [6, 7, 8, 10, 11, 12, 14, 15, 16]]]


def test_channels_of_a_pixel_stay_together():
  image = jnp.stack([jnp.arange(1, 5), jnp.arange(11, 15)], -1).reshape(1, 2, 2, 2)
  assert stem.windows(image)[0, 0, 0].tolist() == [0] * 8 + [1, 11, 2, 12] + [0, 0] + [3, 13, 4, 14]


def test_it_equals_convolutions_of_stride_two():
  (first, first_bias), (second, second_bias) = _params()
  convolve = lambda x, kernel: jax.lax.conv_general_dilated(
      x, kernel.reshape(3, 3, x.shape[-1], -1), (2, 2), [(1, 0), (1, 0)], dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  x = convolve(_pixels()[:, 0], first)
  x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
  expected = convolve(gelu(x + first_bias[None, None, None]), second) + second_bias[None, None, None]
  np.testing.assert_allclose(_stem(_pixels()), expected.reshape(2, 4, 16), atol=2e-5)


def test_a_token_sees_its_patch_and_three_pixels_before_it():
  # Token (1, 1) of 2 × 2 starts at pixel 4. Its window starts one position of two pixels before, theirs one pixel.
  change = small_model.jit(jax.grad(lambda x: _stem(x)[0, 3].sum()))(_pixels(batch=1))[0, 0, :, :, 0] != 0
  assert np.flatnonzero(change.any(0)).tolist() == np.flatnonzero(change.any(1)).tolist() == [1, 2, 3, 4, 5, 6, 7]
  assert change[1:, 1:].all()


def test_frames_are_independent_and_in_order():
  video = _pixels(frames=3)
  tokens = _stem(video)  # 4 of a frame
  np.testing.assert_array_equal(tokens.reshape(6, 4, 16), _stem(video.reshape(6, 1, 8, 8, 1)))
  changed = _stem(video.at[:, 1].add(1.)) != tokens
  assert changed[:, 4:8].all() and not changed[:, :4].any() and not changed[:, 8:].any()
  # A product of fewer rows may be rounded otherwise.
  alone = np.concatenate([_stem(video[:, t:t + 1]) for t in range(3)], axis=1)
  np.testing.assert_allclose(tokens, alone, atol=2e-5)


def test_the_model_has_its_parameters_in_place_of_the_patch_projection():
  shapes = {path: x.shape for path, x in by_path(small_model.params(SPEC)).items()}
  without = {path: x.shape for path, x in by_path(small_model.params(small_model.spec())).items()}
  assert shapes.items() - without.items() == SHAPES.items()
  assert without.keys() - shapes.keys() == {'embed/patch', 'embed/patch_bias'}


def test_positions_are_added_as_to_patches():
  values, rows = small_model.params(SPEC)['embed'], small_model.params(SPEC)['embed']['norm']
  kernels = tuple((values[f'stem{i}'], values[f'stem{i}_bias']) for i in (0, 1))
  tokens = _stem(_pixels(), params=kernels)
  embedded = lambda m: (m.visual(_pixels(), jnp.int32(1)), m.temporal[1][None] + m.spatial)
  result, position = small_model.jit(lambda: Embed(SPEC).apply({'params': values}, method=embedded))()
  x = np.asarray(tokens) + np.asarray(position)
  expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(result, expected * np.asarray(rows['scale']) + np.asarray(rows['bias']), atol=1e-5)


def test_products_are_of_the_type_of_layers_and_everything_else_float32():
  rounded = _stem(_pixels(), jnp.bfloat16)
  assert rounded.dtype == jnp.float32
  error = np.abs(rounded - _stem(_pixels())).max()
  assert 1e-4 < error < .05


@pytest.mark.parametrize('frames', [1, 2])
def test_gradients_reach_every_parameter(frames):
  loss = lambda p: (stem.conv_stem(_pixels(frames), p, jnp.float32, projection.CPU)**2).sum()
  gradients = small_model.jit(jax.grad(loss))(_params())
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradients))
