"""Embedders against a second, plain computation, and tables by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.model import embedders
from uni_moe_jax.model.spec import ModelSpec


@functools.cache
def _jitted(method: str, spec: ModelSpec):
  return small_model.jit(lambda values, *args: embedders.Embed(spec).apply({'params': values}, *args, method=method))


def _apply(method: str, *args, spec: ModelSpec | None = None):
  spec = spec or small_model.spec()
  return _jitted(method, spec)(small_model.params(spec)['embed'], *args)


@functools.cache
def _tables() -> dict[str, np.ndarray]:
  return jax.tree.map(np.asarray, small_model.params(small_model.spec())['embed'])


def _norm(x: np.ndarray) -> np.ndarray:
  """The one LayerNorm of the embedder."""
  n = _tables()['norm']
  centered = x - x.mean(-1, keepdims=True)
  return centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + 1e-5) * n['scale'] + n['bias']


def _pixels(frames: int = 1, batch: int = 2) -> jax.Array:
  return jnp.asarray(np.random.default_rng(1).normal(size=(batch, frames, 8, 8, 1)), jnp.float32)


def _assert_close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_sincos_table_by_hand():
  # Width 8: two frequencies, 1 and 1/100. Token 3 of a 2 × 2 grid is row 1, column 1; token 1 is row 0, column 1.
  table = embedders.sincos_table(2, 8)
  s, c = np.sin([1, .01]), np.cos([1, .01])
  np.testing.assert_allclose(table[3], [*s, *c, *s, *c], rtol=1e-6)
  np.testing.assert_allclose(table[1], [0, 0, 1, 1, *s, *c], rtol=1e-6)


def test_scale_stretches_coordinates():
  # Twice as fine a grid at half the scale: token (2, 0) lies where (1, 0) lay.
  np.testing.assert_allclose(embedders.sincos_table(4, 8, .5)[8], embedders.sincos_table(2, 8)[2], rtol=1e-6)


@pytest.mark.parametrize('scale, cosine', [(160 / 224, .998), (1., .767)])
def test_the_scale_keeps_a_patch_at_its_place_in_a_larger_image(scale, cosine):
  # The last patch of 160 pixels and the last one of 224, width 768.
  small, large = embedders.sincos_table(10, 768)[-1], embedders.sincos_table(14, 768, scale)[-1]
  np.testing.assert_allclose(small @ large / np.linalg.norm(small) / np.linalg.norm(large), cosine, atol=5e-4)


def test_images_are_embedded_at_scaled_positions():
  actual = _jitted('visual', small_model.spec(posemb_scale=.5))(_tables(), _pixels(), 0)
  _assert_close(actual, _expected(_pixels(), 0, embedders.sincos_table(2, 16, .5)))
  assert np.abs(actual - _expected(_pixels(), 0)).max() > .01  # the scale matters


def test_patches_and_frames_are_in_reading_order_and_colors_the_last_axis_of_a_patch():
  r, c = np.mgrid[:4, :4]  # pixel values are row · 10 + column
  np.testing.assert_array_equal(
      embedders.patchify(jnp.asarray(r * 10 + c).reshape(1, 1, 4, 4, 1), 2)[0],
      [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]])
  frames = jnp.arange(3).reshape(1, 3, 1, 1, 1) * jnp.ones((1, 3, 4, 4, 1), int)
  np.testing.assert_array_equal(embedders.patchify(frames, 2)[0, :, 0], [0] * 4 + [1] * 4 + [2] * 4)
  # Two patches of 2 × 2 pixels, side by side; an image's row is 12 numbers.
  np.testing.assert_array_equal(
      embedders.patchify(jnp.arange(24).reshape(1, 1, 2, 4, 3), 2)[0],
      [[*range(0, 6), *range(12, 18)], [*range(6, 12), *range(18, 24)]])


def test_word_position_and_type_are_summed_under_the_norm():
  t, ids, positions = _tables(), jnp.array([[5, 7, 5], [9, 2, 22]]), jnp.array([[0, 1, 4], [2, 2, 3]])
  expected = _norm(t['word'][np.asarray(ids)] + t['position'][np.asarray(positions)] + t['type'][0])
  _assert_close(_apply('text', ids, positions), expected)


def test_the_prefix_is_the_word_spe_alone_under_the_norm_or_a_word_as_a_text_of_length_one():
  _assert_close(_apply('prefix'), _norm(_tables()['word'][small_model.SPE])[None, None])
  prefix = _apply('prefix', spec=small_model.spec(prefix_word=6))
  _assert_close(prefix, _apply('text', jnp.array([[6]]), jnp.array([[0]])))


def _expected(pixels, first_frame: int, spatial: np.ndarray = embedders.sincos_table(2, 16)) -> np.ndarray:
  t = _tables()
  x = np.asarray(embedders.patchify(pixels, 4)) @ t['patch'] + t['patch_bias']
  frames = t['temporal'][first_frame:first_frame + pixels.shape[1]]
  position = np.concatenate([spatial + f for f in frames])
  return _norm(x + position)


@pytest.mark.parametrize('frames, offset', [(1, 0), (1, 2), (2, 0), (2, 1), (3, 0)])
def test_patch_position_and_frame_are_summed_under_the_norm_of_texts(frames, offset):
  pixels = _pixels(frames)
  _assert_close(_apply('visual', pixels, offset), _expected(pixels, offset))


def test_an_image_is_a_video_of_one_frame():
  video = _pixels(frames=2)
  _assert_close(_apply('visual', video, 0)[:, :4], _apply('visual', video[:, :1], 0))


_VIDEO = dict(video_mean=(1.,), video_std=(.5,))


# 0 and 255 are 0 and 1. Mean .5, deviation .25: -2, 2; a video's own, with mean 1 and deviation .5: -2, 0.
@pytest.mark.parametrize('changes, frames, by_hand', [
    ({}, 1, (-2., 2.)), ({}, 2, (-2., 2.)), (_VIDEO, 2, (-2., 0.)), (_VIDEO, 1, (-2., 2.))])
def test_bytes_are_scaled_and_normalized_and_videos_may_have_their_own_constants(changes, frames, by_hand):
  spec, ones = small_model.spec(**changes), jnp.ones((1, frames, 8, 8, 1))
  pixels = jnp.array([0, 255], jnp.uint8)[:, None, None, None, None] * ones.astype(jnp.uint8)
  expected = jnp.array(by_hand)[:, None, None, None, None] * ones
  _assert_close(_apply('visual', pixels, 0, spec=spec), _apply('visual', expected, 0))


def test_each_color_has_its_own_mean_and_deviation():
  # 255 is 1: (1 - 0)/1 = 1, (1 - 1)/2 = 0, (1 - .5)/.25 = 2.
  spec = small_model.spec(channels=3, pixel_mean=(0., 1., .5), pixel_std=(1., 2., .25))
  by_hand = jnp.array([1., 0., 2.]).reshape(1, 1, 1, 1, 3) * jnp.ones((1, 1, 8, 8, 3))
  pixels = jnp.full((1, 1, 8, 8, 3), 255, jnp.uint8)
  _assert_close(_apply('visual', pixels, 0, spec=spec), _apply('visual', by_hand, 0, spec=spec))


def test_a_video_that_is_already_normalized_stays_unchanged():
  own = small_model.spec(**_VIDEO)
  _assert_close(_apply('visual', _pixels(2), 0, spec=own), _apply('visual', _pixels(2), 0))


def test_a_type_of_visual_tokens_is_added_to_each_of_them_but_not_to_texts_and_the_prefix():
  spec, row = small_model.spec(modality_embedding=True), np.random.default_rng(3).normal(size=(1, 16))
  actual = _jitted('visual', spec)(dict(_tables(), visual_type=row.astype(np.float32)), _pixels(2), 1)
  _assert_close(actual, _expected(_pixels(2), 1, embedders.sincos_table(2, 16) + row.astype(np.float32)))
  assert np.abs(actual - _expected(_pixels(2), 1)).max() > .1
  for method, args in (('text', (jnp.array([[5, 7]]), jnp.arange(2)[None])), ('prefix', ())):
    np.testing.assert_array_equal(_apply(method, *args, spec=spec), _apply(method, *args))


def _with_change(pixels):
  """(visual tokens of a model with frame differences, its second kernel)."""
  kernel = np.random.default_rng(4).normal(size=_tables()['patch'].shape).astype(np.float32)
  run = _jitted('visual', small_model.spec(frame_differences=True))
  return run(dict(_tables(), difference=kernel), pixels, 0), kernel


def test_patches_of_a_video_include_their_change_since_the_frame_before():
  t, video = _tables(), np.asarray(_pixels(2))
  actual, kernel = _with_change(video)
  x = np.asarray(embedders.patchify(video, 4)) @ t['patch'] + t['patch_bias']
  # four patches a frame; the first has none
  x[:, 4:] += np.asarray(embedders.patchify(video[:, 1:] - video[:, :1], 4)) @ kernel
  position = np.concatenate([embedders.sincos_table(2, 16) + f for f in t['temporal'][:2]])
  _assert_close(actual, _norm(x + position))
  assert np.abs(actual - _expected(video, 0)).max() > .1


def test_an_image_and_a_video_that_stands_still_have_no_change():
  for pixels in (_pixels(1), np.repeat(np.asarray(_pixels(1)), 2, axis=1)):
    _assert_close(_with_change(pixels)[0], _expected(pixels, 0))


@pytest.mark.parametrize('posemb', ['learned', 'frozen'])
def test_a_spatial_table_of_parameters_replaces_the_computed_one(posemb):
  table = np.random.default_rng(2).normal(size=(4, 16)).astype(np.float32)
  actual = _jitted('visual', small_model.spec(posemb=posemb))(dict(_tables(), spatial=table), _pixels(), 0)
  _assert_close(actual, _expected(_pixels(), 0, table))


def test_one_norm_serves_text_and_images_and_optional_tables_are_parameters_when_they_are_requested():
  plain = set(small_model.boxed(small_model.spec())['embed'])
  assert plain == {'word', 'position', 'type', 'patch', 'patch_bias', 'temporal', 'norm'}
  spec = small_model.spec(posemb='frozen', modality_embedding=True, frame_differences=True)
  assert set(small_model.boxed(spec)['embed']) - plain == {'spatial', 'visual_type', 'difference'}


@pytest.mark.parametrize('posemb, computed', [('frozen', True), ('learned', False)])
def test_a_frozen_spatial_table_starts_as_the_computed_one(posemb, computed):
  module = embedders.Embed(small_model.spec(posemb=posemb, posemb_scale=.5))
  init = small_model.jit(functools.partial(module.init, method='prefix'))
  table = nn.unbox(init(jax.random.key(0)))['params']['spatial']
  assert table.shape == (4, 16)
  assert np.array_equal(table, embedders.sincos_table(2, 16, .5)) == computed
