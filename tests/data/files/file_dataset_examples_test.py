"""Batches from files: the same on any layout, decoded as Pillow would, bad examples replaced in place and counted."""

import dataclasses
import json
import threading

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.data.files import file_dataset, file_dataset_examples, file_dataset_fields, prepare, video_pixels
from uni_moe_jax.data.pipeline import hashing
from uni_moe_jax.data.pipeline.corrupt_examples import CorruptExampleCounter
from uni_moe_jax.data.pipeline.mixtures import BatchLayout, Mixture, evaluation_batches
from uni_moe_jax.utils.errors import RunError

SIDE = 16


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """Captioned pictures, clips and labelled pairs of texts, prepared."""
  root, data = tmp_path_factory.mktemp('in'), tmp_path_factory.mktemp('data')
  prepare.prepare(own_files.write_captioned_images(root / 'pictures'), data, 'colours')
  prepare.prepare(own_files.write_videos(root / 'clips'), data, 'moves', test_fraction=0.0)
  (root / 'pairs').mkdir()
  lines = [{'text_a': f'the bar is {c}', 'text_b': f'it has colour {d}', 'label': 'yes' if c == d else 'no'}
           for c in own_files.COLORS for d in own_files.COLORS]
  (root / 'pairs/train.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  prepare.prepare(root / 'pairs', data, 'pairs')
  (root / 'book.txt').write_text('\n'.join(f'the {c} bar has number {i}' for i in range(30) for c in own_files.COLORS))
  prepare.prepare(root / 'book.txt', data, 'book', test_fraction=0.0)
  return data


@pytest.fixture(scope='module')
def run(data_dir):
  """(plan, data) of tasks of every sort over them."""
  c = tiny.config(data_dir=str(data_dir))
  c.model.update(dict(channels=3, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3))
  c.tokenizer.vocab_size = 60
  c.target_sets.colours = config_lib.target_set(
      (('green', 'grass'), ('red', 'blood', 'fire'), ('blue', 'sky')), family='names')
  c.target_sets.moves = config_lib.target_set('own:moves/label', family='names')
  c.target_sets.answers = config_lib.target_set('own:pairs/label', family='words')
  c.target_sets.words = config_lib.target_set('vocabulary', family='words')
  task = config_lib.task
  c.tasks.colour = task('image_classification', 'own:colours', batch_size=8, target_set='colours', label_column='colour', crop='random_resized_crop',
                        random_flip=True, randaugment=9.0, random_erasing=0.25, mixup_alpha=0.8, cutmix_alpha=1.0)
  c.tasks.pair = task('image_retrieval', 'own:colours', batch_size=4, caption_templates=('{captions}',), max_len=10)
  c.tasks.caption = task('image_caption', 'own:colours', batch_size=4, caption_templates=('{captions}', 'it is {colour}'), max_len=20,
                         target_set='words')
  c.tasks.moves = task('video_classification', 'own:moves', batch_size=4, target_set='moves', label_column='label', num_frames=3)
  c.tasks.answer = task('text_classification', 'own:pairs', batch_size=4, target_set='answers', label_column='label',
                        template='{text_a} <eot> <spe> , {text_b} <eot>', max_len=20)
  c.tasks.book = task('text_mlm', 'own:book', batch_size=4, target_set='words', max_len=20, max_predictions=3)
  plan = make_plan(c)
  return plan, Data(c, plan)


@pytest.fixture(scope='module')
def examples(run):
  plan, data = run
  return {t.name: data.examples(t, training=True) for t in plan.tasks}


def _mixture(run, examples, layout=BatchLayout()):
  return Mixture(run[0], examples, 0, 'all_tasks', 4, layout)


@pytest.fixture(scope='module')
def whole(run, examples):
  """The first two batches, in one layout."""
  return [batch for _, batch in _mixture(run, examples).iterate(0, 2)]


def test_the_global_batch_is_the_same_on_any_layout_and_after_a_restart(run, examples, whole):
  again = next(_mixture(run, examples).iterate(1, 2))[1]
  halves = [next(_mixture(run, examples, BatchLayout(1, 2, (i,))).iterate(1, 2))[1] for i in range(2)]
  for group, fields in whole[1].items():
    for name, value in fields.items():
      np.testing.assert_array_equal(value, again[group][name])
      if name != 'temporal_offset':
        np.testing.assert_array_equal(value.reshape(-1), np.concatenate([h[group][name] for h in halves]).reshape(-1))
  assert not np.array_equal(whole[0]['image_retrieval']['id'], whole[1]['image_retrieval']['id'])


def test_fields_have_the_shapes_of_their_kind(whole):
  batch = whole[0]
  assert {g: f['pixels'].shape for g, f in batch.items() if 'pixels' in f} == {
      'image_classification': (1, 8, 1, SIDE, SIDE, 3), 'image_retrieval': (1, 4, 1, SIDE, SIDE, 3),
      'image_caption': (1, 4, 1, SIDE, SIDE, 3), 'video_classification': (1, 4, 3, SIDE, SIDE, 3)}
  mixed = batch['image_classification']
  assert mixed['label'].shape == mixed['weight'].shape == (1, 8, 2)
  np.testing.assert_allclose(mixed['weight'].sum(-1), 1, rtol=1e-6)
  assert batch['image_caption']['text'].shape == (1, 4, 40)
  assert batch['text_mlm']['label'].shape == (1, 4, 3)


def _asked(run, name, **changes):
  plan, data = run
  task = dataclasses.replace(next(t for t in plan.tasks if t.name == name), **changes)
  examples = data.examples(task, 'test' if task.source == 'own:colours' else 'train')
  return data, examples, next(evaluation_batches(examples, np.arange(examples.size), examples.size))[0]


def test_a_picture_is_evaluated_on_the_middle_of_its_short_side(run, data_dir):
  _, _, fields = _asked(run, 'pair')
  records = file_dataset.load('own:colours', data_dir, 'test')
  import io
  picture = Image.open(io.BytesIO(records.read(np.array([0]))[0]['image'])).convert('RGB')  # 32 × 24
  expected = picture.resize((21, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16))
  difference = np.abs(fields['pixels'][0, 0].astype(int) - np.asarray(expected).astype(int))
  assert difference.max() <= 16 and difference.mean() < 2  # TensorFlow's JPEG is a fast one


def test_classes_are_found_by_what_the_source_calls_them(run):
  _, _, fields = _asked(run, 'colour')
  # Examples 4, 9, 14 … of red, green, blue in turn: green, red, blue; the set has green, red, blue.
  assert fields['label'][:, 0].tolist() == [0, 1, 2, 0, 1, 2]


def test_texts_are_the_records_own(run):
  data, examples, fields = _asked(run, 'caption')
  first = data.tokenizer.decode(fields['label'][0])
  assert first == 'a green square number 4'
  assert fields['text'][0, 20:].tolist() == [data.tokenizer.spe] * 20
  assert examples.references(np.array([0])) == [('a green square number 4', 'number 4 is green')]
  _, _, answer = _asked(run, 'answer')
  row = answer['text'][0]
  assert row[answer['position'][0, 0]] == data.tokenizer.spe
  assert answer['label'][:, 0].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1]  # no, yes


