"""A run's data: its tokenizers, fingerprints, and errors for configs that do not fit."""

import dataclasses
import gzip
import hashlib
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data import hashing
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.text.clip_tokenizer import ClipTokenizer
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer

_MERGES = '#version: 0.2\nt h\nth e</w>\n'


def _data(merges=None, **fields):
  config = tiny.config('text', 'package', data_dir=tiny.data_dir())
  if merges is not None:
    config.tokenizer.update(type='clip', merges_path=str(merges))
  config.data.update(fields)
  return Data(config, make_plan(config))


@pytest.fixture(name='merges')
def _merges(tmp_path):
  path = tmp_path / 'merges.txt'
  path.write_text(_MERGES)
  return path


def test_the_config_selects_the_tokenizer_and_its_vocabulary(merges):
  assert isinstance(_data().tokenizer, SentencePieceTokenizer)
  data = _data(merges)
  assert isinstance(data.tokenizer, ClipTokenizer)
  assert data.tokenizer_file == merges
  assert data.target_sets['words'].size == 512 + 2 + 5  # an entry for every id, not config.tokenizer.vocab_size


def test_the_fingerprint_depends_on_the_content_of_the_merges_not_their_path(merges, tmp_path):
  first = _data(merges).fingerprint
  packed, other = tmp_path / 'elsewhere.gz', tmp_path / 'other.txt'
  packed.write_bytes(gzip.compress(_MERGES.encode()))
  other.write_text(_MERGES.replace('t h', 'h t').replace('th', 'ht'))
  assert _data(packed).fingerprint == first
  assert _data(other).fingerprint != first
  assert _data().fingerprint != first


def test_the_inputs_fingerprint_depends_on_the_content_of_tokenizer_and_class_names(tmp_path):
  folder = shutil.copytree(tiny.data_dir(), tmp_path / 'data')

  def data(names='bar\ndisc\nstar\n'):
    (folder / 'names.tsv').write_text(names)
    config = tiny.config('shape', data_dir=str(folder))
    config.target_sets.shapes.entries = 'file:names.tsv'
    return Data(config, make_plan(config))

  first, again, other = data(), data('# the same\nbar\ndisc\nstar\n'), data('bar\tpole\ndisc\nstar\n')
  assert again.inputs_fingerprint == first.inputs_fingerprint != other.inputs_fingerprint
  assert other.fingerprint == first.fingerprint
  with first.tokenizer_file.open('ab') as file:
    file.write(b'\xc0\x3e\x01')  # an unknown field, as another version of the library may write
  changed = data()
  assert changed.inputs_fingerprint != first.inputs_fingerprint and changed.fingerprint == first.fingerprint


def test_where_nothing_can_be_written_the_tokenizer_is_trained_for_this_process(tmp_path, capsys):
  for path in pathlib.Path(tiny.data_dir()).iterdir():
    if path.name != 'tokenizers':
      (tmp_path / path.name).symlink_to(path)
  (tmp_path / 'tokenizers').write_text('')
  expected, data = _data(), _data(dir=str(tmp_path))
  assert f'note: {tmp_path}/tokenizers cannot be written (File exists)' in capsys.readouterr().err
  assert data.tokenizer.fingerprint == expected.tokenizer.fingerprint and data.fingerprint == expected.fingerprint
  assert data.tokenizer_file.read_bytes() == expected.tokenizer_file.read_bytes()
  assert not data.tokenizer_file.is_relative_to(tmp_path)
  (tmp_path / 'tokenizers').unlink()
  assert _data(dir=str(tmp_path)).tokenizer_file.parent == tmp_path / 'tokenizers'
  assert not capsys.readouterr().err


def test_a_run_keeps_the_ids_of_its_tokenizer_whatever_its_data_would_train_now(tmp_path):
  other = SentencePieceTokenizer.train(['words of an earlier version'] * 4, tmp_path / 'tokenizer.model', 40, True)
  config = tiny.config('text', 'package', data_dir=tiny.data_dir())
  data = Data(config, make_plan(config), tmp_path / 'tokenizer.model')
  assert data.tokenizer_file == tmp_path / 'tokenizer.model'
  assert data.tokenizer.fingerprint == other.fingerprint != _data().tokenizer.fingerprint
  assert data.fingerprint == _data().fingerprint  # of the text, which a change of the data would change


