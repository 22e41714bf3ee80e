"""From the bytes of a clip to the pixels that a model sees: which frames, which part of them, mirrored or not.

As published: in training the short side is drawn between 256/224 and 320/224 of the size ('jittered_crop'), a random place is cut out,
and half of the clips are mirrored, all frames alike. At evaluation the short side has the size; several views in time and
several crops along the long side may be taken. Resizing is bilinear.
"""

import math

import numpy as np
from PIL import Image

from uni_moe_jax.data.files import video
from uni_moe_jax.data.pipeline import hashing

JITTER = (256 / 224, 320 / 224)  # of the size, the short side
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a random part: its share of the area, width / height; draws


class VideoReader:
  """bytes and hash → uint8 [T, S, S, 3]; with several views or crops [views · crops, T, S, S, 3], views outermost."""

  def __init__(self, size: int, frames: int, crop: str, flip: bool, training: bool, views: int = 1, crops: int = 1):
    """size: S. frames: T. crop: 'resize_crop' | 'jittered_crop' | 'random_resized_crop'. views, crops: at evaluation."""
    self._size, self._crop, self._flip, self._training, self._crops = size, crop, flip, training, crops
    self._views, self._frames = (1 if training else views), frames
    many = self._views * crops > 1 and not training
    self.shape = (*([self._views * crops] if many else []), frames, size, size, 3)

  def __call__(self, data: bytes, h: int) -> np.ndarray:
    """Raises video.CorruptVideo."""
    if self._training:
      shifts = np.array([_uniform(h, 'frame', t) for t in range(self._frames)])
    else:
      shifts = video.views(self._views, self._frames)
    frames = video.sample_frames(data, shifts)
    boxes = [self._random_box(h, *frames.shape[1:3])] if self._training else _boxes(*frames.shape[1:3], self._crops)
    mirrored = self._training and self._flip and _uniform(h, 'flip') < 0.5
    out = np.stack([[_cut(f, box, self._size, mirrored) for f in frames] for box in boxes])  # [crops, views · T, S, S, 3]
    out = out.reshape(len(boxes), self._views, self._frames, *out.shape[2:]).swapaxes(0, 1)
    return out.reshape(self.shape)

  def _random_box(self, h: int, H: int, W: int) -> tuple[float, float, float, float]:
    """left, top, right, bottom of the part of an [H, W] frame that becomes [S, S]."""
    if self._crop == 'random_resized_crop':
      height, width = _area(h, H, W)
    else:
      # Of a frame resized to a short side of r · S, a window of S: of the original, 1 / r of its short side.
      r = 1.0 if self._crop == 'resize_crop' else JITTER[0] + (JITTER[1] - JITTER[0]) * _uniform(h, 'short side')
      height = width = min(H, W) / r
    left, top = (W - width) * _uniform(h, 'crop right'), (H - height) * _uniform(h, 'crop down')
    return left, top, left + width, top + height


def _boxes(H: int, W: int, crops: int) -> list[tuple[float, float, float, float]]:
  """Squares of the short side, evenly spread along the long one; one is the middle."""
  side = min(H, W)
  places = [0.5] if crops == 1 else [i / (crops - 1) for i in range(crops)]
  return [((W - side) * p, (H - side) * p, (W - side) * p + side, (H - side) * p + side) for p in places]


def _area(h: int, H: int, W: int) -> tuple[float, float]:
  """Height and width of a random part; of frames that are too long for ten draws, the largest that the ratios allow."""
  for t in range(TRIES):
    area = H * W * (AREA[0] + (AREA[1] - AREA[0]) * _uniform(h, 'area', t))
    ratio = math.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * _uniform(h, 'ratio', t))
    height, width = math.sqrt(area / ratio), math.sqrt(area * ratio)
    if height <= H and width <= W:
      return height, width
  return min(H, W / RATIO[0]), min(W, H * RATIO[1])


def _cut(frame: np.ndarray, box: tuple[float, float, float, float], size: int, mirrored: bool) -> np.ndarray:
  cut = np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR, box=box))
  return cut[:, ::-1] if mirrored else cut


def _uniform(h: int, *purpose: int | str) -> float:
  return hashing.mix(h, *purpose) / 2**64
