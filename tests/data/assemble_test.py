"""A run's data with the published tokenizer: where it comes from, and what the fingerprint covers."""

import dataclasses
import gzip
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.data.pipeline import hashing
from uni_moe_jax.data.pipeline.clip_tokenizer import ClipTokenizer
from uni_moe_jax.data.pipeline.tokenizer import SentencePieceTokenizer

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


def test_the_kind_of_the_config_is_the_tokenizer(merges):
  assert isinstance(_data().tokenizer, SentencePieceTokenizer)
  clip = _data(merges)
  assert isinstance(clip.tokenizer, ClipTokenizer)
  assert clip.tokenizer_file == merges


def test_a_vocabulary_set_has_a_row_for_every_id_of_the_merges(merges):
  assert _data(merges).target_sets['words'].size == 512 + 2 + 5  # not config.tokenizer.vocab_size


def test_the_fingerprint_covers_what_the_merges_say_and_not_where_they_lie(merges, tmp_path):
  first = _data(merges).fingerprint
  packed, other = tmp_path / 'elsewhere.gz', tmp_path / 'other.txt'
  packed.write_bytes(gzip.compress(_MERGES.encode()))
  other.write_text(_MERGES.replace('t h', 'h t').replace('th', 'ht'))
  assert _data(packed).fingerprint == first
  assert _data(other).fingerprint != first
  assert _data().fingerprint != first


def test_a_trained_tokenizer_and_a_file_of_class_names_are_inputs_by_what_they_hold(tmp_path):
  folder = shutil.copytree(tiny.data_dir(), tmp_path / 'data')

  def data(listed='bar\ndisc\nstar\n'):
    (folder / 'names.tsv').write_text(listed)
    config = tiny.config('shape', data_dir=str(folder))
    config.target_sets.shapes.entries = 'file:names.tsv'
    return Data(config, make_plan(config))

  first, again, other = data(), data('# the same\nbar\ndisc\nstar\n'), data('bar\tpole\ndisc\nstar\n')
  assert again.inputs_fingerprint == first.inputs_fingerprint != other.inputs_fingerprint
  assert other.fingerprint == first.fingerprint  # by which runs of earlier versions go on
  with first.tokenizer_file.open('ab') as file:
    file.write(b'\xc0\x3e\x01')  # a field that no reader knows: another version of its library may write one
  changed = data()
  assert changed.inputs_fingerprint != first.inputs_fingerprint and changed.fingerprint == first.fingerprint


def test_a_missing_merges_file_is_named_with_its_field(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config\.tokenizer\.merges_path='.*gone\.txt' is not a file"):
    _data(tmp_path / 'gone.txt')


@pytest.mark.parametrize('random_special_tokens', [False, True])
def test_the_config_says_whether_random_words_may_be_special(merges, random_special_tokens):
  data = _data(merges, random_special_tokens=random_special_tokens)
  task = next(t for t in data._plan.tasks if t.name == 'text')
  examples = data.examples(task, training=True)
  epochs, ids = (tf.constant(a.reshape(-1)) for a in np.mgrid[:400, :examples.size])
  made = examples.make(ids, hashing.example_hash(0, 'text', epochs, ids))
  drawn = set(made['text'].numpy().ravel().tolist())
  # Texts hold `eot`, masks `spe`: the other three come as random words or not at all.
  others = data.tokenizer.special_ids - {data.tokenizer.eot, data.tokenizer.spe}
  assert others & drawn == (others if random_special_tokens else set())


def test_words_of_the_published_tokenizer_are_masked_as_wholes(merges):
  data = _data(merges)
  task = next(t for t in data._plan.tasks if t.name == 'text')
  examples = data.examples(dataclasses.replace(task, max_predictions=8, max_len=60))  # 15 % of 60: 9; evaluation shows every pick
  epochs, ids = (tf.constant(a.reshape(-1)) for a in np.mgrid[:20, :examples.size])
  made = {k: v.numpy() for k, v in examples.make(ids, hashing.example_hash(0, 'text', epochs, ids)).items()}
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


@pytest.mark.parametrize('task, changes, said', [
    ('shape', dict(image_size=8), r'1 frame\(s\) of 16 × 16 pixels; .*config\.model\.image_size=8'),
    ('motion', dict(max_num_frames=2), r'3 frame\(s\) of 16 × 16 pixels; .*config\.model\.max_num_frames=2'),
])
def test_pictures_that_the_model_does_not_take_are_named(task, changes, said):
  config = tiny.config(task, 'text', data_dir=tiny.data_dir())
  plan = make_plan(config)
  asked = next(t for t in plan.tasks if t.name == task)
  Data(config, plan).examples(asked)  # as they are, they fit
  config.model.update(changes)
  with pytest.raises(ValueError, match=rf'config\.tasks\.{task}: .*{said}'):
    Data(config, plan).examples(asked)


def test_a_vocabulary_that_the_text_cannot_give_names_its_field(tmp_path):
  config = tiny.config('text', data_dir=tiny.data_dir())
  config.tokenizer.vocab_size = 100_000
  with pytest.raises(ValueError, match=r'config\.tokenizer\.vocab_size=100000: These texts cannot give'):
    Data(config, make_plan(config))
  config.tokenizer.allow_smaller_vocab = True
  assert 40 < Data(config, make_plan(config)).tokenizer.size < 10_000
  config.tokenizer.allow_smaller_vocab = False  # what was learnt does not stand in for what cannot be
  with pytest.raises(ValueError, match='These texts cannot give'):
    Data(config, make_plan(config))