def _own_texts(directory, **extra):
  """Data of a task on prepared pairs of texts, of which each has `extra` fields of its own, functions of its index."""
  rows = own_files.read_jsonl(own_files.write_text_pairs(directory / 'in') / 'train.jsonl')
  own_files.write_jsonl(directory / 'in/train.jsonl', [
      {**row, **{name: value(i) for name, value in extra.items()}} for i, row in enumerate(rows)])
  prepare.prepare(directory / 'in', directory, 'pairs')
  config = tiny.config(data_dir=str(directory))
  config.tokenizer.update(vocab_size=60, allow_smaller_vocab=True)
  config.target_sets.labels = config_lib.target_set('own:pairs/label', family='words')
  config.tasks.pair = config_lib.task('text_classification', 'own:pairs', batch_size=4, target_set='labels', max_len=20,
                                      label_column='label', template='{text_a} <eot> <spe> , {text_b} <eot>')
  return Data(config, make_plan(config))


def test_a_tokenizer_is_trained_on_the_columns_that_tasks_read(tmp_path):
  plain = _own_texts(tmp_path / 'plain')
  more = _own_texts(
      tmp_path / 'more', digest=lambda i: hashlib.sha256(b'%d' % i).hexdigest(), color=lambda i: 'ab'[i % 2])
  assert more.records('own:pairs', 'train').columns.items() >= {('digest', 'text'), ('color', 'class')}
  assert more.tokenizer.fingerprint == plain.tokenizer.fingerprint
  assert {'digest', 'color'}.isdisjoint(plain.records('own:pairs', 'train').columns)


def _make(data, num_epochs, training, **changes):
  """Features of all texts in several epochs."""
  task = next(t for t in data._plan.tasks if t.name == 'text')
  examples = data.examples(dataclasses.replace(task, **changes), training=training)
  epochs, ids = (tf.constant(a.reshape(-1)) for a in np.mgrid[:num_epochs, :examples.size])
  return {k: v.numpy() for k, v in examples.make(ids, hashing.example_hash(0, 'text', epochs, ids)).items()}


def test_words_of_the_published_tokenizer_are_masked_as_a_whole(merges):
  data = _data(merges)
  made = _make(data, 20, training=False, max_predictions=8, max_len=60)  # 15 % of 60: 9
  longest = 0
  for text, position, label, weight in zip(*(made[k] for k in ('text', 'position', 'label', 'weight'))):
    picked = np.zeros(60, bool)
    picked[position[weight > 0]] = True
    text[position[weight > 0]] = label[weight > 0]
    ends = data.tokenizer.word_end[text]
    word = np.cumsum(ends) - ends  # ends before a piece
    for w in np.unique(word):
      assert len(set(picked[word == w])) == 1
      longest = max(longest, picked[word == w].sum())
  assert longest > 3


@pytest.mark.parametrize('name, changes, message', [
    ('shape', dict(image_size=8), r'1 frame\(s\) of 16 × 16 pixels; .*config\.model\.image_size=8'),
    ('motion', dict(max_num_frames=2), r'3 frame\(s\) of 16 × 16 pixels; .*config\.model\.max_num_frames=2'),
])
def test_images_and_videos_that_the_model_does_not_accept_are_an_error(name, changes, message):
  config = tiny.config(name, 'text', data_dir=tiny.data_dir())
  plan = make_plan(config)
  task = next(t for t in plan.tasks if t.name == name)
  Data(config, plan).examples(task)  # unchanged, they fit
  config.model.update(changes)
  with pytest.raises(ValueError, match=rf'config\.tasks\.{name}: .*{message}'):
    Data(config, plan).examples(task)


def test_arrays_show_all_their_frames_and_no_other_number(name='motion'):
  config = tiny.config(name, 'text', data_dir=tiny.data_dir())
  for num_frames in (0, tiny.NUM_FRAMES):
    config.tasks[name].num_frames = num_frames
    plan = make_plan(config)
    Data(config, plan).examples(next(t for t in plan.tasks if t.name == name))
  config.tasks[name].num_frames = 2
  with pytest.raises(ValueError, match=r"motion\.num_frames=2: source 'videos' has arrays, all of whose 3 frame"):
    Data(config, plan := make_plan(config)).examples(next(t for t in plan.tasks if t.name == name))


def test_a_vocabulary_too_large_for_the_text_is_an_error_that_names_the_field():
  config = tiny.config('text', data_dir=tiny.data_dir())
  config.tokenizer.update(vocab_size=100_000, allow_smaller_vocab=False)
  with pytest.raises(ValueError, match=r'config\.tokenizer\.vocab_size=100000: These texts cannot give'):
    Data(config, make_plan(config))
  config.tokenizer.allow_smaller_vocab = True
  assert 40 < Data(config, make_plan(config)).tokenizer.size < 10_000
  config.tokenizer.allow_smaller_vocab = False  # the smaller tokenizer in the cache does not replace it
  with pytest.raises(ValueError, match='These texts cannot give'):
    Data(config, make_plan(config))
