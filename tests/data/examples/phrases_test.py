"""Phrases are tokenized once per (data, tokenizer, templates), and examples are those of records that are parsed."""

import concurrent.futures
import dataclasses
import pathlib
import pickle

import numpy as np
import pytest
import tensorflow as tf

from tests.data import own_files
from tests.helpers import file_size, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples import phrases
from uni_moe_jax.data.examples.examples import ExampleBuilder
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
from uni_moe_jax.io import locks
from uni_moe_jax.utils.errors import UsageError

TEMPLATES = ('{captions}', '{color} {captions} of {tags}', 'it is {note|no_stop}', 'an image')
NUM_ROWS = 24


@pytest.fixture
def records(tmp_path):
  """Images with one to three captions, one or two tags, and a note; one has long captions."""
  rows = []
  for i in range(NUM_ROWS):
    own_files.write_image(tmp_path / f'in/{i}.png', 'red', i)
    captions = [f'a square {i} number {k} ' * (10 if i == 3 else 1) for k in range(1 + i % 3)]
    rows.append({'image': f'{i}.png', 'captions': captions, 'tags': [f'tag {k}' for k in range(1 + i % 2)],
                 'color': ('red', 'blue')[i % 2], 'note': f'note {i}.'})
  own_files.write_jsonl(tmp_path / 'in/rows.jsonl', rows)
  prepare.prepare(tmp_path / 'in', tmp_path, 'rows', test_fraction=0.0)
  return file_dataset.load('own:rows', tmp_path, 'train')


def _build(records, task_type='image_retrieval', training=True, templates=TEMPLATES, tokenizer=None, **fields):
  c = tiny.config(data_dir='')
  c.target_sets.words = config_lib.target_set('vocabulary', family='words')
  if task_type == 'image_caption':
    fields['target_set'] = 'words'
  c.tasks.x = config_lib.task(task_type, 'own:rows', batch_size=4, caption_templates=templates, max_len=12, **fields)
  builder = ExampleBuilder(
      tokenizer or SentencePieceTokenizer(tiny.tokenizer_file()), {}, channels=3, size=16, training=training,
      random_special_tokens=False, seed=0, max_corrupt_fraction=0.5, resize='fast')
  return builder.build(make_plan(c).tasks[0], records)


def _make(examples, epochs=3, number=NUM_ROWS):
  ids = tf.range(number, dtype=tf.int64)
  made = [examples.make(ids, hashing.example_hash(0, 'x', tf.constant(e, tf.int64), ids)) for e in range(epochs)]
  return {k: np.concatenate([m[k] for m in made]) for k in made[0]}


def _num_tokenized(records) -> int:
  return len([p for p in (records.cache / phrases.FOLDER).glob('*') if p.name != locks.FILE])


# Processes take seconds to start: one case has them.
@pytest.mark.parametrize('task_type, training, workers', [
    ('image_retrieval', True, 2), pytest.param('image_retrieval', False, 1, marks=pytest.mark.nightly),
    pytest.param('image_caption', True, 1, marks=pytest.mark.nightly), ('image_caption', False, 1)])
def test_examples_are_those_of_parsed_records(records, task_type, training, workers, monkeypatch):
  monkeypatch.setattr(phrases, '_CHUNK', 7)  # in many parts
  monkeypatch.setattr(phrases.cores, 'available', lambda: workers)
  expected = _make(_build(dataclasses.replace(records, text_file=None), task_type, training))
  assert _num_tokenized(records) == 0
  made = _make(_build(records, task_type, training))
  assert _num_tokenized(records) == 1
  assert expected.keys() == made.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(made[name], value, name)
    assert made[name].dtype == value.dtype


def test_texts_of_pairs_have_equal_ids_where_their_tokens_are_equal(tmp_path):
  start = 'a square number of squares '
  captions = ['A square', 'a square', start + 'one', start + 'two', 'a bar']
  for i in range(5):
    own_files.write_image(tmp_path / f'in/{i}.png', 'red', i)
  own_files.write_jsonl(
      tmp_path / 'in/rows.jsonl', [{'image': f'{i}.png', 'note': text} for i, text in enumerate(captions)])
  prepare.prepare(tmp_path / 'in', tmp_path, 'rows', test_fraction=0.0)
  records = file_dataset.load('own:rows', tmp_path, 'train')
  for source in (records, dataclasses.replace(records, text_file=None)):
    made = _make(_build(source, training=False, templates=('{note}',)), 1, 5)
    a, b, c, d, e = made['text_id'].tolist()
    assert a == b and c == d and len({a, c, e}) == 3 and min(a, c, e) >= 0


