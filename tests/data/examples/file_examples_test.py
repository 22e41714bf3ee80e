"""Batches from files: equal for any layout, with corrupt examples replaced in place and counted."""

import dataclasses
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.data import own_files
from tests.helpers import tiny
from tests.helpers.file_examples import SIDE, build, make, plan_task
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data import hashing
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.batches.mixtures import BatchLayout, Mixture, evaluation_batches
from uni_moe_jax.data.examples import running_text
from uni_moe_jax.data.examples.corrupt_examples import CorruptExampleCounter
from uni_moe_jax.data.examples.examples import example_ids
from uni_moe_jax.data.formats.rows import LOCATION
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.text.token_rows import encode_texts
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
from uni_moe_jax.utils.errors import RunError


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """Captioned images, videos, labeled pairs of texts, and running text, prepared."""
  root, data, colors = tmp_path_factory.mktemp('in'), tmp_path_factory.mktemp('data'), own_files.COLORS
  prepare.prepare(own_files.write_captioned_images(root / 'images'), data, 'colors')
  prepare.prepare(own_files.write_videos(root / 'videos'), data, 'moves', test_fraction=0.0)
  own_files.write_jsonl(root / 'pairs/train.jsonl', [
      {'text_a': f'the bar is {c}', 'text_b': f'it has color {d}', 'label': 'yes' if c == d else 'no'}
      for c in colors for d in colors])
  prepare.prepare(root / 'pairs', data, 'pairs')
  (root / 'book.txt').write_text('\n'.join(f'the {c} bar has number {i}' for i in range(30) for c in colors))
  prepare.prepare(root / 'book.txt', data, 'book', test_fraction=0.0)
  return data


@pytest.fixture(scope='module')
def run(data_dir):
  """(plan, data) of tasks of every type over them."""
  c = tiny.config(data_dir=str(data_dir))
  c.model.update(dict(channels=3, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3))
  c.tokenizer.vocab_size = 60
  target_set, task = config_lib.target_set, config_lib.task
  c.target_sets.colors = target_set((('green', 'grass'), ('red', 'blood', 'fire'), ('blue', 'sky')), family='names')
  c.target_sets.moves = target_set('own:moves/label', family='names')
  c.target_sets.answers = target_set('own:pairs/label', family='words')
  c.target_sets.words = target_set('vocabulary', family='words')
  c.tasks.color = task(
      'image_classification', 'own:colors', batch_size=8, target_set='colors', label_column='color',
      crop='random_resized_crop', random_flip=True, randaugment=9.0, random_erasing=0.25, mixup_alpha=0.8,
      cutmix_alpha=1.0)
  c.tasks.pair = task('image_retrieval', 'own:colors', batch_size=4, caption_templates=('{captions}',), max_len=10)
  c.tasks.caption = task('image_caption', 'own:colors', batch_size=4, caption_templates=('{captions}', 'it is {color}'),
                         max_len=20, target_set='words')
  c.tasks.moves = task(
      'video_classification', 'own:moves', batch_size=4, target_set='moves', label_column='label', num_frames=3)
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
def batches(run, examples):
  """The first two batches, in one layout."""
  return [batch for _, batch in _mixture(run, examples).iterate(0, 2)]


@pytest.mark.nightly
def test_the_global_batch_is_equal_in_any_layout_and_after_a_restart(run, examples, batches):
  again = next(_mixture(run, examples).iterate(1, 2))[1]
  halves = [next(_mixture(run, examples, BatchLayout(1, 2, (i,))).iterate(1, 2))[1] for i in range(2)]
  for group, features in batches[1].items():
    for name, value in features.items():
      np.testing.assert_array_equal(value, again[group][name])
      if name != 'temporal_offset':
        np.testing.assert_array_equal(value.reshape(-1), np.concatenate([h[group][name] for h in halves]).reshape(-1))
  assert not np.array_equal(batches[0]['image_retrieval']['id'], batches[1]['image_retrieval']['id'])


