"""Batch features of records per task type: names, shapes and content."""

import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import tiny
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples.examples import ExampleBuilder
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
from uni_moe_jax.tasks.task_types import Segment
from uni_moe_jax.utils.errors import UsageError

SETS = {
    'shapes': tiny.CLASSES, 'motions': tiny.MOTIONS, 'packages': tiny.PACKAGES, 'answers': ('no', 'yes'), 'words': ()}
N = 5  # examples of a batch


@functools.cache
def _tokenizer() -> SentencePieceTokenizer:
  return SentencePieceTokenizer(tiny.tokenizer_file())


def _task(name, **changes):
  return dataclasses.replace(make_plan(tiny.config(name)).tasks[0], **changes)


def _columns(source):
  return tiny.columns()[source][0]


def _build(name, training=True, records=None, channels=1, random_special_tokens=False, classes=SETS, **changes):
  task = _task(name, **changes)
  builder = ExampleBuilder(
      _tokenizer(), classes, channels, tiny.IMAGE_SIZE, training, random_special_tokens, 0, 0.0, 'fast')
  return builder.build(task, records or tiny.records(task.source))


def _make(examples, ids=range(N), epoch=0):
  ids = tf.constant(list(ids), tf.int64)
  hashes = hashing.example_hash(0, 'task', tf.cast(tf.broadcast_to(epoch, tf.shape(ids)), tf.int64), ids)
  return {k: v.numpy() for k, v in examples.make(ids, hashes).items()}


PIXELS, VIDEO = ((N, 1, 16, 16, 1), 'uint8'), ((N, 3, 16, 16, 1), 'uint8')
LABEL, WEIGHT = ((N, 1), 'int32'), ((N, 1), 'float32')


@pytest.mark.parametrize('name, expected', [
    ('shape', dict(pixels=PIXELS, label=LABEL, weight=WEIGHT)),
    ('motion', dict(pixels=VIDEO, label=LABEL, weight=WEIGHT)),
    ('text', dict(text=((N, 16), 'int32'), text_valid=((N, 16), 'bool'), position=((N, 3), 'int32'),
                  label=((N, 3), 'int32'), weight=((N, 3), 'float32'))),
    ('caption', dict(pixels=PIXELS, text=((N, 12), 'int32'), text_valid=((N, 12), 'bool'), label=((N, 6), 'int32'),
                     weight=((N, 6), 'float32'))),
    ('pair', dict(pixels=PIXELS, target=((N, 8), 'int32'), target_valid=((N, 8), 'bool'), text_id=((N,), 'int32'),
                  weight=WEIGHT)),
    ('package', dict(text=((N, 16), 'int32'), text_valid=((N, 16), 'bool'), position=LABEL, label=LABEL,
                     weight=WEIGHT)),
])
def test_features_of_a_task_type_have_their_shapes_and_dtypes(name, expected):
  features = _make(_build(name))
  assert {k: (v.shape, v.dtype.name) for k, v in features.items()} == {'id': ((N,), 'int64'), **expected}


def test_pixels_are_those_of_the_record_in_every_channel_and_labels_are_indices_into_the_target_set():
  columns, ids = _columns('glyphs'), [3, 0, 3, *range(24)]
  features = _make(_build('shape', channels=3), ids)
  assert features['pixels'].shape == (27, 1, 16, 16, 3)
  for channel in range(3):
    np.testing.assert_array_equal(features['pixels'][:, 0, :, :, channel], columns['pixels'][ids])
  assert [tiny.CLASSES[i] for i in features['label'][:, 0]] == columns['class'][ids].tolist()
  np.testing.assert_array_equal(features['weight'], 1)


def test_records_without_a_class_are_skipped_with_their_texts():
  # Every third of 24 paragraphs has no package; ids count the others.
  examples, columns = _build('package'), _columns('paragraphs')
  assert examples.size == 16
  features, kept = _make(examples, ids=range(16)), columns['package'] != ''
  assert [tiny.PACKAGES[i] for i in features['label'][:, 0]] == columns['package'][kept].tolist()
  for row, text in zip(features['text'], columns['text'][kept].tolist()):
    assert row[:5].tolist() == _tokenizer().encode(text)[:5]


