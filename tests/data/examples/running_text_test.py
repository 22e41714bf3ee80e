"""Running text of files: which tokens of a record a row has."""

import numpy as np
import pytest

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.examples import running_text
from uni_moe_jax.data.examples.corrupt_examples import CorruptExampleCounter
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.utils import splitmix

S, EOT = 16, 2
FIRST = 1000  # number of the first word of a text


class _Numbers:
  """A tokenizer of words that are numbers, or of the characters of another text."""
  eot = EOT

  def __init__(self):
    self.num_chars = 0

  def encode(self, text):
    self.num_chars += len(text)
    return [int(word) for word in text.split()] if text[:1].isascii() else list(map(ord, text))


def _reader(*texts, training=True, tokenizer=None):
  """The rows of `running_text` over records of some texts."""
  c = tiny.config(data_dir='')
  c.target_sets.words = config_lib.target_set('vocabulary', family='words')
  c.tasks.x = config_lib.task('text_mlm', 'own:x', batch_size=4, target_set='words', max_len=S, max_predictions=3)
  [task] = [task for task in make_plan(c).tasks if task.name == 'x']
  dataset = file_dataset.FileDataset(
      'own:x', len(texts), lambda ids: [{'text': texts[i]} for i in ids], {'text': 'text'}, {}, {}, '')
  return running_text.running_text(
      task, dataset, np.arange(len(texts)), tokenizer or _Numbers(), training, CorruptExampleCounter('tasks.x', 0.0))


def _rows(read, num_epochs):
  """Rows that start with record 0, one per epoch."""
  hashes = np.array([splitmix.mix(0, 'x', epoch, 0) for epoch in range(num_epochs)], np.uint64)
  return read(np.zeros(num_epochs, int), hashes)


def _words(count):
  return ' '.join(str(FIRST + i) for i in range(count))


# A row has 16 words of 5 characters with their space; texts of more than 24 · 16 characters, 77 words, are cut.
@pytest.mark.parametrize('num_words', [17, 40, 76, 78, 200, 400])
def test_every_token_of_a_long_record_is_in_a_row_and_none_is_rare(num_words):
  num_epochs = 100 * num_words
  rows = _rows(_reader(_words(num_words)), num_epochs)
  counts = np.bincount(rows.ravel(), minlength=FIRST + num_words)[[*range(FIRST, FIRST + num_words), EOT]]
  # Of n tokens with the eot, S are in a row.
  share = counts / num_epochs / (S / (num_words + 1))
  assert share.min() > 0.4 and share.max() < 2


def test_a_row_has_consecutive_words_and_the_end_of_text_after_the_last_one_alone():
  for num_words in (40, 200):
    rows, last = _rows(_reader(_words(num_words)), 2000), FIRST + num_words - 1
    followers = set(zip(rows[:, :-1].ravel().tolist(), rows[:, 1:].ravel().tolist()))
    assert followers == {*((i, i + 1) for i in range(FIRST, last)), (last, EOT)}


def test_text_without_spaces_has_a_window_in_every_part():
  text = ''.join(chr(0x4e00 + i) for i in range(2000))
  rows = _rows(_reader(text), 50_000)
  assert set(rows.ravel().tolist()) == {*map(ord, text), EOT}


def test_the_window_is_a_function_of_the_hash():
  for num_words in (40, 200):
    read = _reader(_words(num_words))
    rows = _rows(read, 20)
    np.testing.assert_array_equal(_rows(read, 20), rows)
    assert len(np.unique(rows[:, 0])) > 5  # other epochs have other windows


def test_a_record_that_fits_into_a_row_begins_it():
  rows = _rows(_reader(_words(15)), 50)
  assert (rows == [*range(FIRST, FIRST + 15), EOT]).all()
  rows = _rows(_reader('7 8', _words(300)), 50)
  assert (rows == [7, 8, EOT, *range(FIRST, FIRST + 13)]).all()


@pytest.mark.parametrize('num_words', [16, 40, 200])
def test_evaluation_has_the_beginning_of_a_record(num_words):
  rows = _rows(_reader(_words(num_words), training=False), 10)
  assert (rows == np.arange(FIRST, FIRST + S)).all()


@pytest.mark.parametrize('training', [True, False])
def test_of_a_book_a_few_words_are_tokenized(training):
  tokenizer = _Numbers()
  read = _reader('7', _words(100_000), training=training, tokenizer=tokenizer)
  hashes = np.array([splitmix.mix(1)], np.uint64)
  for record, num_chars in ((0, 1 + 24 * S), (1, 12 * S)):  # a row that continues with the book, and one of it
    tokenizer.num_chars = 0
    [row] = read(np.array([record]), hashes)
    assert (row > 0).all() and tokenizer.num_chars <= num_chars + 50


def test_a_window_of_long_words_begins_within_one():
  text = ' '.join(['9' * 70] * 30)
  assert running_text._word_start(text, 60) == 60  # no space among the 50 characters before it
  assert [running_text._word_start(text, i) for i in (0, 50, 71, 100, len(text))] == [0, 0, 71, 71, len(text)]
