"""Glyph videos: what each motion does, and how little a single frame reveals about it."""

import collections
import string

import numpy as np
import pytest
from sklearn import linear_model

from uni_moe_jax.data.embedded import glyph_videos, glyphs
from uni_moe_jax.data.shards.writer import Columns

_MIDDLE = np.full(7, 0.5)
_X, _Y, _SIZE, _ANGLE, _BRIGHTNESS = range(5)


@pytest.fixture(scope='module')
def letters() -> Columns:
  """Images of 62 letters and digits in one face."""
  font, signs = glyphs.load_font('DejaVuSans'), string.ascii_letters + string.digits
  columns = {'pixels': np.stack([glyphs.render(font, sign) for sign in signs]), 'name': np.array(list(signs)),
             'face': np.full(len(signs), 'regular sans'), 'class': np.full(len(signs), '')}
  return columns


def _images(letters: Columns, split: str) -> Columns:
  """A quarter of the letters, others for each split."""
  own = slice(glyphs.SPLITS.index(split), None, len(glyphs.SPLITS))
  return {name: column[own] for name, column in letters.items()}


@pytest.fixture
def few_videos(letters) -> dict[str, Columns]:
  """48 videos per split."""
  return {split: columns for split, columns, _ in glyph_videos.splits(
      lambda split: _images(letters, split), lambda line: None, dict.fromkeys(glyphs.SPLITS, 48))}


class TestPoses:

  @pytest.mark.parametrize(('motion', 'quantity', 'sign'), [
      ('move left', _X, -1), ('move right', _X, 1), ('move up', _Y, -1), ('move down', _Y, 1),
      ('grow', _SIZE, 1), ('shrink', _SIZE, -1), ('turn left', _ANGLE, -1),
      ('turn right', _ANGLE, 1), ('fade in', _BRIGHTNESS, 1), ('fade out', _BRIGHTNESS, -1),
  ])
  def test_a_motion_changes_one_quantity_in_one_direction(self, motion, quantity, sign):
    steps = np.diff(glyph_videos.poses(motion, _MIDDLE), axis=0)  # [T - 1, 5]
    assert (np.sign(steps[:, quantity]) == sign).all()
    assert not np.delete(steps, quantity, axis=1).any()

  def test_standing_still_changes_nothing(self):
    assert not np.diff(glyph_videos.poses('stand still', _MIDDLE), axis=0).any()

  def test_poses_match_values_computed_by_hand(self):
    # Draws of a half: start in the middle of every range, at frame 3.5, with the middle speed 1.3.
    pose = glyph_videos.poses('move right', _MIDDLE)
    np.testing.assert_allclose(pose[:, _X], 1.3 * (np.arange(8) - 3.5))
    np.testing.assert_allclose(pose[0, 1:], [0, 2**-0.05, 0, 0.675])

  @pytest.mark.parametrize(('phase', 'speed', 'dim'), [
      (0.0, 0.0, [0, 1, 0, 1, 0, 1, 0, 1]),
      (0.5, 0.0, [1, 0, 1, 0, 1, 0, 1, 0]),
      (0.25, 0.9, [0, 1, 1, 0, 0, 1, 1, 0]),
  ])
  def test_blinking_is_dim_for_one_or_two_frames_at_a_time(self, phase, speed, dim):
    brightness = glyph_videos.poses('blink', np.array([0.5] * 5 + [phase, speed]))[:, _BRIGHTNESS]
    np.testing.assert_allclose(brightness, np.where(dim, 0.35 * 0.675, 0.675))

  def test_brightness_is_at_most_1_and_never_0(self):
    for draws in (np.zeros(7), np.full(7, 0.999)):
      for motion in glyph_videos.MOTIONS:
        brightness = glyph_videos.poses(motion, draws)[:, _BRIGHTNESS]
        assert 0.05 <= brightness.min() and brightness.max() <= 1


