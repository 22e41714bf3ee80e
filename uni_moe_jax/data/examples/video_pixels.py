"""From the bytes of a video to the pixels that a model receives: selection of frames, crop, mirroring.

As published: in training the short side is between 256/224 and 320/224 of the size ('jittered_crop'), the crop's
position is random, and half of the videos are mirrored; all frames are treated equally. In evaluation the short side
has the size; several views in time and several crops along the long side may be taken. Resizing is bilinear. Frames
are taken as `video.py` describes.
"""

import functools
import math

import numpy as np
from PIL import Image

from uni_moe_jax.data.formats import video
from uni_moe_jax.utils import splitmix

_JITTER = (256 / 224, 320 / 224)  # short side, relative to the size
# Of a random part: width / height; number of draws.
ASPECT_RANGE, MAX_DRAWS = (3 / 4, 4 / 3), 10

Box = tuple[float, float, float, float]  # left, top, right, bottom


class VideoReader:
  """(bytes, hash) → uint8 [T, S, S, C]; for views or crops [views · crops, T, S, S, C], views first."""

  def __init__(
      self, size: int, num_frames: int, crop: str, flip: bool, training: bool, num_views: int = 1, num_crops: int = 1,
      frame_stride: float = 0.0, min_area: float = 0.08, channels: int = 3):
    """size: S. num_frames: T. crop: see `image_transforms.read`. num_views, num_crops: in evaluation.

    frame_stride: in frames at 30 per second; 0: frames of segments. min_area: of a random part, as a fraction.
    channels: C, 3 or 1.
    """
    self._frame_stride, self._min_area = frame_stride, min_area
    self._size, self._num_frames, self._crop, self._flip, self._training = size, num_frames, crop, flip, training
    self._num_views, self._num_crops = (1, 1) if training else (num_views, num_crops)
    number = self._num_views * self._num_crops
    self.shape = (*([number] if number > 1 else []), num_frames, size, size, channels)

  def __call__(self, data: bytes, h: int) -> np.ndarray:
    """Raises video.CorruptVideo."""
    frames = video.sample_frames(data, functools.partial(self._indices, h))
    H, W = frames.shape[1:3]
    boxes = [self._random_box(h, H, W)] if self._training else _spread_boxes(H, W, self._num_crops)
    mirrored = self._training and self._flip and is_mirrored(h)
    pixels = np.stack([_crop(f, box, self._size, mirrored) for box in boxes for f in frames])
    out = to_channels(pixels, self.shape[-1]).reshape(self._num_crops, self._num_views, *self.shape[-4:]).swapaxes(0, 1)
    return out.reshape(self.shape)

  def _indices(self, h: int, num_frames: int, fps: float) -> np.ndarray:
    """Indices of the sampled frames: [T], or of views [num_views, T]."""
    T, stride = self._num_frames, self._frame_stride
    if stride and self._training:
      return video.stride_frames(num_frames, stride * fps / video.DEFAULT_FPS, T, splitmix.uniform(h, 'first frame'))
    if stride:
      return video.stride_views(num_frames, stride, fps, T, self._num_views)
    offsets = (np.array([splitmix.uniform(h, 'frame', t) for t in range(T)]) if self._training else
               video.view_offsets(self._num_views, T))
    return video.segment_frames(num_frames, offsets)

  def _random_box(self, h: int, H: int, W: int) -> Box:
    """The part of an [H, W] frame that becomes [S, S]."""
    if self._crop == 'random_resized_crop':
      height, width = _random_sides(h, H, W, self._min_area)
    else:
      # A window of S in a frame with a short side of r · S: 1 / r of the short side of the original.
      low, high = _JITTER
      r = 1.0 if self._crop == 'resize_crop' else low + (high - low) * splitmix.uniform(h, 'short side')
      height = width = min(H, W) / r
    left, top = (W - width) * splitmix.uniform(h, 'crop right'), (H - height) * splitmix.uniform(h, 'crop down')
    return left, top, left + width, top + height


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
  """RGB [T, S, S, 3] as C channels; gray is Pillow's luma."""
  if channels == 3:
    return pixels
  return np.stack([np.asarray(Image.fromarray(f).convert('L')) for f in pixels])[..., None]


def is_mirrored(h: int) -> bool:
  """Whether the video of an example is mirrored in training, if its task mirrors half of them."""
  return splitmix.uniform(h, 'flip') < 0.5


def _spread_boxes(H: int, W: int, number: int) -> list[Box]:
  """Squares of the short side, evenly spread along the long one; a single one is the center."""
  side = min(H, W)
  positions = [0.5] if number == 1 else [i / (number - 1) for i in range(number)]
  return [((W - side) * p, (H - side) * p, (W - side) * p + side, (H - side) * p + side) for p in positions]


def _random_sides(h: int, H: int, W: int, min_area: float) -> tuple[float, float]:
  """Height and width of a random part; if no draw fits, the largest that the ratios allow."""
  log = [math.log(r) for r in ASPECT_RANGE]
  for t in range(MAX_DRAWS):
    area = H * W * (min_area + (1 - min_area) * splitmix.uniform(h, 'area', t))
    ratio = math.exp(log[0] + (log[1] - log[0]) * splitmix.uniform(h, 'ratio', t))
    height, width = math.sqrt(area / ratio), math.sqrt(area * ratio)
    if height <= H and width <= W:
      return height, width
  return min(H, W / ASPECT_RANGE[0]), min(W, H * ASPECT_RANGE[1])


def _crop(frame: np.ndarray, box: Box, size: int, mirrored: bool) -> np.ndarray:
  pixels = np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR, box=box))
  return pixels[:, ::-1] if mirrored else pixels
