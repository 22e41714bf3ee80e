"""Frames of clips, from the bytes that are stored: files of any format that FFmpeg reads (extra `video`), or .npy arrays.

Which frames a model sees is a function of the example's hash alone: the clip is cut into T equal segments and one frame is
taken of each, any one in training, the middle one at evaluation (Wang et al., Temporal Segment Networks, 2016). The published
system takes neighbours at a fixed stride; segments show all of a clip with as few frames.
"""

import io

import numpy as np

_NPY = b'\x93NUMPY'


class Undecodable(Exception):
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


def length(data: bytes) -> int:
  """Frames of a clip: as its container says, or counted. Raises Undecodable."""
  if data.startswith(_NPY):
    return len(_array(data))
  return _decode(data, None)[1]


def sample(data: bytes, shifts: np.ndarray) -> np.ndarray:
  """uint8 [T, H, W, 3]: the frames of a clip that `segments` chooses for shifts [T]; or [V · T, …] for shifts [V, T].

  Raises:
    Undecodable: the bytes are no clip, or one without frames.
  """
  if data.startswith(_NPY):
    frames = _array(data)
    return frames[segments(len(frames), shifts).reshape(-1)]
  return _decode(data, shifts)[0]


def _array(data: bytes) -> np.ndarray:
  try:
    return np.load(io.BytesIO(data))
  except ValueError as e:
    raise Undecodable(str(e)) from e


def _decode(data: bytes, shifts: np.ndarray | None) -> tuple[np.ndarray | None, int]:
  """(the sampled frames or None, how many there are)."""
  try:
    import av
  except ModuleNotFoundError:
    raise ModuleNotFoundError("Clips need PyAV; run: pip install 'uni-moe-jax[video]'") from None
  try:
    with av.open(io.BytesIO(data)) as container:
      stream = container.streams.video[0]
      stream.thread_type = 'AUTO'
      total = stream.frames or sum(1 for _ in container.decode(stream))
      if not total:
        raise Undecodable('no frames')
      if shifts is None:
        return None, total
      wanted = segments(total, shifts)
      found: dict[int, np.ndarray] = {}
      if not stream.frames:
        container.seek(0)
      last = None
      for i, frame in enumerate(container.decode(stream)):
        if i in wanted:
          found[i] = last = frame.to_ndarray(format='rgb24')
        if i >= wanted.max():
          break
      if last is None:
        raise Undecodable('no frames')
      # A container may promise more frames than it holds: the last one stands for those.
      return np.stack([found.get(i, last) for i in wanted.reshape(-1)]), total
  except (av.FFmpegError, IndexError) as e:
    raise Undecodable(str(e)) from e
