"""Sampled frames and crops of a video, computed by hand; files of several formats."""

import contextlib

import numpy as np
import pytest

from tests.data import own_files
from uni_moe_jax.data.examples import video_pixels
from uni_moe_jax.data.formats import video
from uni_moe_jax.utils import splitmix


def _numbered(N):
  """Frame i has level i everywhere."""
  return own_files.npy_bytes(np.broadcast_to(np.arange(N, dtype=np.uint8)[:, None, None, None], (N, 4, 4, 3)))


def _middles(num_frames, fps):
  """Middles of three segments."""
  return video.segment_frames(num_frames, np.array([0.5, 0.5, 0.5]))


@pytest.mark.parametrize('num_frames, offsets, expected', [
    (12, (0.5, 0.5, 0.5), (2, 6, 10)),  # thirds of four frames, their middles
    (12, (0.0, 0.0, 0.0), (0, 4, 8)),
    (12, (0.99, 0.99, 0.99), (3, 7, 11)),
    (10, (0.5, 0.5), (2, 7)),  # 2.5 and 7.5
    (2, (0.5,) * 4, (0, 0, 1, 1)),  # 0.25, 0.75, 1.25, 1.75
    (1, (0.9, 0.9), (0, 0)),
])
def test_one_frame_of_each_segment_is_sampled(num_frames, offsets, expected):
  assert video.segment_frames(num_frames, np.array(offsets)).tolist() == list(expected)


def test_views_spread_evenly_within_the_segments():
  np.testing.assert_allclose(video.view_offsets(1, 2), [[0.5, 0.5]])
  np.testing.assert_allclose(video.view_offsets(2, 2), [[0.25, 0.25], [0.75, 0.75]])
  # Eight frames, halves of four: 1 and 5, then 3 and 7.
  made = video_pixels.VideoReader(4, 2, 'resize_crop', False, False, num_views=2)(_numbered(8), 0)
  assert made.shape == (2, 2, 4, 4, 3)
  assert made[..., 0, 0, 0].tolist() == [[1, 5], [3, 7]]


@pytest.mark.parametrize('num_frames, position, expected', [
    # 25 frames a second, so that a stride of 32 at 30 is 26.67: the last of four frames is 80 after the first, which is
    # one of 0…18 in a video of 100.
    (100, 0.0, (0, 26, 53, 80)), (100, 0.5, (9, 35, 62, 89)), (100, 0.999, (18, 44, 71, 98)),
    # Shorter: from the first frame, and again from the beginning.
    (50, 0.999, (0, 26, 3, 30)), (1, 0.5, (0, 0, 0, 0))])
def test_frames_of_training_follow_a_random_first_one_by_strides(num_frames, position, expected):
  assert video.stride_frames(num_frames, 32 * 25 / 30, 4, position).tolist() == list(expected)


@pytest.mark.parametrize('num_frames, fps, T, num_views, expected', [
    (100, 25., 4, 1, [[0, 26, 53, 80]]), (50, 25., 4, 1, [[0, 26, 3, 30]]),
    # A view begins 8 frames after the one before.
    (300, 30., 8, 4, [[start + 32 * t for t in range(8)] for start in (0, 8, 16, 24)]),
    (50, 30., 2, 4, [[0, 32], [8, 40], [16, 48], [24, 6]])])
def test_frames_of_evaluation_follow_the_first_one_by_strides(num_frames, fps, T, num_views, expected):
  assert video.stride_views(num_frames, 32, fps, T, num_views).tolist() == expected


def test_a_reader_takes_frames_by_stride_or_by_segments():
  def levels(training, h=0, **options):
    return video_pixels.VideoReader(4, 2, 'resize_crop', False, training, **options)(_numbered(100), h)[..., 0, 0, 0]
  assert levels(False, frame_stride=32.0, num_views=2).tolist() == [[0, 32], [16, 48]]
  assert levels(False, num_views=2).tolist() == [[12, 62], [37, 87]]  # quarters of segments of 50
  made = np.array([levels(True, splitmix.mix(i), frame_stride=32.0) for i in range(300)])
  assert (made[:, 1] - made[:, 0] == 32).all()
  # 100 - 33 possible first frames: all but a few of 300 draws, and none beyond.
  assert len(set(made[:, 0].tolist())) > 60 and made[:, 0].max() <= 66