def test_running_text_goes_on_with_the_next_records(run):
  data, _, fields = _asked(run, 'book')
  text = np.where(fields['text'] == data.tokenizer.spe, -1, fields['text'])[0]
  text[fields['position'][0][fields['weight'][0] > 0]] = fields['label'][0][fields['weight'][0] > 0]
  expected = [t for c in list(own_files.COLORS) * 2 for t in [*data.tokenizer.encode(f'the {c} bar has number 0'), data.tokenizer.eot]]
  assert text.tolist() == expected[:20] and len(data.tokenizer.encode('the red bar has number 0')) < 19


def test_clips_show_one_frame_of_each_third(run, data_dir):
  _, _, fields = _asked(run, 'moves')
  # Twelve frames of 48 × 32, the bar of 4 at column 4 t: of thirds the middles are 2, 6 and 10, so columns 8, 24, 40. The middle
  # 32 columns are cut out: 0, 16 and 32 there, the last outside; 16 pixels of them are the model's.
  moving = fields['pixels'][fields['label'][:, 0] == 0][0].astype(int).mean(axis=(1, 3))  # [T, W]
  assert moving[0].argmax() in (0, 1) and moving[1].argmax() in (8, 9) and moving[2].max() < 60
  still = fields['pixels'][fields['label'][:, 0] == 1][0]
  assert np.abs(np.diff(still.astype(int), axis=0)).mean() < 8


