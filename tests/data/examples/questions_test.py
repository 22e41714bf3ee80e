"""Questions about images in files: one answer drawn by its score, and words that are mirrored with the image."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples.examples import ExampleBuilder
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
from uni_moe_jax.utils.errors import UsageError

SIDE = 16


def _questions(answers=('a',) * 4 + ('b',) * 2 + ('c',) * 4, classes=(), training=True, **fields):
  """Examples of one question about an image that is brighter on the left; c is no entry of the set.

  classes: of own data, and the target set; the first one is the answer.
  """
  pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
  pixels[:, :SIDE // 2] = 250
  record = {'image': own_files.encode_image(Image.fromarray(pixels), 'PNG'), 'q': 'is A to the left of ab? b',
            'answers': classes[0] if classes else answers}
  columns = {'image': 'image', 'q': 'text', 'answers': 'class' if classes else 'texts'}
  dataset = file_dataset.FileDataset(
      'own:x', 2000, lambda ids: [record] * len(ids), columns, {'answers': classes} if classes else {},
      {'answers': np.zeros(2000, np.int32)} if classes else {}, '')
  c = tiny.config(data_dir='')
  c.target_sets.ab = config_lib.target_set(('a', 'b'), family='words')
  c.tasks.x = config_lib.task('vqa', 'own:x', batch_size=4, label_column='answers', target_set='ab', max_len=20,
                              template='{q} <spe> <eot>', max_predictions=2, **fields)
  builder = ExampleBuilder(
      SentencePieceTokenizer(tiny.tokenizer_file()), {'ab': classes or ('a', 'b')}, 3, SIDE, training,
      random_special_tokens=False, seed=0, max_corrupt_fraction=0.0, resize='fast')
  return builder.build(make_plan(c).tasks[0], dataset)


def _make(examples, ids):
  ids = tf.constant(ids, tf.int64)
  hashes = hashing.example_hash(0, 'x', tf.constant(0, tf.int64), ids)
  return {k: v.numpy() for k, v in examples.make(ids, hashes).items()}


def test_one_answer_is_drawn_by_its_soft_score():
  fields = _make(_questions(single_answer=True), range(2000))
  assert (fields['weight'] == [1, 0]).all()
  # Four of ten score 1, two 0.6; c is no entry of the set.
  share, expected = np.mean(fields['label'][:, 0] == 0), 1 / 1.6
  assert abs(share - expected) < 3 * np.sqrt(expected * (1 - expected) / 2000)
  every = _make(_questions(), range(3))
  np.testing.assert_allclose(every['weight'], [[0.4, 0.2]] * 3)
  assert (every['label'] == [0, 1]).all()


def test_of_a_few_answers_each_is_drawn_by_its_share():
  for answers, share in ((('b',), 0), (('a', 'a', 'b'), 2 / 3)):
    fields = _make(_questions(answers, single_answer=True), range(2000))
    assert (fields['weight'] == [1, 0]).all()
    assert abs(np.mean(fields['label'][:, 0] == 0) - share) <= 3 * np.sqrt(share * (1 - share) / 2000)
  np.testing.assert_allclose(_make(_questions(('b',)), range(1))['weight'], [[1, 0]])


def test_words_and_answers_change_places_with_the_sides_of_a_mirrored_image():
  tokenizer = SentencePieceTokenizer(tiny.tokenizer_file())
  ids = lambda text: [*tokenizer.encode(text), tokenizer.spe, tokenizer.eot]
  fields = _make(_questions(random_flip=True, mirrored_words=(('a', 'b'),)), range(64))
  mirrored = fields['pixels'][:, 0, 0, -1, 0] > 100
  assert 16 < mirrored.sum() < 48
  for i, other in enumerate(mirrored):
    text = fields['text'][i][fields['text_valid'][i]].tolist()
    assert text == ids('is b to the left of ab? a' if other else 'is A to the left of ab? b')
    assert dict(zip(fields['label'][i].tolist(), fields['weight'][i])) == pytest.approx(
        {1: 0.4, 0: 0.2} if other else {0: 0.4, 1: 0.2})
  unchanged = _make(_questions(random_flip=True), range(64))
  assert (unchanged['text'] == unchanged['text'][0]).all() and (unchanged['label'] == [0, 1]).all()


@pytest.mark.parametrize('classes, answer', [
    (('left', 'right'), 1), (('Left', 'left', 'Right', 'right'), 2), (('UP_LEFT', 'UP_RIGHT'), 1),
    (('lefty', 'righty'), 0)])
def test_the_class_of_a_mirrored_image_is_that_of_the_other_side(classes, answer):
  sides = dict(random_flip=True, mirrored_words=(('Left', 'Right'),))
  fields = _make(_questions(classes=classes, **sides), range(32))
  mirrored = fields['pixels'][:, 0, 0, -1, 0] > 100
  assert 8 < mirrored.sum() < 24 and (fields['weight'] == 1).all()
  assert fields['label'][:, 0].tolist() == np.where(mirrored, answer, 0).tolist()
  still = _make(_questions(classes=classes, training=False, **sides), range(8))
  assert (still['label'] == 0).all() and (still['pixels'][:, 0, 0, -1, 0] < 100).all()


def test_a_class_without_one_of_the_other_side_is_an_error_at_the_start():
  sides = dict(random_flip=True, mirrored_words=(('left', 'right'),))
  with pytest.raises(UsageError, match=r"tasks\.x\.mirrored_words=.*class 'left' becomes 'right', which is not in "
                                       r'config\.target_sets\.ab; add it, or set mirrored_words=\(\)'):
    _questions(classes=('left', 'up'), **sides)
  _questions(classes=('left', 'up'), training=False, **sides)
