"""Frames of clips, from the bytes that are stored: files of any format that FFmpeg reads (extra `video`), or .npy arrays.

Which frames a model sees is a function of the example's hash alone: the clip is cut into T equal segments and one frame is
taken of each, any one in training, the middle one at evaluation (Wang et al., Temporal Segment Networks, 2016). The published
system takes neighbours at a fixed stride; segments show all of a clip with as few frames.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from uni_moe_jax.utils.errors import UsageError

_NPY = b'\x93NUMPY'
_WHOLE = 0.9  # of the frames that a file promises: containers count some that no decoder gives
_SIZES = 'frames of several sizes'


class CorruptVideo(Exception):
  """Bytes that are no clip."""


def segments(frames: int, shifts: np.ndarray) -> np.ndarray:
  """Indices of the sampled frames, int64 of the shape of `shifts`.

  Segment t of T covers the frames from t · N / T on; a clip of fewer frames than T repeats some.

  Args:
    frames: N, at least 1.
    shifts: float [..., T] in [0, 1), where in its segment a frame is taken; 0.5 is the middle.
  """
  T = shifts.shape[-1]
  return np.minimum(((np.arange(T) + shifts) * frames / T).astype(np.int64), frames - 1)


def views(number: int, T: int) -> np.ndarray:
  """Shifts [number, T] that spread `number` views of a clip evenly within its segments; one view has the middles."""
  return np.broadcast_to(((np.arange(number) + 0.5) / number)[:, None], (number, T))


def probe(data: bytes) -> tuple[int, int, int]:
  """(frames, width, height) of a clip, as it is seen. Every frame is decoded: what is damaged in the middle shows nowhere else.

  Raises:
    CorruptVideo: see `sample`; or a frame is broken, or more than a tenth of those that the file promises is missing.
  """
  if data.startswith(_NPY):
    T, H, W, _ = _array(data).shape
    return T, W, H
  with _opened(data) as (container, stream):
    sizes = [(frame.width, frame.height)[::-1 if _turns(frame) % 2 else 1]
             for frame in container.decode(stream) if not frame.is_corrupt]
    promised = stream.frames
  if not sizes or len(sizes) < _WHOLE * promised:
    raise CorruptVideo(f'{len(sizes)} frames of {promised}')
  if len(set(sizes)) > 1:
    raise CorruptVideo(_SIZES)
  return len(sizes), *sizes[0]


def sample_frames(data: bytes, shifts: np.ndarray) -> np.ndarray:
  """uint8 [T, H, W, 3]: the frames of a clip that `segments` chooses for shifts [T]; or [V · T, …] for shifts [V, T].

  Raises:
    CorruptVideo: the bytes are no clip, or one without frames.
  """
  if data.startswith(_NPY):
    frames = _array(data)
    return frames[segments(len(frames), shifts).reshape(-1)]
  return _decoded(data, shifts)


def _array(data: bytes) -> np.ndarray:
  try:
    frames = np.load(io.BytesIO(data))
  except Exception as e:  # numpy documents no closed set of what it raises of a damaged file
    raise CorruptVideo(_said(e)) from e
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
    raise CorruptVideo(f'an array {frames.dtype}{list(frames.shape)}, not uint8 [T, H, W, 3]')
  return frames


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
  """PyAV's container and its first stream of pictures; whatever they raise of the bytes becomes CorruptVideo."""
  try:
    import av
  except ModuleNotFoundError:
    raise UsageError("Clips need PyAV; run: pip install 'uni-moe-jax[video]'") from None
  try:
    with av.open(io.BytesIO(data)) as container:
      stream = container.streams.video[0]
      stream.thread_type = 'AUTO'
      yield container, stream
  except CorruptVideo:
    raise
  except Exception as e:  # PyAV documents no closed set either
    raise CorruptVideo(_said(e)) from e


def _turns(frame: Any) -> int:
  """Quarter turns to the left until a frame stands upright: a phone writes down how it was held, and turns nothing."""
  return round(frame.rotation / 90)


def _said(e: Exception) -> str:
  return str(e) or type(e).__name__


def _decoded(data: bytes, shifts: np.ndarray) -> np.ndarray:
  """The sampled frames."""
  with _opened(data) as (container, stream):
    total = stream.frames or sum(1 for _ in container.decode(stream))
    if not total:
      raise CorruptVideo('no frames')
    wanted = segments(total, shifts)
    found: dict[int, np.ndarray] = {}
    if not stream.frames:
      container.seek(0)
    last = None
    for i, frame in enumerate(container.decode(stream)):
      if i in wanted:
        found[i] = last = np.rot90(frame.to_ndarray(format='rgb24'), _turns(frame))
      if i >= wanted.max():
        break
    if last is None:
      raise CorruptVideo('no frames')
    if len({frame.shape for frame in found.values()}) > 1:
      raise CorruptVideo(_SIZES)
    # A container may promise more frames than it holds: the last one stands for those.
    return np.stack([found.get(i, last) for i in wanted.reshape(-1)])
