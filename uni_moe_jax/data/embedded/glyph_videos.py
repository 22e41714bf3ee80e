"""Glyph videos: the glyph images in motion, eight frames each, balanced over twelve motions.

The position, size, angle and brightness of a glyph in the middle of a video have nearly the same distribution for every
motion, so a single frame says little about the motion: a model has to compare frames.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from uni_moe_jax.data.embedded.glyphs import SIZE
from uni_moe_jax.data.shards.writer import Columns, Split

FRAMES = 8
_BLINK = 'blink'
# Change per frame, in units of _SPEEDS: x (to the right), y (down), size, angle (clockwise), brightness.
_DIRECTIONS = {
    'stand still': (0, 0, 0, 0, 0),
    'move left': (-1, 0, 0, 0, 0), 'move right': (1, 0, 0, 0, 0),
    'move up': (0, -1, 0, 0, 0), 'move down': (0, 1, 0, 0, 0),
    'grow': (0, 0, 1, 0, 0), 'shrink': (0, 0, -1, 0, 0),
    'turn left': (0, 0, 0, -1, 0), 'turn right': (0, 0, 0, 1, 0),
    _BLINK: (0, 0, 0, 0, 0),
    'fade in': (0, 0, 0, 0, 1), 'fade out': (0, 0, 0, 0, -1),
}
MOTIONS = tuple(_DIRECTIONS)

# Ranges: x and y in pixels, size in octaves, angle in degrees, brightness relative to the image.
_SPEEDS = np.array([(1.0, 1.6), (1.0, 1.6), (0.08, 0.14), (9.0, 15.0), (0.09, 0.13)])
_STARTS = np.array([(-1.0, 1.0), (-1.0, 1.0), (-0.15, 0.05), (-4.0, 4.0), (0.45, 0.9)])
_ANCHORS = (2.0, 5.0)  # the time, in frames, when the glyph is at its start
_DIM = 0.35  # brightness between blinks: darkness would reveal "blink" in a single frame
_MIN_BRIGHTNESS = 0.05

NUM_VIDEOS = {'train': 16_008, 'validation': 1_008, 'test_characters': 2_004, 'test_fonts': 2_004}


def _draws(split: str, index: int) -> np.ndarray:
  """Returns eight numbers in [0, 1) for one video, float64 [8]; the same on every machine."""
  digest = hashlib.sha256(f'glyph clip {split} {index}'.encode()).digest()
  return np.frombuffer(digest, '<u4') / 2**32


def poses(motion: str, draws: np.ndarray) -> np.ndarray:
  """Returns the poses of a glyph, float64 [T, 5]: x, y (pixels), size, angle (degrees, clockwise), brightness.

  draws: seven numbers in [0, 1): start of x, y, size, angle and brightness; anchor; speed.
  """
  def draw(ranges, u):
    low, high = np.transpose(ranges)
    return low + (high - low) * u

  start, anchor = draw(_STARTS, draws[:5]), draw(_ANCHORS, draws[5])
  rate = np.array(_DIRECTIONS[motion]) * draw(_SPEEDS, draws[6])
  frames = np.arange(FRAMES)
  pose = start + rate * (frames - anchor)[:, None]
  pose[:, 2] = np.exp2(pose[:, 2])
  if motion == _BLINK:
    # On and off for one or two frames at a time, with a random phase.
    half = 1 + int(2 * draws[6])
    phase = int(2 * half * draws[5])
    pose[:, 4] *= np.where((frames + phase) // half % 2, _DIM, 1.0)
  pose[:, 4] = pose[:, 4].clip(_MIN_BRIGHTNESS, 1.0)
  return pose


def render(image: np.ndarray, pose: np.ndarray) -> np.ndarray:
  """Draws an image, uint8 [SIZE, SIZE], in the poses [T, 5] of `poses`: uint8 [T, SIZE, SIZE]."""
  source, middle, frames = Image.fromarray(image), SIZE / 2, []
  for x, y, size, angle, _ in pose:
    # Pillow maps output pixels to input pixels, so the matrix is that of the inverse motion.
    cos, sin = math.cos(math.radians(angle)) / size, math.sin(math.radians(angle)) / size
    matrix = (cos, sin, middle - cos * (middle + x) - sin * (middle + y),
              -sin, cos, middle + sin * (middle + x) - cos * (middle + y))
    frames.append(source.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
  brightness = pose[:, 4].astype(np.float32)[:, None, None]
  return np.rint(np.stack(frames) * brightness).astype(np.uint8)


def splits(images: Callable[[str], Columns], report: Callable[[str], None] = print,
           num_videos: Mapping[str, int] = NUM_VIDEOS) -> Iterator[Split]:
  """Yields SPLITS: pixels uint8 [N, 8, 32, 32], and name, face, motion as text [N]. images: the glyphs of a split."""
  for split, number in num_videos.items():
    columns = _make_columns(split, images(split), number)
    report(f'videos: {split} has {number} videos of {len(np.unique(columns["name"]))} characters')
    yield split, columns, {'motion': MOTIONS}


def _make_columns(split: str, images: Columns, number: int) -> Columns:
  """Returns the columns of the videos of one split; motions alternate."""
  motions = np.resize(MOTIONS, number)
  draws = np.stack([_draws(split, index) for index in range(len(motions))])
  chosen = (draws[:, 0] * len(images['name'])).astype(np.int64)
  pixels = np.empty((len(motions), FRAMES, SIZE, SIZE), np.uint8)
  for index, motion in enumerate(motions):
    pixels[index] = render(images['pixels'][chosen[index]], poses(motion, draws[index, 1:]))
  return {'pixels': pixels, 'name': images['name'][chosen], 'face': images['face'][chosen], 'motion': motions}
