"""Baselines of records in files: the same numbers as in memory, from bounded samples, computed once."""

import dataclasses
import re

import numpy as np
from PIL import Image

from tests.data import own_files
from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.examples import thumbnails
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.eval import baselines
from uni_moe_jax.eval.dataset_baselines import DatasetBaselines

_COLORS = tuple(own_files.COLORS)
_SIDE = (thumbnails.SIDE,) * 2


def _records(rows, columns, classes=None, labels=None, fingerprint='', reads=None):
  """Rows as a dataset in files. reads: a list that gets the ids of what is read."""
  def read(ids):
    if reads is not None:
      reads.extend(ids)
    return [rows[i] for i in ids]
  return FileDataset('own:x', len(rows), read, columns, classes or {}, labels or {}, fingerprint)


def _colors(start, count=30, known=True, reads=None):
  """Images of three colors in turn, with captions."""
  rows = [{'image': own_files.encode_image(own_files.color_image(_COLORS[i % 3], i, _SIDE), 'PNG'),
           'color': _COLORS[i % 3], 'captions': (f'a {_COLORS[i % 3]} square', f'number {i}')}
          for i in range(start, start + count)]
  labels = {'color': np.array([i % 3 for i in range(start, start + count)], np.int32)} if known else {}
  columns = {'image': 'image', 'color': 'class', 'captions': 'texts'}
  return _records(rows, columns, {'color': _COLORS}, labels, f'{start}', reads)


def _baselines(task, keys, trained, evaluated, data_dir, evaluator='classification'):
  c = tiny.config(data_dir='')
  if keys:
    c.target_sets.s = config_lib.target_set(keys, family='words' if task.template else 'names')
  c.tasks.t = task
  c.evaluators.e = config_lib.evaluator(evaluator, 't', split='test')
  [e] = make_plan(c).evaluations
  return DatasetBaselines(e, trained, evaluated, keys, str(data_dir))


def _classified(trained, evaluated, data_dir, task_type='image_classification', keys=_COLORS, column='color', **values):
  task = config_lib.task(task_type, 'own:x', batch_size=1, target_set='s', label_column=column, **values)
  return _baselines(task, keys, trained, evaluated, data_dir)


def _pixels(records):
  return np.stack([image for _, image in thumbnails.read(records, np.arange(records.size), 0)])


def test_images_in_files_are_predicted_as_the_same_images_in_memory(tmp_path):
  trained, evaluated = _colors(0), _colors(100, 12)
  images = np.stack([own_files.color_image(_COLORS[i % 3], i, _SIDE) for i in range(30)])
  np.testing.assert_array_equal(_pixels(trained)[:, 0], images)  # of this size nothing is resampled
  train_labels, rows, predicted = _classified(trained, evaluated, tmp_path).classes(np.arange(12))
  labels = np.arange(30) % 3
  np.testing.assert_array_equal(train_labels, labels)
  np.testing.assert_array_equal(rows, np.arange(12))
  test = _pixels(evaluated)
  expected = {
      'nearest neighbor': labels[baselines.nearest_neighbor(images, test[:, 0])],
      'logistic regression': baselines.frame_logistic(images[:, None], labels, test, 'all')}
  assert predicted.keys() == expected.keys()
  for name, answers in predicted.items():
    np.testing.assert_array_equal(answers, expected[name])
    np.testing.assert_array_equal(answers, np.arange(100, 112) % 3)


def test_results_are_computed_once_for_the_same_records_and_examples(tmp_path, capsys):
  reads = []
  made = _classified(_colors(0, reads=reads), _colors(100, 12, reads=reads), tmp_path)
  first = made.classes(np.arange(12))
  assert re.search(r'e: baselines computed in \d+ s', capsys.readouterr().out)
  assert len(list((tmp_path / 'baselines').iterdir())) == 1 and reads
  reads.clear()
  assert repr(made.classes(np.arange(12))) == repr(first) and not capsys.readouterr().out and not reads
  for other, ids in ((made, np.arange(11)), (_classified(_colors(1, reads=reads), _colors(100, 12), tmp_path),
                                             np.arange(12))):
    other.classes(ids)
    assert reads
    reads.clear()


def test_a_damaged_result_is_computed_again_and_a_folder_without_rights_is_no_error(tmp_path, capsys):
  made = _classified(_colors(0), _colors(100, 12), tmp_path)
  first = made.classes(np.arange(12))
  [file] = (tmp_path / 'baselines').iterdir()
  file.write_text('{"trained": [')
  assert repr(made.classes(np.arange(12))) == repr(first)
  (tmp_path / 'file').write_text('')
  capsys.readouterr()
  assert repr(_classified(_colors(0), _colors(100, 12), tmp_path / 'file').classes(np.arange(12))) == repr(first)
  assert 'e: baselines cannot be saved' in capsys.readouterr().out