def test_frames_are_chosen_by_the_number_and_rate_of_a_file():
  frames, seen = own_files.moving_bar(True), []
  for data in (own_files.encode_video(frames), own_files.npy_bytes(frames)):
    video.sample_frames(data, lambda N, fps: seen.append((N, fps)) or np.array([0]))
  assert seen == [(12, 6.0), (12, 30.0)]


def test_three_crops_are_spread_along_the_long_side():
  # Columns of 4 × 12 pixels have the levels 0…11.
  frames = np.broadcast_to(np.arange(12, dtype=np.uint8)[None, None, :, None], (1, 4, 12, 3))
  read = lambda frames, num_crops: video_pixels.VideoReader(4, 1, 'resize_crop', True, False, num_crops=num_crops)(
      own_files.npy_bytes(frames), 0)
  thirds = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
  assert read(frames, 3)[:, 0, 0, :, 0].tolist() == thirds
  assert read(frames, 1)[0, 0, :, 0].tolist() == thirds[1]
  assert read(frames.swapaxes(1, 2), 3)[:, 0, :, 0, 0].tolist() == thirds


def test_training_draws_frames_positions_and_mirroring_from_the_hash():
  frames = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, None, :, None] * 10, (6, 4, 8, 3)).copy()
  frames[..., 1] = np.arange(6)[:, None, None]
  reader = video_pixels.VideoReader(4, 3, 'resize_crop', True, True)
  made = [reader(own_files.npy_bytes(frames), splitmix.mix(i)) for i in (*range(80), 0)]
  np.testing.assert_array_equal(made.pop(), made[0])
  seen = {tuple(m[:, 0, 0, 1]) for m in made}
  assert seen == {(a, b, c) for a in (0, 1) for b in (2, 3) for c in (4, 5)}
  mirrored = [m[0, 0, 0, 0] > m[0, 0, -1, 0] for m in made]
  assert 0.25 < np.mean(mirrored) < 0.75
  for m in made:  # all frames equally
    np.testing.assert_array_equal(m[0, ..., 0], m[2, ..., 0])


def test_a_jittered_crop_shows_224_to_280_of_a_short_side_of_320():
  reader = video_pixels.VideoReader(224, 1, 'jittered_crop', False, True)
  widths = []
  for i in range(200):
    left, top, right, bottom = reader._random_box(splitmix.mix(i), 320, 400)
    assert 0 <= left and right <= 400 and 0 <= top and bottom <= 320
    widths.append(right - left)
  # 320 · 224 / 320 = 224 to 320 · 224 / 256 = 280.
  assert 224 <= min(widths) < 230 and 274 < max(widths) <= 280


@pytest.mark.parametrize('min_area', [0.08, 0.5])
def test_random_resized_crops_keep_their_bounds(min_area):
  reader = video_pixels.VideoReader(8, 1, 'random_resized_crop', False, True, min_area=min_area)
  shares = []
  for i in range(200):
    left, top, right, bottom = reader._random_box(splitmix.mix(i), 60, 80)
    ratio = (right - left) / (bottom - top)
    shares.append((right - left) * (bottom - top) / 4800)
    assert 0.749 < ratio < 1.334
  assert min_area - 1e-4 <= min(shares) < min_area + 0.05 and max(shares) <= 1
  # A video of 10 × 1000: no draw fits, then 10 high and 13.3 wide.
  left, top, right, bottom = reader._random_box(3, 10, 1000)
  assert (bottom - top, round(right - left, 1)) == (10, 13.3)


@pytest.mark.parametrize('suffix', ['mp4', 'mkv', 'gif'])
def test_files_decode_to_their_frames(tmp_path, suffix):
  own_files.write_videos(tmp_path, suffix, 1)
  data = next(tmp_path.rglob(f'*.{suffix}')).read_bytes()
  assert video.probe(data) == (12, 48, 32)
  made = video.sample_frames(data, _middles).astype(int)  # frames 2, 6, 10: the bar at 8, 24, 40
  assert made.shape == (3, 32, 48, 3)
  for frame, left in zip(made, (8, 24, 40)):
    assert frame[:, left:left + 4].mean() > 200 and np.delete(frame, range(left - 2, min(48, left + 6)), 1).mean() < 30