def test_fields_have_the_shapes_of_their_task_type(batches):
  batch = batches[0]
  assert {g: f['pixels'].shape for g, f in batch.items() if 'pixels' in f} == {
      'image_classification': (1, 8, 1, SIDE, SIDE, 3), 'image_retrieval': (1, 4, 1, SIDE, SIDE, 3),
      'image_caption': (1, 4, 1, SIDE, SIDE, 3), 'video_classification': (1, 4, 3, SIDE, SIDE, 3)}
  mixed = batch['image_classification']
  assert mixed['label'].shape == mixed['weight'].shape == (1, 8, 2)
  np.testing.assert_allclose(mixed['weight'].sum(-1), 1, rtol=1e-6)
  assert batch['image_caption']['text'].shape == (1, 4, 40)
  assert batch['text_mlm']['label'].shape == (1, 4, 3)


def _run_task(run, name, **changes):
  return dataclasses.replace(next(t for t in run[0].tasks if t.name == name), **changes)


def _evaluation(run, name):
  """(examples, features of all of them) of a task in evaluation."""
  task = _run_task(run, name)
  examples = run[1].examples(task, 'test' if task.source == 'own:colors' else 'train')
  return examples, next(evaluation_batches(examples, np.arange(examples.size), examples.size))[0]


def test_an_image_is_evaluated_at_the_center_of_its_short_side(run, data_dir):
  _, features = _evaluation(run, 'pair')
  [record] = file_dataset.load('own:colors', data_dir, 'test').read(np.array([0]))
  image = Image.open(io.BytesIO(record['image'])).convert('RGB')  # 32 × 24
  # 24 pixels to 16: the mean of three halves.
  expected = image.crop((4, 0, 28, 24)).resize((48, 48), Image.Resampling.NEAREST).reduce(3)
  difference = np.abs(features['pixels'][0, 0].astype(int) - np.asarray(expected).astype(int))
  assert difference.max() <= 16 and difference.mean() < 2  # TensorFlow's JPEG decoder is a fast one


@pytest.mark.parametrize('change', [dict(max_affine=.3), dict(max_shift=3)])
@pytest.mark.parametrize('name', ['pair', 'moves'])
def test_images_and_videos_move_in_training_only(run, name, change):
  def make(training, **changes):
    examples = run[1].examples(_run_task(run, name, **changes), 'train', training=training)
    return next(evaluation_batches(examples, np.arange(6), 6))[0]

  still, moved = make(True), make(True, **change)
  is_still = (moved['pixels'] == still['pixels']).reshape(6, -1).all(1)
  assert 0 < is_still.sum() < 6 and moved['pixels'].shape == still['pixels'].shape
  np.testing.assert_equal(make(False, **change), make(False))


def test_labels_are_indices_of_the_sources_class_names(run):
  _, features = _evaluation(run, 'color')
  # Examples 4, 9, 14 … of red, green, blue in turn: green, red, blue; the set has green, red, blue.
  assert features['label'][:, 0].tolist() == [0, 1, 2, 0, 1, 2]


def test_texts_belong_to_their_records(run):
  tokenizer, (examples, features) = run[1].tokenizer, _evaluation(run, 'caption')
  assert tokenizer.decode(features['label'][0]) == 'a green square number 4'
  assert features['text'][0, 20:].tolist() == [tokenizer.spe] * 20
  assert examples.references(np.array([0])) == [('a green square number 4', 'number 4 is green')]
  _, answer = _evaluation(run, 'answer')
  assert answer['text'][0][answer['position'][0, 0]] == tokenizer.spe
  assert answer['label'][:, 0].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1]  # no, yes


def test_a_video_shows_one_frame_of_each_third(run):
  _, features = _evaluation(run, 'moves')
  # Twelve frames of 48 × 32, the bar of 4 at column 4 t: the middles of thirds are 2, 6 and 10, so columns 8, 24, 40.
  # The middle 32 columns are cropped: 0, 16 and 32 there, the last outside; 16 pixels of them are the model's.
  moving = features['pixels'][features['label'][:, 0] == 0][0].astype(int).mean(axis=(1, 3))  # [T, W]
  assert moving[0].argmax() in (0, 1) and moving[1].argmax() in (8, 9) and moving[2].max() < 60
  still = features['pixels'][features['label'][:, 0] == 1][0]
  assert np.abs(np.diff(still.astype(int), axis=0)).mean() < 8


