"""Thumbnails of records: small pixels without the transforms of a task, for baselines."""

import concurrent.futures
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from uni_moe_jax.data.formats import media, video
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.data.shards.record_format import CorruptExample, Record
from uni_moe_jax.utils import cores
from uni_moe_jax.utils.errors import UsageError

SIDE = 32  # pixels
_CHUNK = {'array': 256, 'image': 256, 'video': 16}  # records in memory at once


def read(records: FileDataset, ids: np.ndarray, num_frames: int) -> Iterator[tuple[Record, np.ndarray] | None]:
  """Yields (record, uint8 [T, SIDE, SIDE, 3]) of each id in order; None: it cannot be read or decoded.

  Takes the center of an image or of evenly spaced frames; an array stays as it is. num_frames: T of videos; an image
  has one.
  """
  column = records.media_column()
  column_type = records.columns[column]

  def make(record):
    if isinstance(record, CorruptExample):
      return None
    if column_type == 'array':
      return record, record[column]
    try:
      return record, _image(record[column]) if column_type == 'image' else _frames(record[column], num_frames)
    except UsageError:  # videos need PyAV
      raise
    except Exception:  # Pillow, numpy and PyAV document no closed set of errors for damaged files
      return None

  with concurrent.futures.ThreadPoolExecutor(cores.available()) as pool:  # decoders release Python's lock
    for start in range(0, len(ids), _CHUNK[column_type]):
      yield from pool.map(make, records.read_valid(ids[start:start + _CHUNK[column_type]]))


def _image(data: bytes) -> np.ndarray:
  image = Image.open(io.BytesIO(data))
  image.draft('RGB', (2 * SIDE, 2 * SIDE))  # JPEG is decoded at a fraction of its size
  return _fit(media.eight_bits(image))[None]


def _frames(data: bytes, num_frames: int) -> np.ndarray:
  [offsets] = video.view_offsets(1, num_frames)
  frames = video.sample_frames(data, lambda number, _: video.segment_frames(number, offsets))
  return np.stack([_fit(Image.fromarray(frame)) for frame in frames])


def _fit(image: Image.Image) -> np.ndarray:
  return np.asarray(ImageOps.fit(image.convert('RGB'), (SIDE, SIDE), Image.Resampling.BILINEAR))
