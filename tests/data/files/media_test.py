"""Sizes of images and videos are checked before anything is decoded."""

import tracemalloc

import pytest
from PIL import Image

from tests.data import own_files
from uni_moe_jax.data.files import media, video


@pytest.mark.parametrize('size', [(8192, 8193), (14_000, 14_000)])  # Pillow itself accepts the first
def test_a_small_file_of_many_pixels_is_refused_undecoded(tmp_path, size):
  Image.new('1', size).save(tmp_path / 'x.png')
  assert (tmp_path / 'x.png').stat().st_size < 100_000
  tracemalloc.start()
  with pytest.raises(media.CorruptFile, match='^more than 67 megapixels$'):
    media.check_image((tmp_path / 'x.png').read_bytes())
  assert tracemalloc.get_traced_memory()[1] < 1e6
  tracemalloc.stop()


def test_an_image_of_as_many_pixels_as_allowed_is_read(tmp_path):
  Image.new('1', (8192, 8192)).save(tmp_path / 'x.png')
  assert media.check_image((tmp_path / 'x.png').read_bytes()).size == (8192, 8192)


def test_a_huge_file_is_not_read(tmp_path):
  with (tmp_path / 'x.png').open('wb') as file:
    file.truncate(media.MAX_BYTES + 1)  # occupies no disk
  with pytest.raises(media.CorruptFile, match='larger than 1 GiB'):
    media.read_bytes(tmp_path / 'x.png')


@pytest.mark.parametrize('bound, allowed, refused, message', [
    ('MAX_PIXELS', 10**6, 48 * 32 - 1, 'more than 67 megapixels'), ('_MAX_FRAMES', 12, 11, 'more than 11 frames')])
def test_a_video_of_many_pixels_or_frames_is_refused(tmp_path, monkeypatch, bound, allowed, refused, message):
  pytest.importorskip('av')
  (tmp_path / 'x.mp4').write_bytes(own_files.encode_video(own_files.moving_bar(True)))
  monkeypatch.setattr(video, bound, allowed)
  assert media.check_video((tmp_path / 'x.mp4').read_bytes()).size == (12, 48, 32)
  monkeypatch.setattr(video, bound, refused)
  with pytest.raises(media.CorruptFile, match=message):
    media.check_video((tmp_path / 'x.mp4').read_bytes())


def test_equal_bytes_have_equal_digests_whatever_is_rewritten(tmp_path):
  rotated = Image.Exif()
  rotated[media._EXIF_ORIENTATION] = 6
  for name, exif in (('a.jpg', rotated), ('b.jpg', rotated), ('c.jpg', Image.Exif())):
    (tmp_path / name).write_bytes(own_files.encode_image(own_files.color_image('red', 1), exif=exif))
  a, b, c = (media.check_image((tmp_path / name).read_bytes()) for name in ('a.jpg', 'b.jpg', 'c.jpg'))
  assert a.note and a.digest == b.digest != c.digest
