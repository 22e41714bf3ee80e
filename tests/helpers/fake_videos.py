"""Readers of videos that other processes use in tests."""

import os
import pathlib
import signal

import numpy as np

from tests.helpers import stand_in
from uni_moe_jax.data.formats.video import CorruptVideo


class FakeReader:
  """Reads a video 'killer', one that is not a video, one that waits for a file, and others as numbers."""
  shape = (2,)  # the number, and whether another process has read it

  def __init__(self, folder: pathlib.Path):
    self._folder, self._parent = folder, os.getpid()

  def __call__(self, data: bytes, h: int) -> np.ndarray:
    if data == b'killer':
      os.kill(os.getpid(), signal.SIGKILL)
    if data == b'corrupt':
      raise CorruptVideo('no frames')
    if data.startswith(b'wait for '):
      (self._folder / f'{h}').touch()
      stand_in.wait_for(self._folder / data[9:].decode(), seconds=60)
    return np.array([h, os.getpid() != self._parent], np.uint8)