def _records(bad: set[int], size: int = 40, unreadable=()) -> file_dataset.FileDataset:
  """Pictures of which some are no pictures, and some records raise what no one expects; picture i has level i."""
  def rows(ids):
    if any(i in unreadable for i in ids.tolist()):
      raise RuntimeError('chunk data hash mismatch')
    encode = lambda i: own_files.encode_image(Image.new('RGB', (20, 20), (i, i, i)), 'PNG')
    return [{'image': b'bytes' if i in bad else encode(i), 'label': 'ab'[i % 2], 'where': f'file {i}'} for i in ids.tolist()]
  columns = {'image': 'image', 'label': 'class', 'where': 'text'}
  return file_dataset.FileDataset('own:x', size, rows, columns, {'label': ('a', 'b')}, {}, '')


def _examples(bad, training=True, fraction=0.5, unreadable=()):
  c = tiny.config(data_dir='')
  c.target_sets.ab = config_lib.target_set(('a', 'b'), family='names')
  c.tasks.x = config_lib.task('image_classification', 'own:x', batch_size=4, target_set='ab', label_column='label')
  builder = file_dataset_examples.FileExampleBuilder(None, {'ab': ('a', 'b')}, SIDE, 3, training, False, 0, fraction)
  return builder.build(make_plan(c).tasks[0], _records(bad, unreadable=unreadable))


def _make(examples, ids):
  ids = tf.constant(ids, tf.int64)
  return {k: v.numpy() for k, v in examples.make(ids, hashing.example_hash(0, 'x', tf.constant(0, tf.int64), ids)).items()}


def test_a_bad_example_is_replaced_in_place_and_the_others_stay():
  good, some = _make(_examples(set()), range(8)), _make(examples := _examples({2, 5}), range(8))
  for i in range(8):
    same = np.array_equal(good['pixels'][i], some['pixels'][i]) and good['label'][i] == some['label'][i]
    assert same == (i not in (2, 5))
  # What took its place is a whole example: its picture's level says its class.
  for i in (2, 5):
    level = some['pixels'][i].reshape(-1)[0]
    assert level not in (2, 5) and some['label'][i, 0] == level % 2 and (some['pixels'][i] == level).all()
  assert (examples.corrupt_counter.num_corrupt, examples.corrupt_counter.num_read) == (2, 10)  # and two in their place
  np.testing.assert_array_equal(_make(_examples({2, 5}), range(8))['pixels'], some['pixels'])


def test_clips_of_a_batch_are_decoded_at_once_each_in_its_place(monkeypatch):
  def rows(ids):
    level = lambda i: np.full((3, 20, 20, 3), i, np.uint8)
    return [{'video': b'bytes' if i == 2 else own_files.npy_bytes(level(i)), 'label': 'ab'[i % 2]} for i in ids.tolist()]

  two, read = threading.Barrier(2, timeout=60), video_pixels.VideoReader.__call__
  monkeypatch.setattr(video_pixels.VideoReader, '__call__', lambda *args: [two.wait(), read(*args)][1])
  monkeypatch.setattr('os.cpu_count', lambda: 2)
  c = tiny.config(data_dir='')
  c.target_sets.ab = config_lib.target_set(('a', 'b'), family='names')
  c.tasks.x = config_lib.task('video_classification', 'own:x', batch_size=4, target_set='ab', label_column='label', num_frames=2)
  builder = file_dataset_examples.FileExampleBuilder(None, {'ab': ('a', 'b')}, SIDE, 3, True, False, 0, 0.5)
  records = file_dataset.FileDataset('own:x', 40, rows, {'video': 'video', 'label': 'class'}, {'label': ('a', 'b')}, {}, '')
  made = _make(builder.build(make_plan(c).tasks[0], records), range(4))
  levels = made['pixels'].reshape(4, -1)
  assert (levels == levels[:, :1]).all() and (levels[:, 0] % 2 == made['label'][:, 0]).all()
  assert levels[[0, 1, 3], 0].tolist() == [0, 1, 3] and levels[2, 0] != 2  # which is no clip


