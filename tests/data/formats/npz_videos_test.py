"""Arrays of videos: equal to numpy's reading, one in memory at a time, and refused by their headers."""

import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tests.data import own_files
from tests.helpers.processes import ROOT
from uni_moe_jax.data.formats.media import CorruptFile
from uni_moe_jax.data.formats.npz_videos import NpzVideos, open_videos
from uni_moe_jax.data.formats.rows import Row
from uni_moe_jax.data.prepare import scan

_SHAPE = (5, 4, 8, 10, 3)


def _videos(shape=_SHAPE):
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _write(path, header, data=b'', method=zipfile.ZIP_DEFLATED):
  """An .npz file with one array, whose header need not fit its data (bytes, or pieces)."""
  with zipfile.ZipFile(path, 'w', method, compresslevel=1) as archive, archive.open('frames.npy', 'w') as file:
    np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False) | header)
    for piece in [data] if isinstance(data, bytes) else data:
      file.write(piece)
  return path


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('shape', [_SHAPE, _SHAPE[:4]], ids=['color', 'gray'])
def test_videos_are_those_of_the_array_in_any_order(tmp_path, save, shape):
  save(tmp_path / 'x.npz', frames=_videos(shape), other=np.arange(3))
  expected = _videos(shape) if len(shape) == 5 else np.repeat(_videos(shape)[..., None], 3, -1)
  videos = NpzVideos(tmp_path / 'x.npz')
  for i in (0, 1, 4, 2, 2):
    video = videos.read(i)
    assert video.data == own_files.npy_bytes(expected[i]) and video.size == (4, 10, 8)
  assert videos.read(1).digest == videos.read(1).digest != videos.read(2).digest


def _open_arrays():
  """The names of the .npz files that this process has open."""
  paths = [os.readlink(path) for path in pathlib.Path('/proc/self/fd').iterdir() if path.is_symlink()]
  return [pathlib.Path(path).name for path in paths if path.endswith('.npz')]


def test_each_file_is_checked_once_and_one_is_open_at_a_time(tmp_path, monkeypatch):
  for name in 'ab':
    np.savez(tmp_path / f'{name}.npz', frames=_videos())
  (tmp_path / 'c.npz').write_bytes(b'no archive')
  checked, open_before = [], []
  monkeypatch.setattr(scan, 'open_videos', lambda path: [checked.append(path.name), open_videos(path)][1])
  rows = [Row(location=f'{name}:{i}', media_type='video', path=tmp_path / f'{name}.npz', array_index=i)
          for name in 'abc' for i in range(3)]

  def read_rows():
    for row in rows:
      open_before.append(_open_arrays())
      yield row

  assert scan._scan(read_rows(), '', tmp_path) == 9
  assert checked == ['a.npz', 'b.npz', 'c.npz']
  assert open_before == [[], *[['a.npz']] * 3, *[['b.npz']] * 3, [], []] and not _open_arrays()
  manifest = json.loads((tmp_path / scan.MANIFEST).read_text())
  reasons = [manifest['reason'][i] for i in np.load(tmp_path / scan._ROWS)['reason']]
  assert reasons == [''] * 6 + ['corrupt array'] * 3


_PROGRAM = """
import pathlib, re, sys
from uni_moe_jax.data.prepare import scan
from uni_moe_jax.data.formats import input_shards
[shard] = input_shards.plan(pathlib.Path(sys.argv[1]))
num_rows = scan.Scan(shard, sys.argv[1], 'image', False)()
# Its peak; that of getrusage includes the process that started it.
print(num_rows, int(re.search(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1]) >> 10)
"""


def test_an_array_takes_the_memory_of_one_video(tmp_path):
  T, H, W = 16, 512, 512
  N, size = 40, T * H * W * 3  # 40 videos of 12 MiB; the file has 2 MB
  _write(tmp_path / 'x.npz', dict(shape=(N, T, H, W, 3)), (bytes([i]) * size for i in range(N)))
  own_files.write_jsonl(tmp_path / 'x.jsonl', [{'label': str(i)} for i in range(3)])
  assert (tmp_path / 'x.npz').stat().st_size < 3e6
  done = subprocess.run([sys.executable, '-c', _PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True,
                        env={'PYTHONPATH': str(ROOT)})
  count, megabytes = map(int, done.stdout.split())
  assert count == 3 and megabytes < 250


@pytest.mark.parametrize('header, method, message', [
    (dict(shape=(1, 2**20, 1024, 1024, 3)), zipfile.ZIP_DEFLATED, 'video of more than 256 MiB'),
    (dict(shape=(1, 90, 1024, 1024)), zipfile.ZIP_DEFLATED, 'video of more than 256 MiB'),  # in three colors
    (dict(shape=(1, 1, 2**14, 2**13, 3)), zipfile.ZIP_DEFLATED, 'more than 67 megapixels'),
    (dict(shape=(2**40, *_SHAPE[1:])), zipfile.ZIP_DEFLATED, 'corrupt array'),  # larger than its data
    (dict(shape=(4, *_SHAPE[1:])), zipfile.ZIP_DEFLATED, 'corrupt array'),  # smaller
    (dict(shape=(-1, *_SHAPE[1:])), zipfile.ZIP_DEFLATED, 'array is not uint8'),
    (dict(shape=(5, 0, *_SHAPE[2:])), zipfile.ZIP_DEFLATED, 'array is not uint8'),
    (dict(shape=(5, 4, 8, 6, 5)), zipfile.ZIP_DEFLATED, 'array is not uint8'),
    (dict(shape=_SHAPE, descr='|O'), zipfile.ZIP_DEFLATED, 'array is not uint8'),
    (dict(shape=_SHAPE, descr='<f4'), zipfile.ZIP_DEFLATED, 'array is not uint8'),
    (dict(shape=_SHAPE, fortran_order=True), zipfile.ZIP_DEFLATED, 'Fortran order; save np.ascontiguousarray'),
    (dict(shape=_SHAPE), zipfile.ZIP_BZIP2, 'another method than deflate'),
    (dict(shape=_SHAPE, descr='>u1'), zipfile.ZIP_DEFLATED, ''),
    (dict(shape=_SHAPE), zipfile.ZIP_STORED, '')])
def test_an_array_is_refused_by_its_header(tmp_path, header, method, message):
  path = _write(tmp_path / 'x.npz', header, _videos().tobytes(), method)
  if not message:
    np.testing.assert_array_equal(np.load(io.BytesIO(NpzVideos(path).read(4).data)), _videos()[4])
    return
  with pytest.raises(CorruptFile, match=message):
    NpzVideos(path)


def test_a_changed_byte_is_found_before_a_video_is_read(tmp_path):
  np.savez(tmp_path / 'x.npz', frames=_videos())
  content = (tmp_path / 'x.npz').read_bytes()
  NpzVideos(tmp_path / 'x.npz')
  position = content.index(_videos().tobytes()[-100:])
  (tmp_path / 'x.npz').write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1:])
  with pytest.raises(CorruptFile, match='corrupt array'):
    NpzVideos(tmp_path / 'x.npz')


def test_a_line_beyond_the_last_video_is_refused(tmp_path):
  np.savez(tmp_path / 'x.npz', frames=_videos())
  with pytest.raises(CorruptFile, match='more lines than the array has videos'):
    NpzVideos(tmp_path / 'x.npz').read(5)