def test_samples_are_bounded_by_counts(tmp_path):
  train_reads, reads = [], []
  trained, evaluated = _colors(0, reads=train_reads), _colors(100, 12, reads=reads)
  made = dataclasses.replace(_classified(trained, evaluated, tmp_path), num_examples={'image': (9, 5)})
  train_labels, rows, predicted = made.classes(np.arange(12))
  assert (len(train_reads), len(reads)) == (9, 5) and len(train_labels) == 30  # known without reading
  np.testing.assert_array_equal(rows, baselines.subset(12, 5))
  np.testing.assert_array_equal(predicted['nearest neighbor'], (100 + rows) % 3)


def test_labels_that_only_records_have_are_those_of_the_sample(tmp_path):
  trained = _colors(0, 10, known=False)
  [row, *_] = trained.read([4])
  row['color'] = ''  # no label
  train_labels, _, predicted = _classified(trained, _colors(100, 12), tmp_path).classes(np.arange(12))
  assert train_labels.tolist() == [0, 1, 2, 0, 2, 0, 1, 2, 0]
  np.testing.assert_array_equal(predicted['nearest neighbor'], np.arange(100, 112) % 3)


def test_damaged_training_images_are_left_out_and_evaluated_ones_are_black(tmp_path):
  trained, evaluated = _colors(0), _colors(100, 3)
  for records, i in ((trained, 1), (evaluated, 2)):
    [row] = records.read([i])
    row['image'] = row['image'][:40]
  made = _classified(trained, evaluated, tmp_path)
  inputs, names = made._sample(100, lambda record: record['color'])
  assert len(inputs) == len(names) == 29
  assert [image.any() for image in made._inputs(np.arange(3))] == [True, True, False]


def test_a_training_split_that_no_baseline_can_use_is_no_error(tmp_path, capsys):
  trained = _colors(0, 3)
  for row in trained.read([0, 1, 2]):
    row['image'] = b''
  assert not _classified(trained, _colors(100, 3), tmp_path).classes(np.arange(3))[2]
  assert "e: no baselines: no training example of source 'own:x' can be used" in capsys.readouterr().out


def test_the_first_text_of_the_nearest_image_is_copied(tmp_path, capsys):
  task = config_lib.task('image_retrieval', 'own:x', batch_size=1, caption_templates=('{captions}!',), max_len=8)
  made = _baselines(task, (), _colors(0), _colors(100, 6), tmp_path, 'retrieval')
  expected = [f'a {_COLORS[i % 3]} square!' for i in range(100, 106)]
  assert made.neighbor_texts(np.arange(6)) == expected
  capsys.readouterr()
  made = dataclasses.replace(made, num_examples={'image': (10_000, 5)})
  assert made.neighbor_texts(np.arange(6)) is None  # candidates are all texts: no part of them is comparable
  assert "set config.evaluators['e'].num_examples=5" in capsys.readouterr().out


def test_videos_are_predicted_from_one_frame_and_from_all(tmp_path):
  # The bar moves from the left; in the middle of the video both kinds differ, too.
  rows = [{'video': own_files.npy_bytes(own_files.moving_bar(i % 2 == 0)), 'label': ('moves', 'stands')[i % 2]}
          for i in range(8)]
  keys = ('moves', 'stands')
  records = _records(rows, {'video': 'video', 'label': 'class'}, {'label': keys})
  [(_, video)] = thumbnails.read(records, np.array([0]), 3)
  assert video.shape == (3, 32, 32, 3)
  # Frames 2, 6 and 10 of 12: bars at columns 8, 24 and 40, of which columns 8 to 39 are the center.
  expected = np.zeros((3, 32), np.uint8)
  expected[0, :4] = expected[1, 16:20] = 255
  np.testing.assert_array_equal(video[:, 5, :, 0], expected)
  made = _classified(records, records, tmp_path, 'video_classification', keys, 'label', num_frames=3)
  _, _, predicted = made.classes(np.arange(8))
  assert predicted.keys() == {'one frame', 'all frames'}
  assert all((answers == np.arange(8) % 2).all() for answers in predicted.values())


