"""Resizing, cropping and mirroring: gray levels by hand and against Pillow, and positions of crops."""

import collections
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples import image_transforms


def _draw(i=0, crop='resize_crop', min_area=0.08):
  draws = image_transforms.draws(hashing.mix_constant('images', i)[None], crop, min_area)
  return {purpose: value[0] for purpose, value in draws.items()}


def _each(view, n, crop='resize_crop', min_area=0.08):
  """The view with each of n draws."""
  hashes = tf.stack([hashing.mix_constant('images', i) for i in range(n)])
  draws = image_transforms.draws(hashes, crop, min_area)
  return list(tf.data.Dataset.from_tensor_slices(draws).map(view).as_numpy_iterator())


def _numbered(*shape):
  """An image whose pixels all have different gray levels."""
  return np.arange(1, np.prod(shape) + 1, dtype=np.uint8).reshape(*shape, 1)


def _noise(h, w):
  return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)


def _resize_crop(image, size, draw):
  return image_transforms.random_flip(image_transforms.resize_and_crop(image, size, draw, 'resize_crop'), draw)


def _random_resized_crops(image, size, n, min_area=0.08):
  crop = 'random_resized_crop'
  return _each(lambda draw: image_transforms.resize_and_crop(tf.constant(image), size, draw, crop), n, crop, min_area)


def _evaluate(image, size, crop='random_resized_crop'):
  return image_transforms.resize_and_crop(image, size, None, crop)


def _positions(made, image, size):
  """Every (down, right, mirrored) at which `made` is a crop of a numbered image."""
  H, W = image.shape[:2]
  return [(d, r, m) for d in range(H - size + 1) for r in range(W - size + 1) for m in (False, True)
          if np.array_equal(made, image[d:d + size, r:r + size][:, ::-1 if m else 1])]


# Keys' kernel k with a = -1/2: k(1/4) = .8672, k(3/4) = .2266, k(5/4) = -.0703.
@pytest.mark.parametrize('before, size, after', [
    # From 2 to 4 pixels, the new ones are at 1/4, 3/4, 5/4, 7/4 and the old ones, 0 and 100, at 1/2 and 3/2.
    #   1/4: 100 · k(5/4) / (k(1/4) + k(5/4)) = -8.8, below black; 3/4: 100 · k(3/4) / (k(1/4) + k(3/4)) = 20.7
    #   5/4: 100 - 20.7; 7/4: 100 + 8.8
    ([0, 100], 4, [0, 21, 79, 109]),
    ([0, 250], 4, [0, 52, 198, 255]),  # 250 · 1.088 = 272, above white
    # From 4 to 2 pixels the kernel is twice as wide: a new pixel at 1 sees the old ones, at 1/2, 3/2, 5/2, 7/2, in
    # distances of 1/4, 1/4, 3/4, 5/4. 200 · (k(3/4) + k(5/4)) / (2 k(1/4) + k(3/4) + k(5/4)) = 16.5; the narrow kernel
    # would give 0.
    ([0, 0, 200, 200], 2, [17, 183])], ids=['enlarged', 'clipped', 'shrunk'])
def test_resized_levels_equal_those_computed_by_hand_on_both_axes(before, size, after):
  image, expected = (np.tile(np.array(row, np.uint8)[None, :, None], (len(row), 1, 1)) for row in (before, after))
  np.testing.assert_array_equal(image_transforms.resize_short_side(image, size), expected)
  down = image_transforms.resize_short_side(image.transpose(1, 0, 2), size)
  np.testing.assert_array_equal(down, expected.transpose(1, 0, 2))


# The long side is size · long / short, rounded down.
@pytest.mark.parametrize('sides, size, expected', [
    ((3, 5), 2, (2, 3)),  # 10 / 3
    ((5, 3), 2, (3, 2)),
    ((4, 4), 6, (6, 6)),
    ((1, 3), 4, (4, 12)),
    ((375, 500), 256, (256, 341)),  # 128000 / 375 = 341.3
])
def test_the_long_side_keeps_the_aspect_ratio(sides, size, expected):
  made = image_transforms.resize_short_side(np.zeros((*sides, 3), np.uint8), size)
  assert (tuple(made.shape), made.dtype) == ((*expected, 3), tf.uint8)