class TestRender:

  def _center(self, frame: np.ndarray) -> tuple[float, float]:
    y, x = np.mgrid[:32, :32]
    return (frame * x).sum() / frame.sum(), (frame * y).sum() / frame.sum()

  def _draw(self, image: np.ndarray, **changes: float) -> np.ndarray:
    pose = {'x': 0.0, 'y': 0.0, 'size': 1.0, 'angle': 0.0, 'brightness': 1.0} | changes
    return glyph_videos.render(image, np.array([list(pose.values())]))[0]

  @pytest.fixture
  def bar(self) -> np.ndarray:
    """A bar from the middle upward."""
    image = np.zeros((32, 32), np.uint8)
    image[4:16, 14:18] = 200
    return image

  @pytest.mark.parametrize(('changes', 'expected'), [
      (dict(), lambda bar: bar),
      (dict(x=3, y=-2), lambda bar: np.roll(bar, (-2, 3), (0, 1))),
      (dict(angle=90), lambda bar: np.rot90(bar, k=-1)),  # turned to the right, it points to the right
      (dict(brightness=0.25), lambda bar: bar // 4),
  ], ids=['neutral', 'shifted', 'turned', 'darker'])
  def test_a_pose_shows_the_image_as_expected(self, bar, changes, expected):
    np.testing.assert_array_equal(self._draw(bar, **changes), expected(bar))

  def test_a_glyph_turns_around_its_own_position(self, bar):
    # Upside down around the middle of the image, then five pixels to the right.
    expected = np.roll(np.rot90(bar, k=2), 5, axis=1)
    np.testing.assert_allclose(self._draw(bar, x=5, angle=180).astype(int), expected.astype(int), atol=1)

  def test_twice_the_size_has_four_times_the_ink(self, bar):
    small = self._draw(bar, size=0.5)
    assert small.astype(int).sum() == pytest.approx(bar.astype(int).sum() / 4, rel=0.05)
    assert self._center(small)[1] == pytest.approx((15.5 + self._center(bar)[1]) / 2, abs=0.1)


class TestBuild:

  @pytest.mark.parametrize('split', glyphs.SPLITS)
  def test_videos_have_images_of_their_split_and_balanced_motions(self, few_videos, letters, split):
    columns = few_videos[split]
    assert set(columns) == {'pixels', 'name', 'face', 'motion'}
    assert columns['pixels'].shape == (48, 8, 32, 32)
    assert columns['pixels'].dtype == np.uint8
    assert collections.Counter(columns['motion'].tolist()) == dict.fromkeys(glyph_videos.MOTIONS, 4)
    assert set(columns['name']) <= set(_images(letters, split)['name'])

  def test_every_full_split_divides_by_the_motions(self):
    assert {count % len(glyph_videos.MOTIONS) for count in glyph_videos.NUM_VIDEOS.values()} == {0}
    assert tuple(glyph_videos.NUM_VIDEOS) == glyphs.SPLITS

  def test_a_video_shows_the_glyph_of_its_name(self, few_videos, letters):
    columns, images = few_videos['train'], _images(letters, 'train')
    index = columns['motion'].tolist().index('stand still')
    image = images['pixels'][images['name'].tolist().index(columns['name'][index])]
    pose = glyph_videos.poses('stand still', glyph_videos._draws('train', index)[1:])
    np.testing.assert_array_equal(columns['pixels'][index], glyph_videos.render(image, pose))

  def test_videos_of_two_splits_move_differently(self):
    assert not np.array_equal(glyph_videos._draws('train', 0), glyph_videos._draws('test_fonts', 0))


class TestBaselines:

  def _accuracy(self, letters, frames: list[int]) -> float:
    features, motions = [], []
    for _, columns, _ in glyph_videos.splits(
        lambda split: letters, lambda line: None, {'train': 2400, 'validation': 600}):
      tiles = columns['pixels'][:, frames].reshape(-1, len(frames), 8, 4, 8, 4)
      features.append(tiles.mean((3, 5)).reshape(len(tiles), -1) / 255)
      motions.append(columns['motion'])
    model = linear_model.LogisticRegression(max_iter=100).fit(features[0], motions[0])
    return model.score(features[1], motions[1])

  @pytest.mark.filterwarnings('ignore::sklearn.exceptions.ConvergenceWarning')
  def test_all_frames_reveal_the_motion_and_the_middle_one_little(self, letters):
    # Chance is 0.083.
    assert self._accuracy(letters, [4]) < 0.22
    assert self._accuracy(letters, list(range(8))) > 0.6
