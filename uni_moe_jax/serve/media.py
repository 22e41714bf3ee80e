"""Pixels from the bytes of an image or video, bounded before anything is decoded."""

import io

import numpy as np
from PIL import Image, ImageOps

from uni_moe_jax.data.examples.video_pixels import to_channels
from uni_moe_jax.data.formats import media, video
from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.utils.errors import UsageError

_FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')
_NO_VIDEO = 'The video is not a readable file; send mp4, mov, webm, mkv, avi or gif.'
_THUMBNAIL = 96  # pixels of the longer side, at least
_FRAME_MS = 150


def read_image(data: bytes, limits: Limits) -> Image.Image:
  """Decodes an image as displayed, RGB: upright, transparent pixels on white. Raises Refused."""
  try:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
  except Image.DecompressionBombError:
    bound = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's own
    raise Refused(422, f'The image has more than {bound:,} pixels, but at most {min(limits.max_pixels, bound):,} '
                       'are accepted; make it smaller.') from None
  except Exception:  # Pillow documents no closed set of errors for damaged files
    raise Refused(422, f'The image is not a readable file; send one of {", ".join(_FORMATS)}.') from None
  _check_pixels('The image', image.width, image.height, limits)
  try:
    image.load()
    image = media.eight_bits(ImageOps.exif_transpose(image))
    return (media.on_white(image) if image.has_transparency_data else image).convert('RGB')
  except Exception:
    raise Refused(422, 'The image is damaged: its header is valid but its content is not; send it again.') from None


def image_pixels(data: bytes, size: int, channels: int, crop: str, limits: Limits) -> np.ndarray:
  """uint8 [1, S, S, C] of an image, resized and cropped as in evaluation. Raises Refused."""
  image = read_image(data, limits)
  # The crop of evaluation: the center of 256/224 of the size for tasks that train on random parts.
  short = 256 * size // 224 if crop == 'random_resized_crop' else size
  if min(image.size) != short:
    width, height = (short * side // min(image.size) for side in image.size)
    if width * height > limits.max_pixels:
      raise Refused(422, f'The image is {image.width} × {image.height} pixels, which is too elongated; crop it.')
    # First across, as in evaluation: Pillow itself begins with the height of a high image, and rounds in between.
    for sides in ((width, image.height), (width, height)):
      image = image.resize(sides, Image.Resampling.BICUBIC)
  left, top = (round((side - size) / 2) for side in image.size)  # as there, half of an odd margin is rounded to even
  return to_channels(np.asarray(image.crop((left, top, left + size, top + size)))[None], channels)


def video_pixels(
    data: bytes, num_frames: int, size: int, channels: int, limits: Limits, frame_stride: float = 0.0) -> np.ndarray:
  """uint8 [T, S, S, C] of a video: its frames and center crop as in evaluation. Raises Refused.

  frame_stride: of the task, in frames at 30 per second from the first one; 0: the middle frames of T segments.
  """
  if not video.format_of(data):  # FFmpeg reads more, such as playlists, which name other files and addresses
    raise Refused(422, _NO_VIDEO)

  def choose(count: int, fps: float) -> np.ndarray:
    if count > limits.max_frames:
      or_more = ' or more' if count == limits.max_frames + 1 else ''  # no further ones are counted
      raise Refused(422, f'The video has {count:,}{or_more} frames, but at most {limits.max_frames:,} are accepted; '
                         'shorten it.')
    if count / fps > limits.max_seconds:
      raise Refused(422, f'The video is {count / fps:.0f} s long, but at most {limits.max_seconds:g} s are accepted; '
                         'shorten it.')
    return (video.stride_views(count, frame_stride, fps, num_frames, 1) if frame_stride else
            video.segment_frames(count, video.view_offsets(1, num_frames)))[0]

  try:
    _check_pixels('The video', *_frame_size(data), limits)
    frames = video.sample_frames(data, choose, limits.max_frames)
  except UsageError as e:  # no PyAV
    raise Refused(422, f'This service cannot read videos: {e}') from None
  except (video.CorruptVideo, OSError) as e:
    if isinstance(e.__cause__, Refused):
      raise e.__cause__ from None
    raise Refused(422, _NO_VIDEO) from None
  H, W = frames.shape[1:3]
  side = min(H, W)
  box = ((W - side) / 2, (H - side) / 2, (W + side) / 2, (H + side) / 2)
  resized = [np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BILINEAR, box=box)) for f in frames]
  return to_channels(np.stack(resized), channels)


def thumbnail(pixels: np.ndarray) -> bytes:
  """PNG of uint8 [T, S, S, C], enlarged to whole multiples; a video is an animation."""
  frames = [Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f) for f in pixels]
  scale = max(1, -(-_THUMBNAIL // frames[0].width))
  frames = [f.resize((f.width * scale, f.height * scale), Image.Resampling.NEAREST) for f in frames]
  options = dict(save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0) if len(frames) > 1 else {}
  frames[0].save(out := io.BytesIO(), 'PNG', **options)
  return out.getvalue()


def _frame_size(data: bytes) -> tuple[int, int]:
  """(width, height) of a video by its header."""
  try:
    with video.open_container(data) as container:
      stream = container.streams.video[0]
      return stream.width, stream.height
  except UsageError:  # no PyAV
    raise
  except Exception as e:
    raise video.CorruptVideo(str(e)) from e


def _check_pixels(what: str, width: int, height: int, limits: Limits) -> None:
  if width * height > limits.max_pixels:
    raise Refused(422, f'{what} is {width:,} × {height:,} pixels, but at most {limits.max_pixels:,} are accepted; '
                       'make it smaller.')
