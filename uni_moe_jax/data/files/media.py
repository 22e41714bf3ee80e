"""Files of pictures and clips as they are stored: raw bytes where TensorFlow reads them as people see them, else rewritten.

Decoding at training is fast and plain. What it would show wrongly (a turned photograph, transparency, CMYK) or not at all is
settled here, once.
"""

import dataclasses
import io
import pathlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MIN_SIDE = 8  # pixels: less is a mark that follows readers, or a leftover, and no picture
# Formats that tf.io.decode_image reads as Pillow does. Of a BMP it takes the numbers of a palette for levels.
_RAW = ('JPEG', 'PNG', 'WEBP')
_MODES = ('L', 'RGB', '1', 'P')
_ORIENTATION = 0x0112  # of EXIF


class CorruptFile(Exception):
  """A file that gives no example; says why in a few words."""


@dataclasses.dataclass(frozen=True)
class Media:
  """What is stored of a file.

  Attributes:
    data: bytes.
    size: (width, height) of a picture as it will be seen, (frames, width, height) of a clip.
    note: why the bytes are not those of the file, or ''.
  """
  data: bytes
  size: tuple[int, ...]
  note: str = ''


def read_image(path: pathlib.Path) -> Media:
  """A picture. An animated one counts as its first frame, and what is transparent as white.

  Raises:
    CorruptFile: missing, not a picture, cut off, too small or too large.
  """
  data = _bytes(path)
  try:
    return _as_seen(data)
  except CorruptFile:
    raise
  except UnidentifiedImageError:
    raise CorruptFile('not a picture') from None
  except Image.DecompressionBombError:
    raise CorruptFile('too large') from None
  except Exception as e:  # Pillow's decoders document no closed set of what they raise of a damaged file
    raise CorruptFile('broken picture') from e


def _as_seen(data: bytes) -> Media:
  image = Image.open(io.BytesIO(data))
  form, notes = image.format, []
  if getattr(image, 'n_frames', 1) > 1:
    notes.append('animated: first frame')
  image.load()
  turned = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
  if min(turned.size) < MIN_SIDE:
    raise CorruptFile(f'smaller than {MIN_SIDE} pixels')
  if turned is not image:
    notes.append('turned as its camera was')
  if turned.has_transparency_data:
    notes.append('transparent: on white')
    turned = turned.convert('RGBA')
    turned = Image.alpha_composite(Image.new('RGBA', turned.size, 'white'), turned).convert('RGB')
  elif turned.mode not in _MODES and not (form == 'PNG' and turned.mode.startswith('I')):  # 16 bits lose the lower 8
    notes.append(f'colours {turned.mode}')
    turned = turned.convert('RGB')
  if not notes and form not in _RAW:
    notes.append(f'format {form}')
  return Media(_png(turned) if notes else data, turned.size, '; '.join(notes))


def read_video(path: pathlib.Path) -> Media:
  """A video file, as it is; every frame of it must decode. Raises CorruptFile."""
  from uni_moe_jax.data.files import video
  data = _bytes(path)
  try:
    return Media(data, video.probe(data))
  except video.CorruptVideo as e:
    raise CorruptFile('broken clip') from e


class FrameArrays:
  """Clips of .npz files; an opened file is kept until another one is asked for."""

  def __init__(self):
    self._path, self._frames = None, None

  def read_video(self, path: pathlib.Path, index: int) -> Media:
    """Clip `index` of the first array of a file, uint8 [N, T, H, W, 3] or grey [N, T, H, W], as .npy bytes. Raises CorruptFile."""
    if path != self._path:
      self._path, self._frames = path, None
      try:
        with np.load(path) as arrays:
          self._frames = arrays[arrays.files[0]]
      except Exception:  # numpy, zipfile and zlib document no closed set of what they raise of a damaged file
        pass
    frames = self._frames
    if not isinstance(frames, np.ndarray):
      raise CorruptFile('broken array')
    if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.ndim == 5 and frames.shape[-1] != 3:
      raise CorruptFile('array is not uint8 [N, T, H, W, 3]')
    if index >= len(frames):
      raise CorruptFile('a line more than the array has clips')
    one = frames[index] if frames.ndim == 5 else np.repeat(frames[index][..., None], 3, -1)
    out = io.BytesIO()
    np.save(out, one)
    return Media(out.getvalue(), (len(one), one.shape[2], one.shape[1]))


def _bytes(path: pathlib.Path) -> bytes:
  try:
    if path.exists() and not path.is_file():
      raise CorruptFile('unreadable file')  # a folder, or a device or pipe, which may never end
    return path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    raise CorruptFile('missing file') from None
  except (OSError, ValueError):  # the latter of a name with a null character
    raise CorruptFile('unreadable file') from None


def _png(image: Image.Image) -> bytes:
  out = io.BytesIO()
  image.convert('RGB').save(out, 'PNG')
  return out.getvalue()
