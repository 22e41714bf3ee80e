"""Sizes of images and videos are checked before anything is decoded, and what is rewritten keeps its levels."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tests.data import own_files
from uni_moe_jax.data.formats import media, video


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


@pytest.mark.parametrize('file_format', ['JPEG', 'MPO'])
@pytest.mark.parametrize('options', [dict(quality=75), dict(quality=90, subsampling='4:2:2'), dict(qtables=[[9] * 64])])
@pytest.mark.parametrize('mode, orientation', [('RGB', 6), ('L', 6), ('RGB', 1)])
def test_a_rotated_photograph_stays_a_jpeg_of_its_size(file_format, options, mode, orientation):
  exif = Image.Exif()
  exif[media._EXIF_ORIENTATION] = orientation
  image = own_files.color_image('red', 0, (120, 88)).resize((440, 610)).convert(mode)
  more = dict(save_all=True, append_images=[image]) if file_format == 'MPO' else {}
  made = media.check_image(data := own_files.encode_image(image, file_format, exif=exif, **options, **more))
  assert made.data.startswith(b'\xff\xd8\xff') and len(made.data) < 1.5 * len(data)
  shown, stored = (np.asarray(Image.open(io.BytesIO(d))).astype(int) for d in (data, made.data))
  upright = np.rot90(shown, -1) if orientation == 6 else shown
  assert stored.shape == upright.shape and np.abs(stored - upright).mean() < 3 < np.abs(stored - stored[::-1]).mean()


# Levels of 16 bits and, in training, their upper 8: of the first two pixels only the lower 8 differ.
_DEEP = np.array([0x0012, 0x0013, 0x40ff, 0xff00], np.uint16).repeat(16).reshape(8, 8)
_UPPER = np.array([0x00, 0x00, 0x40, 0xff], np.uint8).repeat(16).reshape(8, 8)
_ROTATED = Image.Exif()
_ROTATED[media._EXIF_ORIENTATION] = 6  # the first row is at the right
_PGM = b'P5 8 8 65535\n' + _DEEP.astype('>u2').tobytes()


def _encode_deep(file_format, dtype='<u2', **options):
  return own_files.encode_image(Image.fromarray(_DEEP.astype(dtype)), file_format, **options)


@pytest.mark.parametrize('data, note, expected', [
    (_encode_deep('PNG', exif=_ROTATED), 'rotated as EXIF says', _UPPER.T[:, ::-1]),
    (_encode_deep('TIFF'), 'color mode I;16', _UPPER),
    (_encode_deep('TIFF', '>u2'), 'color mode I;16B', _UPPER),
    (_encode_deep('TIFF', '>u2', exif=_ROTATED), 'color mode I;16B', _UPPER.T[:, ::-1]),  # Pillow rotates it
    (_PGM, 'color mode I', _UPPER),
    # The level 0x12 is transparent, and 0x13 is not.
    (_encode_deep('PNG', transparency=0x12), 'transparent: on white', np.where(_DEEP == 0x12, 255, _UPPER)),
], ids=['rotated', 'TIFF', 'big-endian TIFF', 'rotated TIFF', 'PGM', 'transparent'])
def test_a_rewritten_image_of_16_bits_has_the_upper_8(data, note, expected):
  made = media.check_image(data)
  assert made.note == note
  pixels = np.asarray(Image.open(io.BytesIO(made.data)))
  np.testing.assert_array_equal(pixels, np.stack([expected] * 3, -1))


def test_a_png_of_16_bits_keeps_its_bytes_and_is_read_with_the_same_levels_in_training():
  import tensorflow as tf
  made = media.check_image(data := _encode_deep('PNG'))
  assert made.data == data and not made.note
  np.testing.assert_array_equal(tf.io.decode_image(made.data, 1)[..., 0], _UPPER)


def test_levels_of_32_bits_have_no_known_range_and_are_clipped():
  levels = np.array([-5, 7, 255, 70_000], np.int32).repeat(16).reshape(8, 8)
  made = media.check_image(own_files.encode_image(Image.fromarray(levels), 'TIFF'))
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(made.data)))[..., 0], levels.clip(0, 255))
