"""Examples of images and videos: what their task says about frames and crops, and a missing decoder."""

import sys

import numpy as np
import pytest
from PIL import Image

from tests.data import own_files
from tests.helpers.file_examples import SIDE, build, make
from uni_moe_jax.data.examples import image_transforms
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.utils.errors import UsageError


def test_videos_of_a_batch_are_in_order():
  def read(ids):
    level = lambda i: own_files.npy_bytes(np.full((3, 20, 20, 3), i, np.uint8))
    return [{'video': b'bytes' if i == 2 else level(i), 'label': 'ab'[i % 2]} for i in ids.tolist()]

  dataset = file_dataset.FileDataset(
      'own:x', 40, read, {'video': 'video', 'label': 'class'}, {'label': ('a', 'b')}, {}, '')
  features = make(build(dataset, 'video_classification', num_frames=2), range(4))
  levels = features['pixels'].reshape(4, -1)
  assert (levels == levels[:, :1]).all() and (levels[:, 0] % 2 == features['label'][:, 0]).all()
  assert levels[[0, 1, 3], 0].tolist() == [0, 1, 3] and levels[2, 0] != 2  # not a video


@pytest.mark.parametrize('media', ['image', 'video'])
def test_colors_become_the_luma_of_a_gray_model(media):
  frame = np.zeros((SIDE, SIDE, 3), np.uint8)
  frame[:, :5, 0] = frame[:, 5:10, 1] = frame[:, 10:, 2] = 200  # red, green and blue
  encoded = {'image': own_files.encode_image(Image.fromarray(frame), 'PNG'), 'video': own_files.npy_bytes(frame[None])}
  dataset = file_dataset.FileDataset('own:x', 40, lambda ids: [{media: encoded[media], 'label': 'a'} for _ in ids],
                                     {media: media, 'label': 'class'}, {'label': ('a', 'b')}, {}, '')
  for training in (False, True):
    examples = build(dataset, f'{media}_classification', training, channels=1, num_frames=int(media == 'video'))
    pixels = make(examples, [0])['pixels']
    assert pixels.shape == (1, 1, SIDE, SIDE, 1)
    luma = np.array([.299, .587, .114]) * 200
    np.testing.assert_allclose(pixels[0, 0, 0, [2, 7, 12], 0], luma, atol=1)


def _one_image(encoded):
  return file_dataset.FileDataset('own:x', 40, lambda ids: [{'image': encoded, 'label': 'a'} for _ in ids],
                                  {'image': 'image', 'label': 'class'}, {'label': ('a', 'b')}, {}, '')


@pytest.mark.parametrize('field', [
    dict(random_erasing=0.5), pytest.param(dict(randaugment=9.0), marks=pytest.mark.nightly)])
def test_images_are_augmented_in_training_only(field):
  image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)  # training takes all of it
  dataset = _one_image(own_files.encode_image(Image.fromarray(image), 'PNG'))
  trained, evaluated = (make(build(dataset, training=training, **field), range(16))['pixels'][:, 0]
                        for training in (True, False))
  assert 0 < (trained == image).reshape(16, -1).all(1).sum() < 16
  assert (evaluated == evaluated[0]).all()


def test_images_are_resized_by_the_method_of_the_config():
  noise, pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8), {}
  encoded = own_files.encode_image(Image.fromarray(noise))
  for method in ('fast', 'pillow'):
    pixels[method] = make(build(_one_image(encoded), training=False, resize=method), [0])['pixels'][0, 0]
    expected = image_transforms.read(encoded, 3, SIDE, None, 'resize_crop', method)
    np.testing.assert_array_equal(pixels[method], expected)
  assert (pixels['fast'] != pixels['pillow']).any()


@pytest.mark.parametrize('first, message', [(b'mp4', "Videos need PyAV; run: pip install"), (b'', ''), (None, '')],
                         ids=['a file', 'an array', 'corrupt'])
def test_a_missing_decoder_of_videos_is_reported_before_any_batch(monkeypatch, first, message):
  data = own_files.npy_bytes(own_files.moving_bar(True)) if first == b'' else first
  record = file_dataset.CorruptExample('gone') if data is None else {'video': data, 'label': 'a'}
  read = lambda ids: [record] * len(ids)
  dataset = file_dataset.FileDataset('own:x', 4, read, {'video': 'video', 'label': 'class'}, {'label': ('a', 'b')},
                                     {'label': np.zeros(4, np.int32)}, '')
  open_videos = lambda: build(dataset, 'video_classification', num_frames=3)
  assert open_videos().size == 4
  monkeypatch.setitem(sys.modules, 'av', None)  # as if it were not installed
  if message:
    with pytest.raises(UsageError, match=message):
      open_videos()
  else:
    assert open_videos().size == 4
