"""Image and video files as stored: the original bytes if TensorFlow decodes them correctly.

Decoding in training is fast and plain. Whatever it would show wrongly (rotated photographs, transparency, CMYK) or
could not read is converted once, when data is prepared.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
import stat

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from uni_moe_jax.utils.errors import UsageError

_PNG_END = b'IEND\xaeB`\x82'  # the last chunk and its checksum
MIN_SIDE = 8  # pixels; smaller images are tracking pixels and leftovers
# A small file may declare a huge image: sizes are checked before anything is decoded.
MAX_BYTES = 2**30  # of a file
MAX_PIXELS = 2**26  # of an image or frame
TOO_LARGE = f'larger than {MAX_BYTES >> 30} GiB'
TOO_MANY_PIXELS = f'more than {MAX_PIXELS // 10**6} megapixels'
# Formats that tf.io.decode_image reads as Pillow does. It takes the palette indices of a BMP for levels.
_PLAIN_FORMATS = ('JPEG', 'PNG', 'WEBP')
_PLAIN_MODES = ('L', 'RGB', '1', 'P')
_EXIF_ORIENTATION = 0x0112
_PHOTOGRAPHS = ('JPEG', 'MPO')  # MPO: of phones, a JPEG and further ones behind it
_SQUARE = 2  # 4:2:0, the usual subsampling, which may be rotated


class CorruptFile(Exception):
  """A file that gives no example; the message is the reason, in a few words."""


@dataclasses.dataclass(frozen=True)
class Media:
  """Stored content of a file."""
  data: bytes
  size: tuple[int, ...]  # (width, height) of an image as displayed, (frames, width, height) of a video
  note: str = ''  # why the bytes differ from those of the file
  digest: bytes = b''  # sha256 of the file's content


def check(media_type: str, data: bytes) -> Media:
  """The stored content of an image or video. Raises CorruptFile."""
  if len(data) > MAX_BYTES:
    raise CorruptFile(TOO_LARGE)
  return check_image(data) if media_type == 'image' else check_video(data)


def check_image(data: bytes) -> Media:
  """Decodes an image: of an animation the first frame, transparent pixels on white. Raises CorruptFile."""
  try:
    return _as_displayed(data)
  except CorruptFile:
    raise
  except UnidentifiedImageError:
    raise CorruptFile('not an image') from None
  except Image.DecompressionBombError:
    raise CorruptFile(TOO_MANY_PIXELS) from None
  except Exception as e:  # Pillow's decoders document no closed set of errors for damaged files
    raise CorruptFile('corrupt image') from e


def _as_displayed(data: bytes) -> Media:
  image = Image.open(io.BytesIO(data))
  if image.width * image.height > MAX_PIXELS:
    raise CorruptFile(TOO_MANY_PIXELS)
  original = image
  digest, file_format, notes = hashlib.sha256(data).digest(), image.format, []
  if file_format == 'PNG' and _PNG_END not in data:  # Pillow loads it; TensorFlow, in training, does not
    raise CorruptFile('truncated')
  if getattr(image, 'n_frames', 1) > 1:
    notes.append('animated: first frame')
  image.load()
  if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
    notes.append('rotated as EXIF says')
    image = ImageOps.exif_transpose(image)
  if min(image.size) < MIN_SIDE:
    raise CorruptFile(f'smaller than {MIN_SIDE} pixels')
  if image.has_transparency_data:
    notes.append('transparent: on white')
  elif image.mode not in _PLAIN_MODES and not (file_format == 'PNG' and image.mode.startswith('I')):
    notes.append(f'color mode {image.mode}')  # TensorFlow reads a PNG of 16 bits itself, and drops the lower 8
  if not notes and file_format not in _PLAIN_FORMATS:
    notes.append(f'format {file_format}')
  if notes:
    if image.mode != 'I' or file_format == 'PPM':  # other formats have 32 bits in this mode, of an unknown range
      image = eight_bits(image)  # Pillow's conversion would make all that is not nearly black white
    image = on_white(image) if image.has_transparency_data else image
    if file_format in _PHOTOGRAPHS and image.mode in ('L', 'RGB'):  # as PNG it would be several times as large
      subsampling = JpegImagePlugin.get_sampling(original)
      image.save(out := io.BytesIO(), 'JPEG', qtables=[*original.quantization.values()],
                 subsampling=subsampling if subsampling == _SQUARE else 0)
    else:
      image.convert('RGB').save(out := io.BytesIO(), 'PNG')
    data = out.getvalue()
  return Media(data, image.size, '; '.join(notes), digest)


def on_white(image: Image.Image) -> Image.Image:
  """A transparent image as people see it."""
  image = image.convert('RGBA')
  return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)


def eight_bits(image: Image.Image) -> Image.Image:
  """A gray image of 16 bits by its upper 8, as training reads it; others as they are."""
  if not image.mode.startswith('I'):
    return image
  levels = np.asarray(image)
  shown = Image.fromarray((levels >> 8).astype(np.uint8))
  if 'transparency' in image.info:  # the level of transparent pixels, by all of its bits
    shown.putalpha(Image.fromarray(np.where(levels == image.info['transparency'], 0, 255).astype(np.uint8)))
  return shown


def check_video(data: bytes) -> Media:
  """Keeps a video as it is; every frame must decode. Raises CorruptFile."""
  from uni_moe_jax.data.formats import video
  try:
    return Media(data, video.probe(data), digest=hashlib.sha256(data).digest())
  except video.HugeVideo as e:
    raise CorruptFile(str(e)) from None
  except video.CorruptVideo as e:
    raise CorruptFile('corrupt video') from e
  except UsageError as e:  # a few videos among images are skipped anyway
    raise CorruptFile(str(e)) from None


def read_bytes(path: pathlib.Path) -> bytes:
  """The content of a file. Raises CorruptFile."""
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
      raise CorruptFile('unreadable file')  # a folder; or a device or pipe, which may never end
    if status.st_size > MAX_BYTES:
      raise CorruptFile(TOO_LARGE)
    return path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    raise CorruptFile('missing file') from None
  except (OSError, ValueError):  # ValueError: a null character in the name
    raise CorruptFile('unreadable file') from None
