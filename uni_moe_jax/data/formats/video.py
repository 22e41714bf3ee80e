"""Frames of videos: files of any format that FFmpeg reads (extra `video`), or .npy arrays.

The sampled frames are a function of the example's hash alone. Either a video is divided into T equal segments, and one
frame of each is taken, a random one in training, the middle one in evaluation (Wang et al., Temporal Segment Networks,
2016): so few frames cover the whole video. Or they are a fixed stride apart, as published: from a random first frame in
training, from the beginning in evaluation, and from the beginning again where the video ends before the last of them.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.data.formats.media import MAX_PIXELS, TOO_MANY_PIXELS
from uni_moe_jax.utils.errors import UsageError

DEFAULT_FPS = 30.0  # frames per second, where they are unknown and of strides
_NPY_MAGIC = b'\x93NUMPY'
# FFmpeg's name of a format → how its files begin.
_FORMATS = {'mov': rb'.{4}ftyp', 'matroska': rb'\x1aE\xdf\xa3', 'gif': rb'GIF8[79]a', 'avi': rb'RIFF.{4}AVI '}
_MIN_DECODED = 0.9  # of the frames that a file declares; containers count some that no decoder returns
_MAX_FRAMES = 100_000  # an hour at 27 frames per second


class CorruptVideo(Exception):
  """Bytes that are not a video; the message is the reason."""


class HugeVideo(CorruptVideo):
  """A video that is too large to be decoded; the message is the bound, in a few words."""


def segment_frames(num_frames: int, offsets: np.ndarray) -> np.ndarray:
  """Indices of the sampled frames, int64 [..., T], from offsets [..., T] in [0, 1) within T segments.

  Segment t starts at frame t · N / T; if N < T, some frames repeat.
  """
  T = offsets.shape[-1]
  return np.minimum(((np.arange(T) + offsets) * num_frames / T).astype(np.int64), num_frames - 1)


def view_offsets(num_views: int, T: int) -> np.ndarray:
  """Offsets [num_views, T] that spread views evenly in the segments; one view takes the middles."""
  return np.broadcast_to(((np.arange(num_views) + 0.5) / num_views)[:, None], (num_views, T))


def stride_frames(num_frames: int, step: float, T: int, position: float) -> np.ndarray:
  """Indices [T], int64, `step` frames apart, from a first frame at a position in [0, 1) among the possible ones."""
  num_starts = max(num_frames - int(step * (T - 1) + 1), 0)
  return (int(position * num_starts) + (np.arange(T) * step).astype(np.int64)) % num_frames


def stride_views(num_frames: int, stride: float, fps: float, T: int, num_views: int) -> np.ndarray:
  """Indices [num_views, T], int64, from the first frame; view v starts v / num_views of a stride later.

  stride: in frames at 30 per second.
  """
  # In this order of operations, as published, which decides where a frame is rounded down.
  indices = (np.arange(num_views * T) * (stride / num_views) * fps / DEFAULT_FPS).astype(np.int64) % num_frames
  return indices.reshape(T, num_views).T


@contextlib.contextmanager
def _reading() -> Iterator[None]:
  """Any error about the bytes becomes CorruptVideo: numpy and PyAV document no closed set of errors."""
  try:
    yield
  except (CorruptVideo, UsageError):
    raise
  except Exception as e:
    raise CorruptVideo(str(e) or type(e).__name__) from e


@_reading()
def probe(data: bytes) -> tuple[int, int, int]:
  """(frames, width, height) of a video as displayed. Decodes every frame to find all damage.

  Raises:
    CorruptVideo: see `sample_frames`; or more than a tenth of the declared frames is missing or corrupt.
    HugeVideo: it has too many frames.
  """
  if data.startswith(_NPY_MAGIC):
    T, H, W, _ = _load_array(data).shape
    return T, W, H
  container, stream = _open(data)
  with container:
    sizes = []
    for frame in container.decode(stream):
      if not frame.is_corrupt:
        sizes.append((frame.width, frame.height)[::-1 if _quarter_turns(frame) % 2 else 1])
      if len(sizes) > _MAX_FRAMES:
        raise HugeVideo(f'more than {_MAX_FRAMES} frames')
    if not sizes or len(sizes) < _MIN_DECODED * stream.frames:
      raise CorruptVideo(f'{len(sizes)} frames of {stream.frames}')
  return len(sizes), *_one_size(sizes)


@_reading()
def sample_frames(
    data: bytes, choose: Callable[[int, float], np.ndarray], max_frames: int | None = None) -> np.ndarray:
  """Frames [T] or [V, T] of a video: uint8 [T, H, W, 3] or [V · T, H, W, 3].

  choose: (number of frames, frames per second) → their indices; an array has 30 frames per second.
  max_frames: above which `choose` raises. It is called before the frames of a file that declares no number are decoded,
    which can take minutes, with the number of packets, and of those one more than the bound is the last one read.

  Raises:
    CorruptVideo: the bytes are not a video, or it has no frames. HugeVideo: frames have too many pixels.
  """
  if data.startswith(_NPY_MAGIC):
    array = _load_array(data)
    return array[choose(len(array), DEFAULT_FPS).reshape(-1)]
  container, stream = _open(data)
  with container:
    limit, fps = max_frames and max_frames + 1, float(stream.average_rate or DEFAULT_FPS)
    packets = list(itertools.islice((packet for packet in container.demux(stream) if packet.size), limit))
    codec = stream.codec_context
    if not (num_frames := stream.frames):
      if max_frames:
        choose(len(packets), fps)
      num_frames = sum(1 for _ in itertools.islice(_decode_all(codec, packets), limit))
      codec.flush_buffers()
    indices = choose(num_frames, fps).reshape(-1).tolist()
    reformat = _pyav().video.reformatter.VideoReformatter().reformat  # frames would make one each
    frames = {i: np.rot90(reformat(frame, format='rgb24', threads=1).to_ndarray(), _quarter_turns(frame))
              for i, frame in _decode(codec, packets, num_frames, sorted(set(indices))).items()}
  if not frames:
    raise CorruptVideo('no frames')
  _one_size(frame.shape for frame in frames.values())
  # A container may declare more frames than it has: the last one replaces those.
  last = frames[max(frames)]
  return np.stack([frames.get(i, last) for i in indices])


def _decode(codec: Any, packets: Sequence[Any], num_frames: int, wanted: Sequence[int]) -> dict[int, Any]:
  """{index: frame} of the wanted ones, ascending; each is decoded from the key frame before it."""
  times = [packet.pts for packet in packets]
  if None in times or len(set(times)) != num_frames or any(packet.is_discard for packet in packets):
    # Which packet has which frame is unknown.
    return {i: frame for i, frame in zip(range(wanted[-1] + 1), _decode_all(codec, packets)) if i in wanted}
  times = {time: i for i, time in enumerate(sorted(times))}  # packets are in order of decoding
  keys = [(times[packet.pts], i) for i, packet in enumerate(packets) if packet.is_keyframe]
  frames, position = {}, 0
  for index in wanted:
    key = max((i for first, i in keys if first <= index), default=0)
    if key > position:
      codec.flush_buffers()
      position = key
    while index not in frames and position <= len(packets):
      for frame in codec.decode(packets[position] if position < len(packets) else None):
        if (i := times.get(frame.pts)) in wanted:
          frames[i] = frame
      position += 1
  return frames


def _decode_all(codec: Any, packets: Iterable[Any]) -> Iterator[Any]:
  for packet in itertools.chain(packets, [None]):  # None: frames that wait for later ones
    yield from codec.decode(packet)


def _load_array(data: bytes) -> np.ndarray:
  frames = np.load(io.BytesIO(data))
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
    raise CorruptVideo(f'an array {frames.dtype}{list(frames.shape)}, not uint8 [T, H, W, 3]')
  return frames


def check_decoder(data: bytes) -> None:
  """Raises UsageError if a video needs PyAV, which is not installed."""
  if not data.startswith(_NPY_MAGIC):
    _pyav()


def _pyav() -> Any:
  try:
    import av
  except ModuleNotFoundError:
    raise UsageError("Videos need PyAV; run: pip install 'uni-moe-jax[video]'") from None
  return av


def format_of(data: bytes) -> str | None:
  """FFmpeg's name of the format of a video, by its first bytes; None for others than mp4, mov, webm, mkv, avi, gif."""
  return next((name for name, magic in _FORMATS.items() if re.match(magic, data, re.DOTALL)), None)


def open_container(data: bytes) -> Any:
  """PyAV's container of a video.

  FFmpeg does not choose the format where the first bytes do, and opens no other address: it takes what has the lines of
  an SDP or a playlist for one, whatever it begins with, and receives from the hosts that it names.
  """
  return _pyav().open(io.BytesIO(data), format=format_of(data), options={'protocol_whitelist': ''})


def _open(data: bytes) -> tuple[Any, Any]:
  """PyAV's container and its first video stream."""
  container = open_container(data)
  stream = container.streams.video[0]
  if stream.width * stream.height > MAX_PIXELS:
    raise HugeVideo(TOO_MANY_PIXELS)
  # A stream may change its size; FFmpeg counts the padding of a frame, too.
  stream.codec_context.options = {'max_pixels': str(2 * MAX_PIXELS)}
  stream.codec_context.thread_count = 1  # other videos are decoded at the same time
  return container, stream


def _one_size(sizes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
  if len(distinct := set(sizes)) > 1:
    raise CorruptVideo('frames of several sizes')
  return distinct.pop()


def _quarter_turns(frame: Any) -> int:
  """Quarter turns to the left until a frame is upright: a phone stores the rotation as metadata."""
  return round(frame.rotation / 90)