def _checks(h, w):
  """Black and nearly white squares of four pixels: sharp edges, and a middle that is no half of a level."""
  black = (np.arange(h)[:, None] // 4 + np.arange(w)[None] // 4) % 2
  return np.repeat((254 * black).astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize('make', [_noise, _checks])
@pytest.mark.parametrize(
    'sides, size', [((75, 100), 32), ((100, 67), 45), ((20, 31), 64), ((17, 90), 48), ((96, 128), 23)])
def test_levels_equal_pillows_within_two(make, sides, size):
  image = make(*sides)
  made = image_transforms.resize_short_side(image, size).numpy().astype(int)
  size_of_pillow = made.shape[1::-1]  # width, height
  difference = np.abs(made - np.asarray(Image.fromarray(image).resize(size_of_pillow, Image.Resampling.BICUBIC)))
  assert difference.max() <= 2
  assert difference.mean() < 0.01
  # So that the bound means something: the next similar filter is far away.
  other = np.asarray(Image.fromarray(image).resize(size_of_pillow, Image.Resampling.BILINEAR))
  assert np.abs(made - other).max() > 2


# Half the margin, and of a half the even one: 1/2 → 0, 3/2 → 2, 5/2 → 2.
@pytest.mark.parametrize('margin, offset', [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2)])
def test_half_of_an_odd_margin_is_rounded_to_even(margin, offset):
  image = _numbered(4 + margin, 5)
  for axes in ((0, 1, 2), (1, 0, 2)):
    expected = image[offset:offset + 4, :4].transpose(axes)
    np.testing.assert_array_equal(image_transforms.square(image.transpose(axes), 4, None), expected)


def test_random_crops_are_uniformly_distributed():
  image, n = _numbered(5, 5), 900
  np.testing.assert_array_equal(image_transforms.square(image, 5, _draw()), image)
  positions = [_positions(made, image, 3) for made in _each(lambda d: image_transforms.square(image, 3, d), n)]
  # 3 · 3 positions, 100 each, give or take sqrt(900 · 1/9 · 8/9) = 9.4.
  counts = collections.Counter(position for [position] in positions)
  assert set(counts) == {(d, r, False) for d in range(3) for r in range(3)}
  assert all(abs(count - 100) < 4 * 9.4 for count in counts.values())


def test_half_of_the_images_are_mirrored_independently_of_the_crop():
  image, n = _numbered(3, 4), 600
  crops = _each(lambda draw: image_transforms.square(image, 3, draw), n)
  made = _each(lambda draw: image_transforms.random_flip(image_transforms.square(image, 3, draw), draw), n)
  mirrored = [np.array_equal(m, crop[:, ::-1]) for m, crop in zip(made, crops)]
  assert all(m or np.array_equal(p, crop) for m, p, crop in zip(mirrored, made, crops))
  assert abs(np.mean(mirrored) - .5) < 4 * np.sqrt(.25 / n)
  # 2 positions, mirrored or not: 150 each, give or take sqrt(600 · 1/4 · 3/4) = 11.
  positions = [_positions(m, image, 3)[0] for m in made]
  counts = [positions.count((0, right, mirrored)) for right in (0, 1) for mirrored in (False, True)]
  assert all(abs(count - 150) < 4 * 11 for count in counts)


def test_random_choices_depend_on_the_hash_alone():
  image = _numbered(5, 9)
  once, again = (_each(lambda draw: _resize_crop(tf.constant(image), 4, draw), 30) for _ in range(2))
  np.testing.assert_array_equal(once, again)
  assert len({made.tobytes() for made in once}) > 5


def _coordinates(H, W):
  """Red is the position to the right, green the position down, in 256ths of the image."""
  down, right = np.mgrid[:H, :W]
  return np.stack([right * 256 // W, down * 256 // H, 0 * down], -1).astype(np.uint8)


def _part(made, H, W):
  """(height, width, first row, first column) in pixels of the part that was resized to `made`.

  `made` shows `_coordinates(H, W)`. Accurate to two pixels: the outermost of S pixels show what is half a pixel
  inside.
  """
  S = len(made)
  across, down = made[..., 0].astype(float).mean(0) * W / 256, made[..., 1].astype(float).mean(1) * H / 256
  height, width = ((c[-2] - c[1]) / (S - 3) * S for c in (down, across))
  return height, width, down[1] - 1.5 * height / S, across[1] - 1.5 * width / S


def test_random_resized_crops_keep_the_published_bounds_and_are_anywhere():
  H, W = 240, 320
  crops = _random_resized_crops(_coordinates(H, W), 64, 60)
  height, width, top, left = np.array([_part(made, H, W) for made in crops]).T
  share, ratio = height * width / (H * W), width / height
  # From 8 to 100 % of the area, from 3/4 to 4/3 as wide as high, with an error of two pixels. Some of 60 draws are near
  # each bound.
  assert 0.07 < share.min() < 0.15 and 0.75 < share.max() < 1.05
  assert 0.72 < ratio.min() < 0.82 and 1.24 < ratio.max() < 1.39
  assert (top > -3).all() and (left > -3).all() and (top + height < H + 3).all() and (left + width < W + 3).all()
  free = share < 0.5  # these have many positions
  for corner, margin in ((top, H - height), (left, W - width)):
    position = (corner / np.maximum(margin, 1))[free]
    assert position.min() < 0.1 and position.max() > 0.9 and 0.35 < position.mean() < 0.65


def test_the_smallest_random_part_is_that_of_the_task():
  H, W = 240, 320
  crops = _random_resized_crops(_coordinates(H, W), 64, 40, min_area=0.5)
  height, width, _, _ = np.array([_part(made, H, W) for made in crops]).T
  share = height * width / (H * W)
  assert 0.47 < share.min() < 0.6 and 0.85 < share.max() < 1.05


@pytest.mark.parametrize('down', [False, True])
def test_an_image_too_long_for_any_draw_is_cropped_to_the_largest_allowed_center(down):
  # 10 × 1000: 4/3 of 10 is 13, with 493 before it; none of the 987 others may be visible.
  image = np.zeros((10, 1000, 1), np.uint8)
  image[:, 493:493 + 13] = 200
  image = image.swapaxes(0, 1) if down else image
  assert all((made == 200).all() for made in _random_resized_crops(image, 8, 3))


def test_the_jittered_short_side_is_between_256_and_320_of_224():
  # From 16 · 256 / 224 to 16 · 320 / 224.
  draw = lambda size, n: _each(lambda d: image_transforms.short_side(size, d, 'jittered_crop'), n, 'jittered_crop')
  assert set(draw(16, 60)) == {18, 19, 20, 21, 22}
  drawn = draw(224, 150)
  assert 256 <= min(drawn) < 260 and 316 < max(drawn) <= 320


@pytest.mark.parametrize('image, size, crop, down, right', [
    # 256/224 · 7 = 8: images of 8 pixels are not resized. Half of a margin of one is 0, of five 2.
    (_noise(8, 8), 7, 'random_resized_crop', 0, 0),
    (_noise(8, 12), 7, 'random_resized_crop', 0, 2),
    # int(256 / 224 · 160) = 182 for images of 160: of 182 × 200 pixels, the margins are 22 and 40.
    (_noise(182, 200), 160, 'random_resized_crop', 11, 20),
    (_numbered(4, 7), 4, 'resize_crop', 0, 2),  # the margin of 3 has the offset 2
], ids=['square', 'wide', 'published size', 'retrieval'])
def test_evaluation_takes_the_center_of_the_short_side_or_for_classification_of_a_larger_image(
    image, size, crop, down, right):
  np.testing.assert_array_equal(_evaluate(image, size, crop), image[down:down + size, right:right + size])


def test_resize_crop_takes_any_part_along_the_long_side():
  image = _numbered(4, 6)
  made = {_positions(m, image, 4)[0] for m in _each(lambda draw: _resize_crop(tf.constant(image), 4, draw), 60)}
  assert made == {(0, right, mirrored) for right in range(3) for mirrored in (False, True)}


@pytest.mark.parametrize('view', [
    _evaluate, lambda image, size: _evaluate(image, size, 'resize_crop'),
    lambda image, size: _resize_crop(image, size, _draw())])
def test_a_single_pixel_becomes_an_image_of_its_color(view):
  pixel = np.array([[[10, 200, 30]]], np.uint8)
  np.testing.assert_array_equal(view(pixel, 7), np.broadcast_to(pixel, (7, 7, 3)))


def _encode(image, file_format, **options):
  Image.fromarray(image.squeeze()).save(out := io.BytesIO(), file_format, **options)
  return tf.constant(out.getvalue())


def _read_fast(encoded, size, draw=None, crop='resize_crop', channels=3):
  return image_transforms.read(encoded, channels, size, draw, crop, 'fast')


@pytest.mark.parametrize('before, size, after', [
    # From 3 to 2 pixels, each new one is an old one and half of the middle: (10 + 40 / 2) / 1.5 = 20, (80 + 20) / 1.5.
    ([10, 40, 80], 2, [20, 67]),
    ([0, 10, 100, 201], 2, [5, 151]),  # the mean of 100 and 201 is rounded up
    # From 2 to 4 pixels the new ones are at 1/4, 3/4, 5/4, 7/4, the old ones at 1/2 and 3/2, beyond which they stay.
    ([0, 100], 4, [0, 25, 75, 100])], ids=['fractions of pixels', 'means', 'enlarged'])
def test_fast_resized_levels_equal_those_computed_by_hand_on_both_axes(before, size, after):
  image, expected = (np.tile(np.array(row, np.uint8), (len(row), 1)) for row in (before, after))
  for axis in (0, 1):
    made = _read_fast(_encode(np.moveaxis(image, 0, axis), 'PNG'), size, channels=1)[..., 0]
    np.testing.assert_array_equal(made, np.moveaxis(expected, 0, axis))


@pytest.mark.parametrize('resize', ['fast', 'pillow'])
def test_a_webp_in_shades_of_gray_is_that_of_a_png(resize):
  """A gray level is 0.299 R + 0.587 G + 0.114 B: of pure colors 76, 150 and 29."""
  image = np.repeat(np.eye(3, dtype=np.uint8)[None] * 255, 3, 0)
  for file_format in ('WEBP', 'PNG'):
    made = image_transforms.read(_encode(image, file_format, lossless=True), 1, 3, None, 'resize_crop', resize)
    np.testing.assert_allclose(made, np.tile(np.array([[76], [150], [29]]), (3, 1, 1)), atol=1)
    assert made.dtype == np.uint8


@pytest.mark.parametrize('crop, share', [('resize_crop', 1), ('random_resized_crop', 224 / 256)])
def test_fast_evaluation_takes_the_same_center(crop, share):
  image = np.stack([_coordinates(96, 160)[..., 0]] * 3, -1)
  encoded, middle = _encode(image, 'PNG'), 96 * share / 160 * 256 / 2
  across = _read_fast(encoded, 32, crop=crop).numpy()[..., 0].astype(float).mean(0)
  assert abs(across[0] - (128 - middle)) < 4 and abs(across[-1] - (128 + middle)) < 4


# A short side of 23 or 320 pixels: the part is enlarged, or read whole, at a half, a quarter or an eighth of its size,
# where a corner or side is off by up to seven pixels: 256 / 320 of a level each.
@pytest.mark.parametrize('size, levels', [(64, 0), (320, 0), (150, 4), (75, 6), (36, 12)])
@pytest.mark.parametrize('crop', ['resize_crop', 'random_resized_crop', 'jittered_crop'])
def test_the_part_of_a_jpeg_that_is_decoded_is_the_one_that_was_drawn(crop, size, levels):
  H, W = (23, 31) if size == 64 else (320, 427)
  encoded = _encode(_coordinates(H, W), 'JPEG', quality=100, subsampling=0)
  png = _encode(tf.io.decode_jpeg(encoded).numpy(), 'PNG')
  for i in range(4):
    part, expected = (_read_fast(e, size, _draw(i, crop), crop).numpy()[..., :2].astype(int) for e in (encoded, png))
    assert np.abs(part - expected).max() <= levels


def test_fast_crops_are_uniformly_distributed_over_the_file():
  encoded = _encode(_numbered(5, 9), 'PNG')
  images = _each(lambda draw: _read_fast(encoded, 5, draw, channels=1), 500)
  made = collections.Counter(_positions(image, _numbered(5, 9), 5)[0][1] for image in images)
  assert set(made) == set(range(5)) and all(abs(n - 100) < 4 * np.sqrt(500 * .2 * .8) for n in made.values())


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('crop', ['resize_crop', 'random_resized_crop', 'jittered_crop'])
def test_pngs_that_are_read_together_equal_those_read_one_by_one(crop, training):
  # The size itself, smaller, larger, and too long for any draw of an area.
  files = tf.stack([_encode(_noise(*sides), 'PNG') for sides in [(16, 16), (9, 14), (40, 31), (8, 200)]])
  hashes = tf.stack([hashing.mix_constant('images', i) for i in range(4)])
  draws = image_transforms.draws(hashes, crop, 0.08) if training else {}
  read = image_transforms.png_reader(files, 3, 16, draws, crop)
  for i in range(4):
    np.testing.assert_array_equal(read(i), _read_fast(files[i], 16, _draw(i, crop) if training else None, crop))
  assert image_transforms.are_png(files)
  assert not image_transforms.are_png(tf.concat([files, [_encode(_noise(9, 9), 'JPEG')]], 0))
