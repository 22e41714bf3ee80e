"""Images and videos of requests: bounded by their headers, cropped as in evaluation, and damaged ones are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from uni_moe_jax.data.examples import image_transforms, video_pixels
from uni_moe_jax.data.formats import video
from uni_moe_jax.serve import media
from uni_moe_jax.serve.limits import Limits, Refused

_LIMITS = Limits(max_pixels=10_000, max_frames=20, max_seconds=2)


def _file(image: Image.Image, file_format: str = 'PNG', **options) -> bytes:
  image.save(out := io.BytesIO(), file_format, **options)
  return out.getvalue()


def _noise(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _video(num_frames: int, size: int = 32, rate: int = 10, fragments: bool = False) -> bytes:
  """An mp4 whose frame t has brightness 10 t. fragments: as a live recording, which declares no number of frames."""
  av = pytest.importorskip('av')
  out = io.BytesIO()
  options = {'movflags': 'frag_keyframe+empty_moov'} if fragments else {}
  with av.open(out, 'w', format='mp4', options=options) as container:
    stream = container.add_stream('mpeg4', rate=rate)
    stream.width = stream.height = size
    for t in range(num_frames):
      frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 10 * t, np.uint8), format='rgb24')
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return out.getvalue()


def test_an_image_of_the_models_size_is_not_changed():
  pixels = _noise(16, 16, 3)
  shown = media.image_pixels(_file(Image.fromarray(pixels)), 16, 3, 'resize_crop', _LIMITS)
  np.testing.assert_array_equal(shown[0], pixels)
  gray = pixels[..., 0]
  np.testing.assert_array_equal(
      media.image_pixels(_file(Image.fromarray(gray)), 16, 1, 'resize_crop', _LIMITS), gray[None, ..., None])


@pytest.mark.parametrize('crop, short', [('resize_crop', 16), ('random_resized_crop', 18)])
def test_the_center_of_a_larger_image_is_taken(crop, short):
  image = Image.fromarray(_noise(40, 60, 3))
  resized = np.asarray(image.resize((round(short * 1.5), short), Image.Resampling.BICUBIC))
  top, left = (round((side - 16) / 2) for side in resized.shape[:2])  # half of 11 is 6: rounded to even
  np.testing.assert_array_equal(
      media.image_pixels(_file(image), 16, 3, crop, _LIMITS)[0], resized[top:top + 16, left:left + 16])


@pytest.mark.parametrize('width, height', [(39, 30), (49, 30), (57, 187), (187, 57), (20, 9), (16, 23), (64, 65)])
@pytest.mark.parametrize('crop', ['resize_crop', 'random_resized_crop'])
def test_an_image_of_any_size_is_resized_and_cropped_as_in_evaluation(width, height, crop):
  data = _file(Image.fromarray(_noise(height, width, 3)))
  shown = media.image_pixels(data, 16, 3, crop, Limits())[0].astype(int)
  evaluated = image_transforms.read(tf.constant(data), 3, 16, None, crop, 'pillow').numpy()
  assert np.abs(shown - evaluated).max() <= 2
  assert np.abs(np.roll(shown, 1, 0) - evaluated).max() > 50  # other rows differ


def test_an_image_is_shown_upright_and_on_white():
  pixels = np.zeros((16, 16, 4), np.uint8)
  pixels[0, 0] = 255, 0, 0, 255
  shown = media.image_pixels(_file(Image.fromarray(pixels)), 16, 3, 'resize_crop', _LIMITS)[0]
  assert shown[0, 0].tolist() == [255, 0, 0] and shown[1:].min() == 255
  exif = Image.Exif()
  exif[0x0112] = 3  # upside down
  turned = media.image_pixels(
      _file(Image.fromarray(pixels[..., :3]), exif=exif.tobytes()), 16, 3, 'resize_crop', _LIMITS)[0]
  assert turned[-1, -1].tolist() == [255, 0, 0] and turned[0, 0].tolist() == [0, 0, 0]


def test_a_decompression_bomb_is_refused_by_its_header():
  chunk = lambda name, data: struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
  header = struct.pack('>IIBBBBB', 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
  content = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0' * 100)) + chunk(b'IEND', b'')
  bomb = b'\x89PNG\r\n\x1a\n' + content
  with pytest.raises(Refused, match='more than 178,956,970 pixels, but at most 10,000 are accepted'):
    media.read_image(bomb, _LIMITS)  # Pillow's own bound
  with pytest.raises(Refused, match='101 × 100 pixels, but at most 10,000 are accepted; make it smaller'):
    media.read_image(_file(Image.new('RGB', (101, 100))), _LIMITS)


@pytest.mark.parametrize('data', [
    b'', b'GIF89a', _file(Image.fromarray(_noise(16, 16, 3)))[:200], _file(Image.fromarray(_noise(16, 16)), 'TIFF'),
    _file(Image.fromarray(_noise(16, 16, 3)), 'PDF'), b'<svg xmlns="http://www.w3.org/2000/svg"/>'])
def test_what_is_no_image_is_refused(data):
  with pytest.raises(Refused, match='The image is (not a readable file|damaged)'):
    media.image_pixels(data, 16, 3, 'resize_crop', _LIMITS)


def test_the_frames_of_a_video_are_the_middles_of_its_segments():
  shown = media.video_pixels(_video(12), 3, 16, 3, _LIMITS)
  assert shown.shape == (3, 16, 16, 3)
  assert np.abs(shown.mean((1, 2, 3)) - [20, 60, 100]).max() < 4  # frames 2, 6 and 10


@pytest.mark.parametrize('stride, frames, channels', [
    (0.0, [2, 6, 10], 3), (3.0, [0, 1, 2], 3), (15.0, [0, 5, 10], 3), (0.0, [2, 6, 10], 1)])
def test_a_task_with_a_stride_takes_frames_from_the_first_one_at_thirty_a_second(stride, frames, channels):
  shown = media.video_pixels(_video(12, rate=10), 3, 16, channels, _LIMITS, stride)  # 10 a second: a third of it
  assert np.abs(shown.mean((1, 2, 3)) - 10 * np.array(frames)).max() < 4
  evaluated = video_pixels.VideoReader(16, 3, 'resize_crop', False, False, frame_stride=stride, channels=channels)
  np.testing.assert_array_equal(shown, evaluated(_video(12, rate=10), 0))


@pytest.mark.parametrize('num_frames, size, rate, message', [
    (22, 32, 30, '22 frames, but at most 20'), (20, 32, 5, 'is 4 s long, but at most 2 s'),
    (2, 112, 10, '112 × 112 pixels, but at most 10,000')])
def test_a_long_or_large_video_is_refused(num_frames, size, rate, message):
  with pytest.raises(Refused, match=message):
    media.video_pixels(_video(num_frames, size, rate), 3, 16, 3, _LIMITS)


def test_frames_that_a_file_does_not_declare_are_counted_before_any_is_decoded(monkeypatch):
  shown = media.video_pixels(_video(12, fragments=True), 3, 16, 3, _LIMITS)
  np.testing.assert_array_equal(shown, media.video_pixels(_video(12), 3, 16, 3, _LIMITS))
  monkeypatch.setattr(video, '_decode_all', lambda *_: pytest.fail('decoded'))
  with pytest.raises(Refused, match='has 21 or more frames, but at most 20 are accepted; shorten it'):
    media.video_pixels(_video(25, 32, 30, fragments=True), 3, 16, 3, _LIMITS)


def test_arrays_and_playlists_are_refused_before_anything_opens_them(tmp_path, monkeypatch):
  monkeypatch.setattr(media, '_frame_size', lambda data: pytest.fail(f'{data[:20]} is opened'))
  np.save(out := io.BytesIO(), _noise(4, 16, 16, 3))
  (tmp_path / 'a.mp4').write_bytes(_video(4))
  playlist = f'ffconcat version 1.0\nfile {tmp_path}/a.mp4\n'.encode()
  for data in (out.getvalue(), b'PK\x03\x04', playlist, b'#EXTM3U\n#EXTINF:1,\n' + bytes(tmp_path / 'a.mp4')):
    with pytest.raises(Refused, match='The video is not a readable file'):
      media.video_pixels(data, 3, 16, 3, _LIMITS)


def test_a_thumbnail_shows_all_frames():
  image = Image.open(io.BytesIO(media.thumbnail(_noise(1, 16, 16, 1))))
  assert image.size == (96, 96) and getattr(image, 'n_frames', 1) == 1
  assert Image.open(io.BytesIO(media.thumbnail(_noise(3, 32, 32, 3)))).n_frames == 3


def test_of_16_bits_a_channel_the_upper_8_are_read_as_in_training():
  image = Image.fromarray(np.array([[0x0012, 0x8034], [0xff56, 0x4078]], np.uint16))
  np.testing.assert_array_equal(np.asarray(media.read_image(_file(image), _LIMITS))[..., 0], [[0, 128], [255, 64]])


def test_the_transparent_level_of_16_bits_is_white_as_in_training():
  image = Image.fromarray(np.array([[0x0012, 0x0013], [0xff56, 0x4078]], np.uint16))
  shown = np.asarray(media.read_image(_file(image, transparency=0x0012), _LIMITS))
  np.testing.assert_array_equal(shown[..., 0], [[255, 0], [255, 64]])
