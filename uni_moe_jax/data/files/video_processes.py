"""Videos read in other processes.

Decoders take Python's lock for every packet and frame, so that threads of one process wait for each other: on two cores
they read hardly more than on one. A video that crashes its decoder costs an example, and not the run.
"""

import concurrent.futures
import itertools
import os
import pickle
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from uni_moe_jax.data.files.video import CorruptVideo
from uni_moe_jax.data.files.video_pixels import VideoReader
from uni_moe_jax.utils import cores

_MAX_PROCESSES = 32  # each takes about 60 MB
_REQUEST = struct.Struct('<Q')  # bytes of a pickled (reader, bytes of each video, hash of each); the videos follow
_PROBLEM = struct.Struct('<q')  # bytes of a pickled exception; -1: pixels follow
_SECONDS = 5.0  # for a process to end


class VideoProcesses:
  """As many processes as there are cores, for all tasks and threads. They start with the first video.

  With one core there are none, and the caller reads.
  """

  def __init__(self):
    self._num_processes = min(cores.available(), _MAX_PROCESSES)
    self._threads = concurrent.futures.ThreadPoolExecutor(self._num_processes, 'videos')
    self._local = threading.local()  # each thread has a process

  def read(
      self, reader: VideoReader, videos: Sequence[bytes], hashes: Sequence[int]) -> list[np.ndarray | CorruptVideo]:
    """What `reader` returns of each video, or why it cannot be read."""
    if self._num_processes == 1:
      return [_read(reader, data, h) for data, h in zip(videos, hashes, strict=True)]
    bounds = [len(videos) * k // self._num_processes for k in range(self._num_processes + 1)]
    parts = [slice(*part) for part in itertools.pairwise(bounds)]
    made = self._threads.map(lambda part: self._read_elsewhere(reader, videos[part], hashes[part]), parts)
    return list(itertools.chain.from_iterable(made))

  def _read_elsewhere(
      self, reader: VideoReader, videos: Sequence[bytes], hashes: Sequence[int]) -> list[np.ndarray | CorruptVideo]:
    results: list[np.ndarray | CorruptVideo] = []
    while len(results) < len(videos):
      process = getattr(self._local, 'process', None)
      if process is None:
        process = self._local.process = _Process()
      try:
        for result in process.read(reader, videos[len(results):], hashes[len(results):]):
          results.append(result)  # what was read before the process ends counts
      except BaseException as e:
        del self._local.process  # it may still answer, which the next videos must not get
        if not isinstance(e, EOFError | OSError):
          raise
        results.append(CorruptVideo(f'its decoder ended with exit code {process.exit_code()}'))
    return results


def _read(reader: VideoReader, data: bytes, h: int) -> np.ndarray | CorruptVideo:
  try:
    return reader(data, h)
  except CorruptVideo as e:
    return e


class _Process:
  """A process that runs `main`. It ends when its input does, and so with this process, however that ends."""

  def __init__(self):
    # A session of its own: a terminal's Ctrl-C is for the process that trains.
    self._popen = subprocess.Popen(
        [sys.executable, '-m', __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
    self._end = weakref.finalize(self, _end, self._popen, os.getpid())

  def read(self, reader: VideoReader, videos: Sequence[bytes], hashes: Sequence[int],
           ) -> Iterator[np.ndarray | CorruptVideo]:
    """Yields what is read of each video. Raises EOFError or OSError if the process has ended."""
    requests, results = self._popen.stdin, self._popen.stdout
    assert requests and results
    pickled = pickle.dumps((reader, list(map(len, videos)), hashes))
    for data in (_REQUEST.pack(len(pickled)), pickled, *videos):
      requests.write(data)
    requests.flush()
    for _ in videos:
      [problem] = _PROBLEM.unpack(_exactly(results, _PROBLEM.size))
      if problem >= 0:
        yield pickle.loads(_exactly(results, problem))
        continue
      pixels = np.empty(reader.shape, np.uint8)
      if results.readinto(pixels.data.cast('B')) < pixels.nbytes:
        raise EOFError
      yield pixels

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


def _exactly(stream: BinaryIO, size: int) -> bytes:
  data = stream.read(size)
  if len(data) < size:
    raise EOFError
  return data


def main() -> None:
  """Reads videos from standard input, and writes pixels or problems to standard output."""
  requests, results = sys.stdin.buffer, sys.stdout.buffer
  while header := requests.read(_REQUEST.size):
    reader, sizes, hashes = pickle.loads(requests.read(*_REQUEST.unpack(header)))
    videos = [requests.read(size) for size in sizes]  # all of them, before this process waits until a result is taken
    for data, h in zip(videos, hashes, strict=True):
      result = _read(reader, data, h)
      try:
        if isinstance(result, CorruptVideo):
          pickled = pickle.dumps(result)
          results.write(_PROBLEM.pack(len(pickled)) + pickled)
        else:
          results.write(_PROBLEM.pack(-1))
          results.write(np.ascontiguousarray(result, np.uint8).data)
        results.flush()
      except BrokenPipeError:
        os._exit(0)  # the other process has ended; an end as usual would try to write what is left


if __name__ == '__main__':
  main()