def _dataset(corrupt: set[int], unreadable=()) -> file_dataset.FileDataset:
  """Forty images; image i has level i, some are not images, and some records raise an unexpected error."""
  def read(ids):
    if any(i in unreadable for i in ids.tolist()):
      raise RuntimeError('chunk data hash mismatch')
    encode = lambda i: own_files.encode_image(Image.new('RGB', (20, 20), (i, i, i)), 'PNG')
    return [{'image': b'bytes' if i in corrupt else encode(i), 'label': 'ab'[i % 2], LOCATION: f'file {i}'}
            for i in ids.tolist()]
  columns = {'image': 'image', 'label': 'class', LOCATION: 'text'}
  return file_dataset.FileDataset('own:x', 40, read, columns, {'label': ('a', 'b')}, {}, '')


def test_a_corrupt_example_is_replaced_in_place_and_the_others_stay():
  valid, replaced = make(build(_dataset(set())), range(8)), make(examples := build(_dataset({2, 5})), range(8))
  assert replaced['id'].tolist() == list(range(8))
  for i in range(8):
    assert (i not in (2, 5)) == all(np.array_equal(valid[k][i], replaced[k][i]) for k in ('pixels', 'label'))
  for i in (2, 5):  # the replacement is one example: the level of its image gives its class
    level = replaced['pixels'][i].reshape(-1)[0]
    assert level not in (2, 5) and replaced['label'][i, 0] == level % 2 and (replaced['pixels'][i] == level).all()
  assert (examples.corrupt_counter.num_corrupt, examples.corrupt_counter.num_read) == (2, 10)  # and two replacements
  np.testing.assert_array_equal(make(build(_dataset({2, 5})), range(8))['pixels'], replaced['pixels'])


@pytest.mark.nightly
@pytest.mark.parametrize('file_format, training, resize, fields', [
    ('PNG', True, 'fast', dict(random_erasing=0.5)), ('PNG', False, 'fast', {}),
    ('both', True, 'fast', {}), ('JPEG', True, 'pillow', {})])
def test_undamaged_batches_are_made_faster_and_are_the_same(file_format, training, resize, fields):
  def read(ids):
    file_formats = [('PNG', 'JPEG')[i % 2] if file_format == 'both' else file_format for i in ids]
    noise = lambda i: np.random.default_rng(i).integers(0, 256, (16 + i % 3, 20, 3), np.uint8)
    encode = lambda i, f: own_files.encode_image(Image.fromarray(noise(i)), f)
    return [{'image': b'bytes' if i == 11 else encode(i, f), 'label': 'ab'[i % 2], LOCATION: f'file {i}'}
            for i, f in zip(ids.tolist(), file_formats)]
  dataset = dataclasses.replace(_dataset(set()), read=read)
  examples = build(dataset, training=training, resize=resize, random_flip=True, **fields)
  ids = tf.range(11, dtype=tf.int64)  # not divisible by the number of images at once
  hashes = hashing.example_hash(0, 'x', tf.constant(0, tf.int64), ids)
  expected = {k: v.numpy() for k, v in examples.make(ids, hashes).items()}
  features, num_read = examples.make_undamaged(ids, hashes)
  np.testing.assert_equal({k: v.numpy() for k, v in features.items()}, expected)
  assert num_read == 11
  with pytest.raises(tf.errors.OpError):
    examples.make_undamaged(tf.range(12, dtype=tf.int64), tf.concat([hashes, hashes[:1]], 0))


def test_a_record_that_cannot_be_read_costs_itself_only():
  valid = make(build(_dataset(set())), range(8))
  replaced = make(examples := build(_dataset(set(), {2})), range(8))
  assert [np.array_equal(a, b) for a, b in zip(valid['pixels'], replaced['pixels'])] == [i != 2 for i in range(8)]
  assert examples.corrupt_counter.num_corrupt == 1 and not examples.corrupt_counter.failure
  make(examples, [2])  # a batch of nothing else
  assert examples.corrupt_counter.num_corrupt == 2 and not examples.corrupt_counter.failure
  examples = build(_dataset(set(), {3}), training=False)
  with pytest.raises(RunError, match=r'1 of 4 .* own:x, record 3: a record that cannot be read \(chunk data hash'):
    next(evaluation_batches(examples, np.arange(4), 4))