def test_a_record_that_cannot_be_read_costs_itself_alone():
  good, some = _make(_examples(set()), range(8)), _make(examples := _examples(set(), unreadable={2}), range(8))
  assert [np.array_equal(a, b) for a, b in zip(good['pixels'], some['pixels'])] == [i != 2 for i in range(8)]
  assert examples.corrupt_counter.num_corrupt == 1 and not examples.corrupt_counter.failed
  _make(examples, [2])  # a batch of nothing else
  assert examples.corrupt_counter.num_corrupt == 2 and not examples.corrupt_counter.failed
  with pytest.raises(RunError, match=r'1 of 4 .* own:x, record 3: a record that cannot be read \(chunk data hash'):
    next(evaluation_batches(_examples(set(), training=False, unreadable={3}), np.arange(4), 4))


def test_a_source_out_of_reach_ends_the_run_in_one_sentence():
  gone = set()
  examples = _examples(set(), unreadable=gone)
  _make(examples, range(4))
  gone |= set(range(40))
  _make(examples, range(4))
  with pytest.raises(RunError, match=r"source 'own:x' cannot be read \(chunk data hash mismatch\)\. Look whether"):
    examples.corrupt_counter.check()


def test_running_text_passes_over_what_cannot_be_read(run):
  data, rows = run[1], [{'text': f'the red bar has number {i}', 'where': f'line {i}'} for i in range(6)]

  def reading(*unreadable):
    def read(ids):
      if any(i in unreadable for i in ids.tolist()):
        raise RuntimeError('no')
      return [rows[i] for i in ids]
    records = file_dataset.FileDataset('own:x', 6, read, {'text': 'text', 'where': 'text'}, {}, {}, '')
    return file_dataset_fields.Running(records, 'text', data.tokenizer, 24, True, CorruptExampleCounter('tasks.x', 0.5))

  ids, hashes = np.array([0, 3]), np.zeros(2, np.uint64)
  tokens = lambda *records: [t for i in records for t in [*data.tokenizer.encode(rows[i]['text']), data.tokenizer.eot]][:24]
  assert len(tokens(0)) < 24
  assert reading().rows(ids, hashes).tolist() == [tokens(0, 1, 2), tokens(3, 4, 5)]
  broken = reading(1, 3)
  assert broken.rows(ids, hashes).tolist() == [tokens(0, 2, 4), tokens(4, 5, 0)]
  assert broken.corrupt_counter.num_corrupt == 2 + (len(tokens(0, 2)) < 24)  # a row that is not full yet asks record 3, too
  away = reading(*range(6))
  away.rows(ids, hashes)
  with pytest.raises(RunError, match="source 'own:x' cannot be read"):
    away.corrupt_counter.check()


def test_damage_in_a_shard_costs_the_records_that_it_hits(tmp_path):
  prepare.prepare(own_files.write_captioned_images(tmp_path / 'in', 40), tmp_path, 'some')
  [shard] = (tmp_path / 'own/some/1.0.0').glob('*train.array_record*')
  records = file_dataset.load('own:some', tmp_path, 'train')
  whole, bytes_ = records.read(np.arange(records.size)), bytearray(shard.read_bytes())
  at = bytes_.index(whole[9]['image'][100:120])
  bytes_[at] ^= 1
  shard.write_bytes(bytes_)
  found = file_dataset.load('own:some', tmp_path, 'train').fetched(np.arange(records.size))
  assert [i for i, row in enumerate(found) if row != whole[i]] == [9] and isinstance(found[9], file_dataset.CorruptExample)


def test_too_many_bad_examples_stop_with_the_first_path():
  examples = _examples(set(range(0, 40, 2)), fraction=0.3)
  with pytest.raises(RunError, match=r'config.tasks.x: \d+ of \d+ examples could not be used, more than config.data.'
                                       r'max_corrupt_fraction=0.3; the first: file 0: broken picture'):
    for start in range(0, 40, 8):
      _make(examples, range(start, start + 8))
      examples.corrupt_counter.check()
  examples = _examples(set(range(40)), fraction=1.0)
  _make(examples, range(4))
  with pytest.raises(RunError, match='could not be used'):
    examples.corrupt_counter.check()  # nothing can take their place