@pytest.mark.parametrize('rotation, upright', [
    (90, lambda bar: bar[..., ::-1, :].swapaxes(1, 2)), (-90, lambda bar: bar.swapaxes(1, 2)),
    (180, lambda bar: bar[..., ::-1, :])])
def test_a_rotated_video_is_decoded_upright(rotation, upright):
  # The bar moves to the right: rotated to the left it moves up, to the right down, and by 180° to the left.
  frames = own_files.moving_bar(True)
  data = own_files.encode_video(frames, rotation=rotation)
  made, expected = video.sample_frames(data, _middles), upright(frames[[2, 6, 10]])
  assert made.shape == expected.shape and np.abs(made.astype(int) - expected).mean() < 12
  assert video.probe(data) == (12, *expected.shape[2:0:-1])


@pytest.mark.parametrize('data', [
    b'no video', b'', b'\x93NUMPY' + b'x' * 20, own_files.npy_bytes(np.zeros((3, 4, 4, 3), np.float32)),
    own_files.npy_bytes(np.zeros((0, 4, 4, 3), np.uint8)), own_files.npy_bytes(np.zeros((3, 4, 4), np.uint8)),
    _numbered(3)[:-20],
    _numbered(3).replace(b"'shape': (3", b"'shape': (9" + b'9' * 14), _numbered(3).replace(b"'shape'", b"'shape ")],
    ids=['text', 'empty', 'header', 'floats', 'no frames', 'gray', 'truncated', 'larger than memory', 'no header'])
def test_bytes_that_are_not_a_video_are_an_error(data):
  for read in (video.probe, lambda data: video.sample_frames(data, _middles)):
    with pytest.raises(video.CorruptVideo):
      read(data)


@pytest.mark.parametrize('start', [b'GIF8', b'GIF89a', b'RIFF....AVI ', b'v=0'])
def test_a_file_that_names_addresses_is_no_video(start):
  names = start + b'\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n'
  with contextlib.suppress(EOFError, ValueError), video.open_container(names) as container:
    assert container.format.name != 'sdp'  # FFmpeg opens its sockets
  with pytest.raises(video.CorruptVideo):
    video.probe(names)


@pytest.mark.parametrize('suffix', ['mp4', 'avi'])
def test_a_video_is_valid_only_if_all_of_its_frames_decode(suffix):
  noise = np.random.default_rng(0).integers(0, 256, (20, 8, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
  data = own_files.encode_video(noise, suffix)
  assert video.probe(data) == (20, 96, 64)
  third = len(data) // 3
  for damaged in (data[:third] + bytes(third) + data[2 * third:], data[:len(data) // 2], data[:len(data) // 8]):
    with pytest.raises(video.CorruptVideo):
      video.probe(damaged)


@pytest.mark.parametrize('codec, options', [
    ('mpeg4', {'g': 6}), ('mpeg4', {'g': 6, 'bf': 2}), ('libx264', {'g': 7, 'bf': 3}),
    ('libx264', {'x264-params': 'open-gop=1:keyint=7:bframes=3:min-keyint=3'}), ('libx264', {'g': 250})])
def test_frames_that_are_decoded_from_a_key_frame_are_those_of_the_whole_video(codec, options):
  noise = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), np.uint8)
  data = own_files.encode_video(noise, codec=codec, **options)
  all_frames = video.sample_frames(data, lambda num_frames, _: np.arange(num_frames))
  assert len(all_frames) == 30 and len({frame.tobytes() for frame in all_frames}) == 30
  for wanted in ([29], [0, 29], [13, 14], [5, 12, 20, 28], [3, 3, 9]):
    made = video.sample_frames(data, lambda *_, wanted=wanted: np.array(wanted))
    np.testing.assert_array_equal(made, all_frames[wanted])
