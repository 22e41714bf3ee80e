"""Videos read in other processes.

Decoders take Python's lock for every packet and frame, so that threads of one process wait for each other: on two cores
they read hardly more than on one. A video that crashes its decoder costs an example, and not the run.

Videos and pixels are in memory that both processes map: pipes would copy them twice, 64 kB at a time.
"""

import concurrent.futures
import contextlib
import itertools
import math
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from uni_moe_jax.data.examples.video_pixels import VideoReader
from uni_moe_jax.data.formats.video import CorruptVideo
from uni_moe_jax.utils import cores, heap, module_process

_MAX_PROCESSES = 32  # each takes about 60 MB
# Messages are pickled: a request (reader, bytes of each video, hash of each), a result [problem or None of each video].
_ENDED = EOFError, OSError, pickle.UnpicklingError  # of a stream whose other process has ended, within a message, too
_KEPT = 1 << 26  # bytes of freed memory: a process that allocates frames anew takes a quarter more time
_SECONDS = 5.0  # for a process to end


class VideoProcesses:
  """As many processes as there are cores, for all tasks and threads. They start with the first video.

  With one core there are none, and the caller reads.
  """

  def __init__(self, num_cores: int | None = None):
    """num_cores: default: of this machine."""
    self._num_processes = min(num_cores or cores.available(), _MAX_PROCESSES)
    self._threads = concurrent.futures.ThreadPoolExecutor(self._num_processes, 'videos')
    self._local = threading.local()  # each thread has a process

  def read(self, reader: VideoReader, videos: Sequence[bytes], hashes: Sequence[int],
           out: Sequence[np.ndarray]) -> list[CorruptVideo | None]:
    """Writes what `reader` returns of each video to its array of `out`. Returns why a video cannot be read, or None."""
    if self._num_processes == 1:
      return [_read(reader, *video) for video in zip(videos, hashes, out, strict=True)]
    bounds = [len(videos) * k // self._num_processes for k in range(self._num_processes + 1)]
    parts = [slice(*part) for part in itertools.pairwise(bounds)]
    made = self._threads.map(lambda part: self._read_elsewhere(reader, videos[part], hashes[part], out[part]), parts)
    return list(itertools.chain.from_iterable(made))

  def _read_elsewhere(self, reader: VideoReader, videos: Sequence[bytes], hashes: Sequence[int],
                      out: Sequence[np.ndarray]) -> list[CorruptVideo | None]:
    if not videos:
      return []
    process = getattr(self._local, 'process', None)
    if process is None:
      process = self._local.process = _Process()
    try:
      return process.read(reader, videos, hashes, out)
    except BaseException as e:
      del self._local.process  # it may still answer, which the next videos must not get
      if not isinstance(e, _ENDED):
        raise
    if len(videos) == 1:
      return [CorruptVideo(f'its decoder ended with exit code {process.exit_code()}')]
    one_by_one = (slice(i, i + 1) for i in range(len(videos)))
    return [p for i in one_by_one for p in self._read_elsewhere(reader, videos[i], hashes[i], out[i])]


class _Shared:
  """The content of an open file as memory of every process that has it open."""

  def __init__(self, file: BinaryIO):
    self.file, self._map = file, None

  def arrays(self, sizes: Sequence[int], shape: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Memory for videos of `sizes` bytes, and for the pixels of each, uint8 [n, *shape]; it grows if need be."""
    bounds = [0, *itertools.accumulate(sizes)]
    size = bounds[-1] + len(sizes) * math.prod(shape)
    if self._map is None or len(self._map) < size:
      if os.fstat(self.file.fileno()).st_size < size:
        os.ftruncate(self.file.fileno(), size)
      self._map = mmap.mmap(self.file.fileno(), size)
    content = np.frombuffer(self._map, np.uint8)
    videos = [content[start:stop] for start, stop in itertools.pairwise(bounds)]
    return videos, content[bounds[-1]:size].reshape(len(sizes), *shape)


def _unnamed_file() -> BinaryIO:
  """Of memory where the system has such files."""
  return os.fdopen(os.memfd_create('videos'), 'r+b') if hasattr(os, 'memfd_create') else tempfile.TemporaryFile()


def _read(reader: VideoReader, data: bytes, h: int, out: np.ndarray) -> CorruptVideo | None:
  try:
    out[:] = reader(data, h)
    return None
  except CorruptVideo as e:
    return e


class _Process:
  """A process that runs `main`. It ends when its input does, and so with this process, however that ends."""

  def __init__(self):
    self._shared = _Shared(_unnamed_file())
    self._popen = module_process.start(__name__, self._shared.file.fileno(), subprocess.PIPE)
    self._end = weakref.finalize(self, _end, self._popen, os.getpid())

  def read(self, reader: VideoReader, videos: Sequence[bytes], hashes: Sequence[int],
           out: Sequence[np.ndarray]) -> list[CorruptVideo | None]:
    """As `VideoProcesses.read`. Raises one of `_ENDED` if the process has ended."""
    requests, results = self._popen.stdin, self._popen.stdout
    assert requests and results
    sizes = list(map(len, videos))
    copies, pixels = self._shared.arrays(sizes, reader.shape)
    for copy, data in zip(copies, videos, strict=True):
      copy[:] = np.frombuffer(data, np.uint8)
    _send(requests, (reader, sizes, hashes))
    problems = pickle.load(results)
    for row, made, problem in zip(out, pixels, problems, strict=True):
      if not problem:
        row[:] = made
    return problems

  def exit_code(self) -> int:
    self._end()
    return self._popen.returncode


def _end(popen: subprocess.Popen, owner: int) -> None:
  if os.getpid() != owner:  # a fork, which drops what other threads have; waiting there would not end
    return
  try:
    popen.communicate(timeout=_SECONDS)
  except subprocess.TimeoutExpired:
    popen.kill()
    popen.communicate()


def _send(stream: BinaryIO, message: Any) -> None:
  stream.write(pickle.dumps(message))  # as a whole: what cannot be pickled leaves the stream as it was
  stream.flush()


def main() -> None:
  """Reads videos, as requests on standard input say, and writes pixels beside them."""
  heap.keep_up_to(_KEPT)
  requests, results, shared = sys.stdin.buffer, sys.stdout.buffer, _Shared(os.fdopen(int(sys.argv[1]), 'r+b'))
  with contextlib.suppress(EOFError, pickle.UnpicklingError):
    while True:
      reader, sizes, hashes = pickle.load(requests)
      videos, pixels = shared.arrays(sizes, reader.shape)
      problems = [_read(reader, data.tobytes(), h, row) for data, h, row in zip(videos, hashes, pixels, strict=True)]
      try:
        _send(results, problems)
      except BrokenPipeError:
        os._exit(0)  # the other process has ended; an end as usual would try to write what is left


if __name__ == '__main__':
  main()