def test_the_number_of_phrases_is_that_of_templates_and_entries(records):
  _build(records)
  [path] = (records.cache / phrases.FOLDER).rglob('offsets')
  offsets = np.fromfile(path, np.int64)
  number = sum((1 + i % 3) + (1 + i % 3) * (1 + i % 2) + 2 for i in range(NUM_ROWS))
  assert len(offsets) == number + 1


def test_phrases_are_tokenized_once_by_the_first_of_several(records, monkeypatch):
  calls, tokenize = [], phrases._tokenize
  monkeypatch.setattr(phrases, '_tokenize', lambda *args: [calls.append(1), tokenize(*args)])
  monkeypatch.setattr(phrases, '_PERIOD', 0.01)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: _build(records), range(4)))
  _build(records, training=False)
  assert len(calls) == 1
  _build(records, templates=TEMPLATES[:1])
  assert len(calls) == 2 and _num_tokenized(records) == 2


def test_other_texts_or_another_tokenizer_are_tokenized_again(records, tmp_path):
  _build(records)
  _build(dataclasses.replace(records, fingerprint='other'))  # tests/data/prepare/prepare_test.py: of other names, too
  assert _num_tokenized(records) == 2
  _build(records, tokenizer=SentencePieceTokenizer.train(
      pathlib.Path(records.text_file('captions')).read_text().split('\n'), tmp_path / 'own.model', 60, True))
  assert _num_tokenized(records) == 3


def test_mirrored_words_and_too_many_phrases_are_tokenized_with_their_record(records, monkeypatch):
  _build(records, random_flip=True, mirrored_words=(('left', 'right'),))
  monkeypatch.setattr(phrases, '_MAX_PHRASES', 10)
  _build(records)
  assert _num_tokenized(records) == 0


def test_where_nothing_can_be_written_captions_are_tokenized_with_their_record(records, tmp_path, capsys):
  expected = _make(_build(records))
  (tmp_path / 'file').write_text('')
  made = _make(_build(dataclasses.replace(records, cache=tmp_path / 'file')))
  for name, value in expected.items():
    np.testing.assert_array_equal(made[name], value, name)
  assert f'note: {tmp_path}/file/tokens cannot be written (Not a directory)' in capsys.readouterr().err


def test_where_no_folder_can_be_renamed_captions_are_not_tokenized_in_vain(records, monkeypatch, capsys):
  monkeypatch.setattr(phrases, 'renames_folders', lambda _: False)  # as on a mounted bucket
  monkeypatch.setattr(phrases, '_tokenize', lambda *_: pytest.fail('tokenized'))
  assert 'text_id' in _make(_build(records))
  assert 'tokens cannot be written (folders cannot be renamed there)' in capsys.readouterr().err


@pytest.mark.parametrize('num_bytes', [4000, 8000])  # of 8,228; a part has 3,012 at most
def test_tokens_that_cannot_be_written_whole_are_not_kept(records, monkeypatch, capsys, num_bytes):
  monkeypatch.setattr(phrases, '_CHUNK', 1)
  monkeypatch.setattr(phrases.cores, 'available', lambda: 1)
  tokenizer = SentencePieceTokenizer(tiny.tokenizer_file())  # a larger file
  with file_size.at_most(num_bytes):
    made = _make(_build(records, tokenizer=tokenizer))
  assert _num_tokenized(records) == 0 and 'tokens cannot be written (File too large)' in capsys.readouterr().err
  for name, value in _make(_build(records)).items():
    np.testing.assert_array_equal(made[name], value, name)
  assert _num_tokenized(records) == 1


def test_a_text_without_a_field_and_a_split_without_captions(records):
  made = _make(_build(records, templates=('an image',)))
  assert len({row.tobytes() for row in made['target']}) == 1 and _num_tokenized(records) == 0
  none = dataclasses.replace(records, num_texts={**records.num_texts, 'captions': np.zeros(NUM_ROWS, np.int32)})
  with pytest.raises(UsageError, match="no record of source 'own:rows', split 'train', has 'captions'"):
    _build(none, templates=TEMPLATES[:1])


def test_what_a_killed_process_left_is_removed_later(records, monkeypatch):
  left = records.cache / phrases.FOLDER / '.0123.abcd'
  left.mkdir(parents=True)
  _build(records)
  assert left.exists()  # another process may write it
  monkeypatch.setattr(phrases, '_OLD', -1)
  _build(records, templates=TEMPLATES[:1])
  assert not left.exists() and _num_tokenized(records) == 2


def test_a_tokenizer_can_be_sent_to_another_process():
  tokenizer = SentencePieceTokenizer(tiny.tokenizer_file())
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.encode('a red square') == tokenizer.encode('a red square') and copy.fingerprint == tokenizer.fingerprint