def test_an_unreachable_source_ends_the_run_with_one_sentence():
  unreadable = set()
  examples = build(_dataset(set(), unreadable))
  make(examples, range(4))
  unreadable |= set(range(40))
  make(examples, range(4))
  with pytest.raises(RunError, match=r"source 'own:x' cannot be read \(chunk data hash mismatch\)\. Check that"):
    examples.corrupt_counter.check()


def test_running_text_skips_records_that_cannot_be_read(run):
  tokenizer, task = run[1].tokenizer, _run_task(run, 'book', max_len=24)
  records = [{'text': f'the red bar has number {i}', LOCATION: f'line {i}'} for i in range(6)]

  def stream(*unreadable):
    def read(ids):
      if any(i in unreadable for i in ids.tolist()):
        raise RuntimeError('no')
      return [records[i] for i in ids]
    dataset = file_dataset.FileDataset('own:x', 6, read, {'text': 'text', LOCATION: 'text'}, {}, {}, '')
    counter = CorruptExampleCounter('tasks.x', 0.5)
    return running_text.running_text(task, dataset, np.arange(6), tokenizer, True, counter), counter

  ids, hashes = np.array([0, 3]), np.zeros(2, np.uint64)
  tokens = lambda *ids: [t for i in ids for t in [*tokenizer.encode(records[i]['text']), tokenizer.eot]][:24]
  assert len(tokens(0)) < 24
  assert stream()[0](ids, hashes).tolist() == [tokens(0, 1, 2), tokens(3, 4, 5)]
  damaged, counter = stream(1, 3)
  assert damaged(ids, hashes).tolist() == [tokens(0, 2, 4), tokens(4, 5, 0)]
  assert counter.num_corrupt == 2 + (len(tokens(0, 2)) < 24)  # a row that is not full yet reads record 3, too
  unreachable, counter = stream(*range(6))
  unreachable(ids, hashes)
  with pytest.raises(RunError, match="source 'own:x' cannot be read"):
    counter.check()


def test_too_many_corrupt_examples_are_an_error_that_names_the_first():
  examples = build(_dataset(set(range(0, 40, 2))), max_corrupt_fraction=0.3)
  with pytest.raises(RunError, match=r'config.tasks.x: \d+ of \d+ examples .*'
                                     r'max_corrupt_fraction=0.3; the first: file 0: corrupt image'):
    for start in range(0, 40, 8):
      make(examples, range(start, start + 8))
      examples.corrupt_counter.check()
      Mixture(None, {'x': examples}, 0, 'all_tasks', 4, BatchLayout()).num_corrupt_examples(list)
  examples = build(_dataset(set(range(40))), max_corrupt_fraction=1.0)
  make(examples, range(4))
  with pytest.raises(RunError, match='config.tasks.x: .* examples'):
    examples.corrupt_counter.check()  # there is no replacement


def test_evaluation_replaces_nothing_and_stops():
  examples = build(_dataset({3}), training=False)
  with pytest.raises(RunError, match='1 of 4 examples .*file 3: corrupt image'):
    next(evaluation_batches(examples, np.arange(4), 4))
  assert next(evaluation_batches(build(_dataset({3}), training=False), np.arange(3), 3))[1] == 3


def test_texts_of_a_whole_split_are_read_in_chunks():
  sizes = []

  def read(ids):
    sizes.append(len(ids))
    return [{'image': b'large', 'captions': (f'text {i}', 'a text'), 'q': 'what?', 'answers': ('yes', f'{i}')}
            for i in ids.tolist()]

  columns = {'image': 'image', 'captions': 'texts', 'q': 'text', 'answers': 'texts'}
  dataset = file_dataset.FileDataset('own:x', 1000, read, columns, {}, {}, '')
  pair = build(
      dataset, 'image_retrieval', False, label_column='', target_set='', caption_templates=('{captions}',), max_len=8)
  vqa = build(dataset, 'vqa', False, label_column='answers', template='{q} <spe>', max_len=8)
  ids = np.arange(1000)
  assert pair.references(ids) == [(f'text {i}', 'a text') for i in ids]
  ids = np.arange(999, 0, -3)
  assert vqa.references(ids) == [('yes', f'{i}') for i in ids]
  assert sum(sizes) == 1000 + 333 and max(sizes) <= 256