def test_images_match_their_labels_when_records_are_skipped():
  shapes = np.where(np.arange(24) % 2, _columns('glyphs')['class'], '')
  features = _make(_build('shape', records=tiny.records('glyphs', **{'class': shapes})), ids=range(12))
  np.testing.assert_array_equal(features['pixels'][:, 0, :, :, 0], _columns('glyphs')['pixels'][1::2])
  assert [tiny.CLASSES[i] for i in features['label'][:, 0]] == shapes[1::2].tolist()


def test_a_caption_is_its_tokens_and_as_many_queries():
  tokenizer = _tokenizer()
  features, truncated = (_make(_build('caption', max_len=n)) for n in (20, 4))
  for i in range(N):
    words = tokenizer.encode(_columns('glyphs')['name'][i])
    n = len(words) + 1
    np.testing.assert_array_equal(features['text'][i, :20], [*words, tokenizer.eot] + [tokenizer.pad] * (20 - n))
    np.testing.assert_array_equal(features['text'][i, 20:], tokenizer.spe)
    np.testing.assert_array_equal(features['label'][i, :n], [*words, tokenizer.eot])
    used = [True] * n + [False] * (20 - n)
    np.testing.assert_array_equal(features['text_valid'][i], used * 2)
    np.testing.assert_array_equal(features['weight'][i], used)
    assert truncated['label'][i].tolist() == [*words[:3], tokenizer.eot]


def test_texts_of_pairs_have_equal_ids_where_their_tokens_are_equal():
  start = 'a red bar of the numbers '
  texts = ['A red bar', 'a red bar', start + 'one', start + 'two', 'a red disc']
  records = tiny.records('glyphs', name=np.resize(texts, 24))
  for training in (True, False):
    features = _make(_build('pair', training, records, caption_templates=('{name}',), max_len=8))
    a, b, c, d, e = features['text_id'].tolist()
    assert a == b and c == d and len({a, c, e}) == 3
    assert [_tokenizer().decode(features['target'][i]) for i in (0, 1, 4)] == ['a red bar', 'a red bar', 'a red disc']


def test_captions_change_between_epochs_in_training_only():
  def texts(training):
    examples = _build('pair', training, caption_templates=('{class}', '{class} of {face}'))
    return [[_tokenizer().decode(r) for r in _make(examples, range(24), epoch)['target']] for epoch in range(2)]

  shapes, faces = (_columns('glyphs')[k].tolist() for k in ('class', 'face'))
  first, second = texts(training=True)
  assert first != second
  assert {t == s for t, s in zip(first, shapes)} == {True, False}  # both templates occur
  assert all(t in (s, f'{s} of {f}'[:len(t)]) for t, s, f in zip(first, shapes, faces))
  assert texts(training=False) == [shapes, shapes]


def test_a_template_places_both_texts_around_the_slot_which_is_the_readout_position():
  tokenizer, columns = _tokenizer(), _columns('pairs')
  features = _make(_build('answer'), ids=range(12))
  position = features['position'][:, 0]
  assert len(set(position.tolist())) > 1  # texts of different lengths
  for row, index in zip(features['text'], position):
    assert np.flatnonzero(row == tokenizer.spe).tolist() == [index]
  features = _make(_build('answer', max_len=100), ids=[4])
  a, b = (tokenizer.encode(columns[k][4]) for k in ('text_a', 'text_b'))
  expected = [*a, tokenizer.eot, tokenizer.spe, *tokenizer.encode(','), *b, tokenizer.eot]
  n = len(expected)
  assert features['text'][0, :n].tolist() == expected
  assert features['text_valid'][0].tolist() == [True] * n + [False] * (100 - n)
  assert features['position'][0, 0] == len(a) + 1


def test_a_row_of_masked_text_is_a_record_and_the_next_ones():
  tokenizer = _tokenizer()
  features = _make(_build('text', training=False), ids=range(3))
  tokens = [[*tokenizer.encode(text), tokenizer.eot] for text in _columns('paragraphs')['text'].tolist()]
  restored = features['text'].copy()
  for row, position, label, weight in zip(restored, features['position'], features['label'], features['weight']):
    row[position[weight > 0]] = label[weight > 0]
  assert restored.tolist() == [sum(tokens[i:i + 16], [])[:16] for i in range(3)]
  assert features['text_valid'].all()