def test_evaluation_replaces_nothing_and_stops():
  with pytest.raises(RunError, match='1 of 4 examples could not be used.*file 3: broken picture'):
    next(evaluation_batches(_examples({3}, training=False), np.arange(4), 4))
  assert next(evaluation_batches(_examples({3}, training=False), np.arange(3), 3))[1] == 3


def test_the_texts_of_a_whole_split_are_read_without_holding_its_pictures():
  asked = []

  def rows(ids):
    asked.append(len(ids))
    return [{'image': b'large', 'captions': (f'text {i}', 'a text'), 'q': 'what?', 'answers': ('yes', f'{i}')} for i in ids.tolist()]

  columns = {'image': 'image', 'captions': 'texts', 'q': 'text', 'answers': 'texts'}
  records = file_dataset.FileDataset('own:x', 1000, rows, columns, {}, {}, '')
  c = tiny.config(data_dir='')
  c.target_sets.ab = config_lib.target_set(('a', 'b'), family='words')
  c.tasks.pair = config_lib.task('image_retrieval', 'own:x', batch_size=4, caption_templates=('{captions}',), max_len=8)
  c.tasks.asked = config_lib.task('vqa', 'own:x', batch_size=4, target_set='ab', label_column='answers', template='{q} <spe>', max_len=8)
  vqa, pair = make_plan(c).tasks  # by name
  builder = file_dataset_examples.FileExampleBuilder(None, {'ab': ('a', 'b')}, SIDE, 3, False, False, 0, 0.0)
  assert builder.build(pair, records).references(np.arange(1000)) == [(f'text {i}', 'a text') for i in range(1000)]
  assert builder.build(vqa, records).references(np.arange(999, 0, -3)) == [('yes', f'{i}') for i in range(999, 0, -3)]
  assert sum(asked) == 1000 + 333 and max(asked) <= 256


def test_tasks_take_the_records_that_have_what_their_templates_name(tmp_path):
  root = own_files.write_captioned_images(tmp_path / 'in', 10)
  lines = [json.loads(line) for line in (root / 'data.jsonl').read_text().splitlines()]
  for name, i in (('captions', 5), ('colour', 7)):
    del lines[i][name]
  (root / 'data.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  prepare.prepare(root, tmp_path, 'some')
  records = file_dataset.load('own:some', tmp_path, 'train')  # eight: 0…3 and 5…8
  c = tiny.config(data_dir='')
  c.tasks.x = config_lib.task('image_retrieval', 'own:some', batch_size=4, caption_templates=('{captions}',), max_len=8)
  [pair] = make_plan(c).tasks
  places = lambda *captions: file_dataset_examples.example_ids(records, dataclasses.replace(pair, caption_templates=captions)).tolist()
  assert places('a picture') == list(range(8))
  assert places('{captions}') == [0, 1, 2, 3, 5, 6, 7]
  assert places('{captions}', 'it is {colour}') == [0, 1, 2, 3, 5, 7]


def test_a_config_that_does_not_fit_the_source_is_told(run):
  plan, data = run
  tasks = {t.name: t for t in plan.tasks}
  for name, changes, message in (
      ('pair', dict(caption_templates=('{caption}',)), "names column 'caption'.*did you mean 'captions'"),
      ('colour', dict(label_column='color'), "label='color' is no column of classes.*did you mean 'colour'"),
      ('colour', dict(target_set='moves'), "class 'blue' of source 'own:colours' is not in the target set"),
      ('moves', dict(num_frames=0), 'frames=0: source .* has clips'),
      ('book', dict(label_column='texts'), "no column of texts 'texts'"),
      ('book', dict(train_fraction=0.5), 'subset=0.5: text of files is read as a stream')):
    with pytest.raises(ValueError, match=message):
      data.examples(dataclasses.replace(tasks[name], **changes), training=True)