def test_texts_are_predicted_by_the_words_of_the_template(tmp_path):
  rows = [{'a': f'{color} bar', 'b': f'{other} bar', 'label': 'same' if color == other else 'other'}
          for color in _COLORS for other in (color, *_COLORS)]
  keys = ('same', 'other')
  records = _records(rows, {'a': 'text', 'b': 'text', 'label': 'class'}, {'label': keys})
  names = np.array([row['label'] for row in rows])
  for template, columns in (('{a} <spe> , {b} <eot>', 'ab'), ('{b} <spe> <eot>', 'b')):
    made = _classified(records, records, tmp_path, 'text_classification', keys, 'label', template=template, max_len=8)
    texts = [[row[column] for row in rows] for column in columns]
    expected = [keys.index(name) for name in baselines.tfidf_logistic(texts, names, texts)]
    np.testing.assert_array_equal(made.classes(np.arange(12))[2]['tf-idf'], expected)


def test_questions_are_answered_from_their_words(tmp_path):
  answers = {'what color': ('Red.',) * 6 + ('blue',) * 4, 'how many': ('two',) * 10}
  rows = [{'image': b'', 'question': question, 'answers': answers[question]} for question in answers] * 5
  records = _records(rows, {'image': 'image', 'question': 'text', 'answers': 'texts'})
  task = config_lib.task('vqa', 'own:x', batch_size=1, target_set='s', label_column='answers', max_predictions=10,
                         template='{question} <spe> <eot>', max_len=8)
  made = _baselines(task, ('red', 'two'), records, records, tmp_path, 'vqa')
  trained, rows, predicted = made.answers(np.arange(2))
  assert rows.tolist() == [0, 1] and predicted == {'tf-idf': ['red', '2']}  # normalized as the evaluation does
  assert trained == ['red', '2'] * 5


def test_answers_that_are_evaluated_as_classes_are_those_entries_that_normalize_to_them(tmp_path):
  answers = {'what color': ('Red.',) * 10, 'how many': ('two',) * 10, 'who': ('nobody',) * 10}
  rows = [{'image': b'', 'question': question, 'answers': answers[question]} for question in answers] * 5
  records = _records(rows, {'image': 'image', 'question': 'text', 'answers': 'texts'})
  made = _classified(records, records, tmp_path, 'vqa', ('Two', 'Red'), 'answers', max_predictions=10, max_len=8,
                     template='{question} <spe> <eot>')
  train_labels, _, predicted = made.classes(np.arange(3))
  assert train_labels.tolist() == [1, 0] * 5  # the target set lacks the third answer
  assert predicted['tf-idf'].tolist() == [1, 0, 2]  # no label: those of examples whose answer it lacks are -1


def test_of_more_than_a_hundred_answers_rare_ones_are_left_out_but_no_class_is(tmp_path):
  rows = [{'question': f'what number {i}', 'answers': (f'number {i}',)} for i in range(100)] * 2
  rows.append({'question': 'who', 'answers': ('no one',)})
  records = _records(rows, {'question': 'text', 'answers': 'texts'})
  values = dict(batch_size=1, target_set='s', label_column='answers', template='{question} <spe> <eot>', max_len=8)
  task = config_lib.task('vqa', 'own:x', max_predictions=10, **values)
  made = _baselines(task, ('number 1', 'no one'), records, records, tmp_path, 'vqa')
  trained, _, predicted = made.answers(np.arange(201))
  assert len(set(trained)) == 100 and 'no one' not in {*trained, *predicted['tf-idf']}
  keys = tuple(map(str, range(101)))
  texts = _records([{'question': 'a', 'label': key} for key in keys], {'question': 'text', 'label': 'class'},
                   {'label': keys})
  made = _classified(texts, texts, tmp_path, 'text_classification', keys, 'label', max_len=8,
                     template='{question} <spe> <eot>')
  assert not made.classes(np.arange(2))[2]


def test_thumbnails_keep_colors_and_the_center_of_large_images_and_of_16_bits():
  wide = np.zeros((200, 600, 3), np.uint8)
  wide[:, 200:400] = 255  # the center
  deep = Image.fromarray(np.full((40, 40), 200 * 256, np.uint16))
  images = [own_files.encode_image(Image.fromarray(wide)), own_files.encode_image(deep, 'PNG')]
  records = _records([{'image': image} for image in images], {'image': 'image'})
  white, gray = (image for _, image in thumbnails.read(records, np.arange(2), 0))
  assert white.shape == gray.shape == (1, 32, 32, 3)
  assert white[:, :, 1:-1].min() > 245 and (gray == 200).all()
