"""Videos of an .npz file, one in memory at a time.

A file of one megabyte may declare an array of gigabytes. So the array's header is checked before anything of its size
is allocated, and the file is decompressed in small pieces.
"""

import contextlib
import hashlib
import io
import math
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np

from uni_moe_jax.data.formats.media import MAX_PIXELS, TOO_MANY_PIXELS, CorruptFile, Media

MAX_VIDEO_BYTES = 2**28
_PIECE = 2**20  # bytes decompressed at once
# Python's module bounds what these decompress at once, but not the others.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class NpzVideos:
  """The first array of an .npz file, uint8 [N, T, H, W, 3], or [N, T, H, W] in shades of gray."""

  def __init__(self, path: pathlib.Path):
    """Checks the whole file once. Raises CorruptFile: it is damaged, contains another array, or has huge videos."""
    with _reading():
      archive = zipfile.ZipFile(path)
      member = archive.infolist()[0]
      if member.compress_type not in _METHODS:
        raise CorruptFile('array is compressed by another method than deflate')
      self._file = archive.open(member)
      self._shape = _read_shape(self._file)
      self._start = self._file.tell()
      if member.file_size != self._start + math.prod(self._shape):
        raise CorruptFile('corrupt array')
      while self._file.read(_PIECE):  # at its end, the checksum is compared
        pass

  def read(self, index: int) -> Media:
    """Reads one video, as .npy of uint8 [T, H, W, 3]. Raises CorruptFile."""
    N, *shape = self._shape
    if index >= N:
      raise CorruptFile('more lines than the array has videos')
    size = math.prod(shape)
    with _reading():
      self._file.seek(self._start + index * size)
      video = np.frombuffer(self._file.read(size), np.uint8).reshape(shape)
    np.save(out := io.BytesIO(), video if len(shape) == 4 else np.repeat(video[..., None], 3, -1))
    T, H, W = shape[:3]
    return Media(out.getvalue(), (T, W, H), digest=hashlib.sha256(out.getvalue()).digest())


def open_videos(path: pathlib.Path) -> NpzVideos | str:
  """The videos of a file, or why they cannot be read."""
  try:
    return NpzVideos(path)
  except CorruptFile as e:
    return str(e)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
  """Any error about the bytes becomes CorruptFile: numpy, zipfile and zlib document no closed set of errors."""
  try:
    yield
  except CorruptFile:
    raise
  except Exception as e:
    raise CorruptFile('corrupt array') from e


def _read_shape(file: zipfile.ZipExtFile) -> tuple[int, ...]:
  """Reads the header of an array. Raises CorruptFile unless its videos can be used; ValueError if it is damaged."""
  if np.lib.format.read_magic(file) != (1, 0):  # in others, a header may be 4 GiB long; numpy writes them for records
    raise CorruptFile('corrupt array')
  shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
  is_color = len(shape) == 5 and shape[4] == 3
  if dtype != np.uint8 or not (is_color or len(shape) == 4) or shape[0] < 0 or min(shape[1:]) < 1:
    raise CorruptFile('array is not uint8 [N, T, H, W, 3]')
  if is_fortran:
    raise CorruptFile('array is in Fortran order; save np.ascontiguousarray(array)')
  T, H, W = shape[1:4]
  if H * W > MAX_PIXELS:
    raise CorruptFile(TOO_MANY_PIXELS)
  if T * H * W * 3 > MAX_VIDEO_BYTES:
    raise CorruptFile(f'video of more than {MAX_VIDEO_BYTES >> 20} MiB')
  return shape