def test_evaluation_masks_every_selected_token_and_training_does_not():
  spe = _tokenizer().spe

  def share(training):
    features = _make(_build('text', training), ids=range(20))
    selected = np.take_along_axis(features['text'], features['position'], axis=1)[features['weight'] > 0]
    return np.mean(selected == spe)

  assert share(training=False) == 1
  assert .5 < share(training=True) < 1


@pytest.mark.parametrize('random_special_tokens', [False, True])
def test_random_tokens_are_special_only_if_configured(random_special_tokens):
  tokenizer, examples = _tokenizer(), _build('text', random_special_tokens=random_special_tokens)
  # Every row in 100 epochs: about 600 random tokens, 10 of each id.
  epochs, ids = np.mgrid[:100, :20].reshape(2, -1)
  text = _make(examples, ids, epochs)['text']
  # Texts contain `eot`, masks `spe`: the other two occur as random tokens or not at all.
  others = {tokenizer.pad, tokenizer.unk}
  assert others & set(text.ravel().tolist()) == (others if random_special_tokens else set())


def test_words_of_texts_are_left_out_in_training_only_and_others_in_every_epoch():
  full, dropout = _make(_build('package')), _build('package', word_dropout=.5)
  evaluated = _make(_build('package', training=False, word_dropout=.5))
  np.testing.assert_equal(evaluated, full)
  lengths = [_make(dropout, epoch=epoch)['text_valid'].sum(1) for epoch in range(8)]
  assert np.max(lengths, 0).tolist() <= full['text_valid'].sum(1).tolist() and len(np.unique(lengths, axis=0)) > 1
  features = _make(dropout)
  assert {k: (v.shape, v.dtype) for k, v in features.items()} == {k: (v.shape, v.dtype) for k, v in full.items()}
  np.testing.assert_array_equal(np.take_along_axis(features['text'], features['position'], 1), _tokenizer().spe)
  np.testing.assert_array_equal(features['label'], full['label'])


@pytest.mark.parametrize('name, changes, message', [
    ('shape', dict(label_column='clas'),
     "config.tasks.shape.label_column='clas' is not a column of classes or answers of source 'glyphs'; did you mean"),
    ('pair', dict(caption_templates=('{nme}',)), "caption_templates names column 'nme' .*; did you mean 'name'"),
    ('answer', dict(template='{text_c} <spe> <eot>'), "config.tasks.answer.template names column 'text_c' .*; did you"),
    ('text', dict(source='glyphs'), "config.tasks.text: source 'glyphs' has no text column 'text'"),
    ('shape', dict(source='paragraphs', label_column='package', target_set='packages'),
     "source 'paragraphs' has neither images nor videos"),
])
def test_a_config_that_does_not_match_the_records_is_reported(name, changes, message):
  with pytest.raises(ValueError, match=message):
    _build(name, **changes)


def test_unknown_classes_and_a_source_without_labels_are_reported():
  with pytest.raises(ValueError, match="class 'disc' of source 'glyphs' is not in the target set; did you mean 'disk'"):
    _build('shape', classes={'shapes': ('bar', 'disk', 'star')})
  with pytest.raises(ValueError, match=r"no record of source 'paragraphs', split 'train', has 'package'"):
    _build('package', records=tiny.records('paragraphs', package=np.full(24, '')))


@pytest.mark.parametrize('name, changes, message', [
    ('package', dict(readout='cls'), "has a text segment, but examples with readout 'cls' have no input of it; fill a"),
    ('caption', dict(readout='cls'), "has a text segment, but examples with readout 'cls'"),
    ('text', dict(inputs=(Segment('visual'), Segment('text'))),
     "has a visual segment, but examples with readout 'masked' have no input of it; leave the segment out")])
def test_a_task_type_with_an_input_that_no_example_has_is_an_error(name, changes, message):
  task_type = dataclasses.replace(_task(name).type, name='own', **changes)
  with pytest.raises(UsageError, match=rf"config\.tasks\.{name}: task type 'own' {message}"):
    _build(name, type=task_type)
  _build(name)