@pytest.mark.parametrize('template, expected', [
    ('{captions} in {place}', ('a cat in town', 'a pet in town')),
    ('{captions}, {tags|no_stop} in {place}', (
        'a cat, gray in town', 'a cat, old in town', 'a pet, gray in town', 'a pet, old in town'))])
def test_references_have_an_entry_of_each_list_of_texts(template, expected):
  record = {'image': b'', 'captions': ('a cat', 'a pet'), 'tags': ('gray', 'old.'), 'place': 'town'}
  columns = {'image': 'image', 'captions': 'texts', 'tags': 'texts', 'place': 'text'}
  dataset = file_dataset.FileDataset('own:x', 1, lambda ids: [record] * len(ids), columns, {}, {}, '')
  examples = build(
      dataset, 'image_retrieval', False, label_column='', target_set='', caption_templates=(template,), max_len=8)
  assert examples.references(np.arange(1)) == [expected]


def test_examples_are_the_records_with_the_columns_that_templates_name(tmp_path):
  root = own_files.write_captioned_images(tmp_path / 'in', 10)
  rows = own_files.read_jsonl(root / 'data.jsonl')
  for name, i in (('captions', 5), ('color', 7)):
    del rows[i][name]
  own_files.write_jsonl(root / 'data.jsonl', rows)
  prepare.prepare(root, tmp_path, 'some')
  dataset = file_dataset.load('own:some', tmp_path, 'train')  # eight: 0…3 and 5…8
  ids = lambda *templates: example_ids(
      dataset, plan_task('image_retrieval', caption_templates=templates, max_len=8)).tolist()
  assert ids('an image') == list(range(8))
  assert ids('{captions}') == [0, 1, 2, 3, 5, 6, 7]
  assert ids('{captions}', 'it is {color}') == [0, 1, 2, 3, 5, 7]


@pytest.mark.parametrize('name', ['shot.at: x-y', 'a b', '0'])
def test_every_field_of_a_file_can_be_used_in_templates(name, tmp_path):
  root = own_files.write_captioned_images(tmp_path / 'in', 6)
  rows = own_files.read_jsonl(root / 'data.jsonl')
  own_files.write_jsonl(root / 'data.jsonl', [{**row, name: f'number {i}.'} for i, row in enumerate(rows)])
  prepare.prepare(root, tmp_path, 'some')
  tokenizer = SentencePieceTokenizer(tiny.tokenizer_file())
  examples = build(
      file_dataset.load('own:some', tmp_path, 'train'), 'image_retrieval', label_column='', target_set='', max_len=12,
      tokenizer=tokenizer, caption_templates=(f'{{{name}|no_stop}} of {{color}} {{{{so}}}}',))
  texts = ['number 1 of green {so}', 'number 3 of red {so}']  # rows 0…3 and 5 are in the split
  assert examples.references(np.array([1, 3])) == [(text,) for text in texts]
  made = make(examples, [1, 3])
  assert [row[valid].tolist() for row, valid in zip(made['target'], made['target_valid'])] == encode_texts(
      texts, tokenizer, 12)


@pytest.mark.parametrize('name, changes, message', [
    ('pair', dict(caption_templates=('{caption}',)), "caption_templates names column 'caption'.*mean 'captions'"),
    ('color', dict(label_column='colour'), "label_column='colour' is not a column of classes.*did you mean 'color'"),
    ('color', dict(target_set='moves'), "class 'blue' of source 'own:colors' is not in the target set"),
    ('moves', dict(num_frames=0), 'num_frames=0: source .* has videos'),
    ('moves', dict(randaugment=9.0), 'randaugment=9.0: source .* has videos, and it is for images; set it to 0'),
    ('color', dict(num_frames=1), 'num_frames=1: source .* has images, and it is for videos; set it to 0'),
    ('moves', dict(random_erasing=0.2), 'random_erasing=0.2: source .* has videos'),
    ('book', dict(label_column='texts'), "no text column 'texts'"),
    ('book', dict(shots=2, label_column='text'), 'shots=2: the labels of source .* are known only when its records'),
    ('color', dict(source='own:pairs', target_set='answers', label_column='label'), 'neither images nor videos')])
def test_a_config_that_does_not_fit_its_source_is_an_error(run, name, changes, message):
  with pytest.raises(ValueError, match=message):
    run[1].examples(_run_task(run, name, **changes), training=True)
