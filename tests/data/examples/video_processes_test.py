"""Videos that other processes read."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data import own_files
from tests.helpers import processes
from tests.helpers.fake_videos import FakeReader
from uni_moe_jax.data.examples.video_pixels import VideoReader
from uni_moe_jax.data.examples.video_processes import VideoProcesses
from uni_moe_jax.data.formats.video import CorruptVideo


def _read(videos, reader, data, hashes):
  """Pixels of each video, or why it cannot be read."""
  pixels = np.zeros((len(data), *reader.shape), np.uint8)
  problems = videos.read(reader, data, hashes, pixels)
  assert not any(problem and row.any() for problem, row in zip(problems, pixels, strict=True))
  return [problem or row for problem, row in zip(problems, pixels, strict=True)]


def test_pixels_are_those_of_this_process_in_order():
  frames = np.random.default_rng(0).integers(0, 256, (9, 20, 24, 3), np.uint8)
  videos = [own_files.npy_bytes(np.roll(frames, i, 0)) for i in range(7)]
  reader, hashes = VideoReader(8, 3, 'jittered_crop', True, True), [2**64 - 1 - i for i in range(7)]
  made = _read(VideoProcesses(2), reader, videos, hashes)
  expected = [reader(data, h) for data, h in zip(videos, hashes, strict=True)]
  np.testing.assert_array_equal(made, expected)
  assert not np.array_equal(expected[0], expected[1])


def test_longer_videos_and_more_pixels_follow_shorter_and_fewer():
  frames, videos = np.random.default_rng(0).integers(0, 256, (9, 20, 24, 3), np.uint8), VideoProcesses(2)
  for number, size in ((2, 8), (9, 20), (3, 6)):
    reader, data = VideoReader(size, number, 'resize_crop', False, False), own_files.npy_bytes(frames[:number])
    np.testing.assert_array_equal(_read(videos, reader, [data] * number, [0] * number), [reader(data, 0)] * number)


def test_two_videos_are_read_at_once_in_other_processes(tmp_path):
  made = _read(VideoProcesses(2), FakeReader(tmp_path), [b'wait for 2', b'wait for 1'], [1, 2])
  np.testing.assert_array_equal(made, [[1, True], [2, True]])


def test_with_one_core_there_is_no_other_process(tmp_path):
  number, corrupt = _read(VideoProcesses(1), FakeReader(tmp_path), [b'', b'corrupt'], [3, 4])
  np.testing.assert_array_equal(number, [3, False])
  assert isinstance(corrupt, CorruptVideo)


def test_a_video_that_cannot_be_read_or_kills_its_process_costs_only_itself(tmp_path):
  videos = VideoProcesses(2)
  for _ in range(2):
    made = _read(videos, FakeReader(tmp_path), [b'', b'killer', b'corrupt', b'', b'', b''], range(6))
    assert [str(m) for m in made if isinstance(m, CorruptVideo)] == [
        'its decoder ended with exit code -9', 'no frames']
    np.testing.assert_array_equal([made[i] for i in (0, 3, 4, 5)], [[i, True] for i in (0, 3, 4, 5)])
  _read(videos, FakeReader(tmp_path), [b'another'] * 2, [6, 7])
  corrupt = _read(videos, FakeReader(tmp_path), [b'corrupt'] * 2, [6, 7])  # where pixels were before
  assert all(isinstance(problem, CorruptVideo) for problem in corrupt)


_PARENT = """
import pathlib, sys
import numpy as np
from tests.helpers.fake_videos import FakeReader
from uni_moe_jax.data.examples.video_processes import VideoProcesses
videos = VideoProcesses(2)
reader = FakeReader(pathlib.Path(sys.argv[1]))
videos.read(reader, [b''], [1], np.zeros((1, *reader.shape), np.uint8))
print('read', flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not pathlib.Path('/proc/self/task').exists(), reason='reads /proc')
@pytest.mark.parametrize('number', [None, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(tmp_path, number):
  parent = subprocess.Popen([sys.executable, '-c', _PARENT, str(tmp_path)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, env=processes.environment(1))
  assert parent.stdout.readline() == b'read\n'
  children = processes.children(parent.pid)
  assert len(children) == 1  # of the one video
  if number:
    parent.send_signal(number)
  parent.communicate()
  _wait_for(lambda: not any(map(processes.is_running, children)))


@pytest.mark.skipif(not pathlib.Path('/proc/self/task').exists(), reason='reads /proc')
def test_processes_end_when_nothing_reads_videos_anymore(tmp_path):
  before = processes.children('self')
  videos = VideoProcesses(2)
  _read(videos, FakeReader(tmp_path), [b'wait for 2', b'wait for 1'], [1, 2])
  assert len(processes.children('self') - before) == 2
  del videos
  gc.collect()
  _wait_for(lambda: not processes.children('self') - before)


def test_a_fork_does_not_wait_for_processes_of_its_parent(tmp_path):
  videos = VideoProcesses(2)
  read = lambda: _read(videos, FakeReader(tmp_path), [b'wait for 2', b'wait for 1'], [1, 2])
  read()
  fork = os.fork()  # as of a command with `preexec_fn`
  if not fork:
    os._exit(0)
  try:
    _wait_for(lambda: os.waitpid(fork, os.WNOHANG)[0])
  except AssertionError:
    os.kill(fork, signal.SIGKILL)
    raise
  np.testing.assert_array_equal(read(), [[1, True], [2, True]])


def _wait_for(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)
