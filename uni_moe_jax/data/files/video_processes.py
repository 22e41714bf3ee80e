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
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from uni_moe_jax.data.files.video import CorruptVideo
from uni_moe_jax.data.files.video_pixels import VideoReader
from uni_moe_jax.utils import cores

_MAX_PROCESSES = 32  # each takes about 60 MB
_REQUEST = struct.Struct('<QQQ')  # bytes of the pickled reader, bytes of the video, hash of the example
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
    return list(self._threads.map(self._read_elsewhere, itertools.repeat(reader), videos, hashes))

  def _read_elsewhere(self, reader: VideoReader, data: bytes, h: int) -> np.ndarray | CorruptVideo:
    process = getattr(self._local, 'process', None)
    if process is None:
      process = self._local.process = _Process()
    try:
      return process.read(reader, data, h)
    except BaseException as e:
      del self._local.process  # it may still answer, which the next video must not get
      if isinstance(e, EOFError | OSError):
        return CorruptVideo(f'its decoder ended with exit code {process.exit_code()}')
      raise


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
    self._end = weakref.finalize(self, _end, self._popen)

  def read(self, reader: VideoReader, data: bytes, h: int) -> np.ndarray | CorruptVideo:
    """Raises EOFError or OSError if the process has ended."""
    requests, results = self._popen.stdin, self._popen.stdout
    assert requests and results
    pickled = pickle.dumps(reader)
    requests.write(_REQUEST.pack(len(pickled), len(data), h) + pickled)
    requests.write(data)
    requests.flush()
    [problem] = _PROBLEM.unpack(_exactly(results, _PROBLEM.size))
    if problem >= 0:
      return pickle.loads(_exactly(results, problem))
    pixels = np.empty(reader.shape, np.uint8)
    if results.readinto(pixels.data.cast('B')) < pixels.nbytes:
      raise EOFError
    return pixels

  def exit_code(self) -> int:
    self._end()
    return self._popen.returncode


def _end(popen: subprocess.Popen) -> None:
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
    reader_size, video_size, h = _REQUEST.unpack(header)
    reader = pickle.loads(requests.read(reader_size))
    result = _read(reader, requests.read(video_size), h)
    if isinstance(result, CorruptVideo):
      pickled = pickle.dumps(result)
      results.write(_PROBLEM.pack(len(pickled)) + pickled)
    else:
      results.write(_PROBLEM.pack(-1))
      results.write(np.ascontiguousarray(result, np.uint8).data)
    results.flush()


if __name__ == '__main__':
  main()
