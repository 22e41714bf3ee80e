"""Preparation of a user's own data: which rows are accepted, rewritten or skipped, and why."""

import dataclasses
import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data import own_files
from tests.helpers import processes
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.prepare.summary import describe
from uni_moe_jax.data.shards import file_dataset


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """(data directory, source folder, summary, {odd image: reason to skip it, or ''})."""
  root = own_files.write_captioned_images(tmp_path_factory.mktemp('images') / 'in')
  odd = own_files.append_odd_rows(root)
  data = tmp_path_factory.mktemp('data')
  return data, root, prepare.prepare(root, data, 'colors', max_corrupt_fraction=0.4), odd


def _read_all(data, split='train', source='own:colors'):
  dataset = file_dataset.load(source, data, split)
  return dataset, dataset.read(np.arange(dataset.size))


def _counts(summary):
  return {reason: rows['count'] for reason, rows in summary['skipped'].items()}


def _prepare(folder, rows, name, **options):
  """The summary of rows in the split train."""
  own_files.write_jsonl(folder / 'in/train.jsonl', rows)
  return prepare.prepare(folder / 'in', folder, name, **options)


def test_splits_are_those_that_the_data_names_and_statistics_report_sizes_and_captions(images):
  # 30 rows, every fifth in the test split. Training has in addition 13 valid odd images, one repeated, one without
  # captions, and six with fields that cannot be columns.
  assert images[2]['splits'] == {'train': 24 + 13 + 2 + 6, 'test': 6}
  assert images[2]['sizes']['median'] == [32, 24]
  assert images[2]['captions_per_example'] == {'min': [1], 'median': [2], '97 %': [2], 'max': [2]}


def test_splits_without_labels_or_captions_differ_from_those_that_have_some(tmp_path):
  """As in a competition: the rows of the split test are without what is to be predicted."""
  for i in range(9):
    own_files.write_image(tmp_path / f'in/{i}.png', 'red', i)
  rows = [{'image': f'{i}.png', 'captions': ['a', 'b'], 'label': 'xy'[i % 2]} for i in range(6)]
  del rows[0]['captions']
  own_files.write_jsonl(tmp_path / 'in/test.jsonl', [{'image': f'{i}.png'} for i in range(6, 9)])
  summary = _prepare(tmp_path, rows, 'contest')
  assert summary['splits'] == {'train': 6, 'test': 3}
  assert summary['classes']['label']['counts'] == {'train': [3, 3], 'test': [0, 0]}
  assert summary['captioned'] == {'train': 5, 'test': 0}


@pytest.mark.parametrize('field', ['caption', 'label'])
def test_several_rows_with_captions_of_one_image_give_a_warning(tmp_path, field):
  """As in tables with a caption per row; questions or classes of one image are several examples."""
  for i in range(6):
    own_files.write_image(tmp_path / f'in/{i % 5}.png', 'red', i % 5)
  (tmp_path / 'in/copy.png').write_bytes((tmp_path / 'in/0.png').read_bytes())
  rows = [{'image': f'{i % 5}.png', field: f'{i}'} for i in range(12)] + [{'image': 'copy.png', field: 'one more'}]
  summary = _prepare(tmp_path, rows, 'shared', test_fraction=0)
  assert summary['splits'] == {'train': 13}
  # 0, 5, 10 and the copy; 1, 6, 11; 2, 7; 3, 8; 4, 9
  expected = [warning for warning in summary['warnings'] if warning.startswith('8 rows with captions repeat the image')]
  assert expected == summary['warnings'] and len(expected) == (field == 'caption')
  rows = [{'image': f'{i}.png', 'captions': ['one', 'two']} for i in range(5)]
  assert not _prepare(tmp_path, rows, 'listed', test_fraction=0)['warnings']


def test_bytes_of_texts_are_those_of_the_longest_caption_or_of_the_text_columns_together(tmp_path):
  (tmp_path / 'in').mkdir()
  pairs = _prepare(tmp_path, [{'text_a': 'x' * i, 'text_b': 'yy', 'label': i} for i in range(1, 101)], 'pairs')
  assert pairs['text_bytes'] == {'min': [3], 'median': [53], '97 %': [100], 'max': [102]}
  (tmp_path / 'in/train.jsonl').unlink()
  for i in range(3):
    own_files.write_image(tmp_path / f'in/{i}.png', 'red', i)
  rows = [{'image': f'{i}.png', 'captions': ['a', text]} for i, text in enumerate(('four', 'fünff', 'seventh'))]
  images = _prepare(tmp_path, rows, 'images')
  assert images['text_bytes'] == {'min': [4], 'median': [6], '97 %': [7], 'max': [7]}
  assert 'bytes of texts: min 4, median 6, 97 % 7, max 7' in describe(images)


def test_every_skipped_row_has_a_reason_and_first_locations(images):
  summary = images[2]
  assert _counts(summary) == {
      'missing file': 1, 'corrupt image': 1, 'smaller than 8 pixels': 1, 'not an image': 2, 'empty caption': 1,
      "wrong type of 'captions'": 1, 'duplicate': 1, 'not an object': 1, 'no image, video or text': 1,
      'not UTF-8': 2, 'unreadable file': 3, "wrong type of 'text_a'": 1, "wrong type of 'label'": 1,
      'no image': 1, 'has a video, unlike most rows': 1, "'color' is a list, unlike in most rows": 1,
      "split 'nowhere' is not train, validation or test": 1, 'not JSON': 2}
  # Line 31 is the first odd row.
  assert summary['skipped']['missing file']['first'] == ['data.jsonl:31']
  assert 'skipped, missing file: 1 (data.jsonl:31)' in describe(summary)


def test_an_extra_field_that_cannot_be_a_column_is_dropped_and_reported(images):
  data, _, summary, _ = images
  assert summary['dropped_fields'] == {
      "'color'": 1, "'sentids'": 2, "'source_location'": 1, "'what / where'": 1, "'text_length'": 1}
  assert "dropped field 'sentids', whose type or name cannot be used: 2" in describe(summary)
  assert set(summary['columns']) == {'image', 'captions', 'color'}
  extra = [r for r in _read_all(data)[1] if r['captions'] and r['captions'][0].startswith('extra')]
  assert [r['captions'] for r in extra] == [(f'extra {i}',) for i in range(7) if i != 1]
  assert not any(r['color'] for r in extra) and all(r['source_location'].startswith('data.jsonl:') for r in extra)


def test_a_row_whose_field_has_another_type_than_in_most_rows_is_skipped(tmp_path):
  # Tags are a list in most rows. Two rows of the second file have a single value, which makes no class.
  for file, tags in (('train_0', [['a'], ['b'], ['c']]), ('train_1', [['d', 'e'], 'single', 'single'])):
    own_files.write_jsonl(tmp_path / f'in/{file}.jsonl', [
        {'text': f'{file} {i}', 'tags': x, 'split': 'train'} for i, x in enumerate(tags)])
  summary = prepare.prepare(tmp_path / 'in', tmp_path, 'texts', max_corrupt_fraction=0.5)
  assert _counts(summary) == {"'tags' is a single value, unlike in most rows": 2}
  assert summary['columns'] == {'tags': 'texts', 'text': 'text'} and summary['splits'] == {'train': 4}


def test_valid_odd_images_are_present_with_their_captions(images):
  data, _, _, odd = images
  captions = [r['captions'] for r in _read_all(data)[1]]
  for name, reason in odd.items():
    assert ((f'рыжий кот {name}',) in captions) == (not reason), name


def test_only_files_that_would_be_decoded_wrongly_are_rewritten(images):
  data, root, summary, odd = images
  stored = {r['captions'][0].removeprefix('рыжий кот '): r['image'] for r in _read_all(data)[1] if r['captions']}
  same = {name for name, reason in odd.items() if not reason and (root / 'images' / name).read_bytes() == stored[name]}
  assert same == {'UPPER.JPG', 'palette.png', 'gray.png', 'web.webp', 'camera.jpg', 'bits.png', 'deep.png'}
  assert summary['rewritten'] == {'transparent: on white': 1, 'animated: first frame': 1, 'rotated as EXIF says': 1,
                                  'color mode CMYK': 1, 'format BMP': 2}
  pixels = {name: np.asarray(Image.open(io.BytesIO(data))) for name, data in stored.items() if name in odd}
  assert (pixels['alpha.png'] == 255).all()
  assert pixels['rotated.jpg'].shape == (own_files.SIDE + 8, own_files.SIDE, 3)
  assert pixels['moving.gif'].mean(axis=(0, 1)).argmax() == 0  # red, not blue
  for name, mode in (('index', 'P'), ('bits', '1')):  # a BMP shows its colors
    expected = own_files.color_image('red', 99).convert(mode).convert('RGB')
    np.testing.assert_array_equal(pixels[f'{name}.bmp'], expected)


def test_tensorflow_decodes_every_stored_image_as_pillow_does(images):
  import tensorflow as tf
  for record in _read_all(images[0])[1]:
    decoded = tf.io.decode_image(record['image'], channels=3, expand_animations=False).numpy().astype(int)
    image = Image.open(io.BytesIO(record['image']))
    if image.mode[0] == 'I':
      image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    exact = record['image'].startswith(b'\x89PNG')  # decoders of other formats round differently
    assert np.abs(decoded - np.asarray(image.convert('RGB'))).max() <= (0 if exact else 6), record['source_location']


def test_a_field_with_repeated_values_is_a_class_and_may_be_missing(images):
  dataset, records = _read_all(images[0])
  assert dataset.classes == {'color': ('blue', 'green', 'red')}
  assert [r['color'] for r in records[:4]] == ['red', 'green', 'blue', 'red']
  expected = [('blue', 'green', 'red').index(r['color']) if r['color'] else -1 for r in records]
  np.testing.assert_array_equal(dataset.labels['color'], expected)
  assert images[2]['classes']['color']['counts']['test'] == [2, 2, 2]


def test_texts_are_known_without_reading(images):
  dataset, records = _read_all(images[0])
  assert dataset.num_texts['captions'].tolist() == [len(r['captions']) for r in records]
  assert sorted(set(dataset.num_texts['captions'].tolist())) == [0, 1, 2]
  expected = [text for r in records for text in r['captions']]
  assert dataset.text_file('captions').read_text().split('\n') == [*expected, '']
  for number in (7, 10_000):
    assert dataset.sample_texts(['captions', 'color'], number) == dataclasses.replace(
        dataset, text_file=None).sample_texts(['captions', 'color'], number)
  assert set(dataset.sample_texts(['captions'], 10_000)) == set(expected)


def test_the_most_frequent_media_type_and_text_fields_are_kept(tmp_path):
  own_files.write_videos(tmp_path / 'in', count=2)
  rows = [{'text_a': f'one {i}', 'text_b': f'two {i}'} for i in range(5)]
  rows += [{'text_a': 'one'}, {'text_a': 'six', 'text_b': 'six', 'text_c': 'more'}]
  own_files.write_jsonl(tmp_path / 'texts.jsonl', rows)
  arguments = dict(test_fraction=0.0, max_corrupt_fraction=0.5)
  summary = prepare.prepare(tmp_path / 'texts.jsonl', tmp_path, 'texts', **arguments)
  assert summary['skipped'] == {"no 'text_b'": {'count': 1, 'first': ['texts.jsonl:6']}}
  assert summary['splits'] == {'train': 6}
  assert _read_all(tmp_path, source='own:texts')[0].num_texts['text_c'].tolist() == [0] * 5 + [1]
  for i in range(3):
    own_files.write_image(tmp_path / f'in/moves/{i}.png', 'red', i)
  summary = prepare.prepare(tmp_path / 'in', tmp_path, 'mixed', **arguments)
  assert summary['columns'] == {'image': 'image', 'label': 'class'} and summary['splits'] == {'train': 3}
  assert _counts(summary) == {'has a video, unlike most rows': 2}


def test_a_version_is_written_once_and_the_newest_is_read(images, tmp_path):
  data, root, summary, _ = images
  with pytest.raises(ValueError, match='already exists'):
    prepare.prepare(root, data, 'colors', max_corrupt_fraction=0.4)
  again = prepare.prepare(root, tmp_path, 'colors', max_corrupt_fraction=0.4)
  assert again['fingerprints'] == summary['fingerprints']
  (root / 'data.jsonl').write_text(''.join((root / 'data.jsonl').read_text(errors='replace').splitlines(True)[:20]))
  prepare.prepare(root, tmp_path, 'colors', '1.10.0')
  for copy in ('1.11.0.bak', 'old'):  # of the user: no versions
    shutil.copytree(tmp_path / 'own/colors/1.0.0', tmp_path / 'own/colors' / copy)
  assert file_dataset.load('own:colors', tmp_path, 'train').size == 16
  assert file_dataset.load('own:colors/1.0.0', tmp_path, 'train').size == 45


def test_other_names_of_classes_or_columns_are_other_data(tmp_path):
  # The records are the same: examples have indices of classes.
  rows = lambda first, text: [{text: f'a text {i}', 'animal': (first, 'x')[i % 2]} for i in range(4)]
  prints = [_prepare(tmp_path / str(i), rows(*names), 'names')['fingerprints']['train']
            for i, names in enumerate([('ct', 'text'), ('cat', 'text'), ('ct', 'text_a'), ('ct', 'text')])]
  assert prints[0] == prints[3] and len(set(prints)) == 3


def test_too_many_skipped_rows_are_an_error_that_names_the_first(tmp_path):
  with pytest.raises(ValueError, match=r"2 of 2 rows .* most often: 'missing file' \(2, first train.jsonl:1\)"):
    _prepare(tmp_path, [{'image': f'{x}.jpg', 'captions': [x]} for x in 'ab'], 'none')
  assert not list(tmp_path.glob('own/none/*'))


def test_a_folder_by_class_may_have_splits(tmp_path):
  for split, color, i in (('train', 'red', 0), ('train', 'blue', 1), ('Val', 'red', 2), ('other', 'red', 3)):
    own_files.write_image(tmp_path / 'in' / split / color / f'{i}.JPEG', color, i)
  (tmp_path / 'in/train/red/notes.txt.bak').write_text('x')
  summary = prepare.prepare(tmp_path / 'in', tmp_path, 'folder', max_corrupt_fraction=0.5)
  assert summary['splits'] == {'train': 2, 'validation': 1}
  assert summary['classes']['label']['names'] == ['blue', 'red']
  assert set(summary['skipped']) == {'not an image or video', 'split folder is not train, validation or test'}


def test_integer_labels_are_sorted_as_numbers(tmp_path):
  rows = [{'text_a': f'one {i}', 'text_b': 'two', 'label': i % 11} for i in range(33)]
  own_files.write_jsonl(tmp_path / 'in/dev.jsonl', [{**rows[0], 'text_a': 'zero'}])
  summary = _prepare(tmp_path, rows, 'pairs')
  assert summary['classes']['label']['names'] == [str(i) for i in range(11)]
  assert summary['splits'] == {'train': 33, 'validation': 1}
  assert _read_all(tmp_path, 'validation', 'own:pairs')[1][0]['text_a'] == 'zero'


def test_labels_have_single_spaces_and_an_empty_label_is_none(tmp_path):
  labels = (' pad ', 'two\n  words', '', ' ', '\xa0', 'pad')
  _prepare(tmp_path, [{'text': f'number {i}', 'label': label} for i, label in enumerate(labels)], 'odd')
  dataset, records = _read_all(tmp_path, source='own:odd')
  assert [r['label'] for r in records] == ['pad', 'two words', '', '', '', 'pad']
  assert dataset.classes == {'label': ('pad', 'two words')}
  assert dataset.labels['label'].tolist() == [0, 1, -1, -1, -1, 0]


def test_text_beside_folders_of_classes_is_skipped(tmp_path):
  for i, folder in enumerate(('red', 'blue ', ' ')):
    own_files.write_image(tmp_path / 'in' / folder / f'{i}.png', 'red', i)
  (tmp_path / 'in/README.txt').write_text('About\nthese\nimages')
  summary = prepare.prepare(tmp_path / 'in', tmp_path, 'folder', max_corrupt_fraction=0.5)
  assert summary['columns'] == {'image': 'image', 'label': 'class'}
  assert summary['classes']['label']['names'] == ['blue', 'red']
  assert summary['skipped'] == {'text beside folders of classes': {'count': 1, 'first': ['README.txt']},
                                'empty label': {'count': 1, 'first': [' /2.png']}}


def test_a_line_may_name_files_below_its_folder_only(tmp_path):
  own_files.write_image(tmp_path / 'secret/x.png', 'red', 1)
  for i in range(3):
    own_files.write_image(tmp_path / f'in/images/{i}.png', 'blue', i)
  for name, target in (('link', '../../secret/x.png'), ('near', '0.png')):
    (tmp_path / f'in/images/{name}.png').symlink_to(target)
  paths = ['images/0.png', 'images/../images/1.png', str(tmp_path / 'in/images/2.png'), 'images/near.png',
           '../secret/x.png', str(tmp_path / 'secret/x.png'), 'images/link.png', 'no such folder/../../secret/x.png']
  rows = [{'image': path, 'caption': path} for path in paths]
  options = dict(test_fraction=0, max_corrupt_fraction=0.5)
  summary = _prepare(tmp_path, rows, 'inside', **options)
  reason = 'a file outside of the input folder (--allow_outside packs it)'
  assert summary['skipped'] == {reason: {'count': 4, 'first': [f'train.jsonl:{line}' for line in (5, 6, 7, 8)]}}
  assert [r['captions'] for r in _read_all(tmp_path, source='own:inside')[1]] == [(path,) for path in paths[:4]]
  summary = _prepare(tmp_path, rows, 'anywhere', allow_outside=True, **options)
  assert summary['splits'] == {'train': 7} and _counts(summary) == {'missing file': 1}
  # Also where the folder itself is a link.
  (tmp_path / 'linked').symlink_to(tmp_path / 'in')
  assert prepare.prepare(tmp_path / 'linked', tmp_path, 'linked', **options)['splits'] == {'train': 4}


@pytest.mark.parametrize('name, damage, message', [
    ('prepared.json', lambda data: data[:100], 'prepared.json is damaged'),
    ('prepared.json', lambda data: data.replace(b'"format": 5', b'"format": 4'), 'prepared.json has format 4, not 5'),
    ('train-text.npy', lambda data: data[:-1], 'train-text.npy cannot be read'),
    ('train-text.npy', lambda data: b'', 'train-text.npy cannot be read')])
def test_the_error_for_damaged_prepared_data_gives_the_command(tmp_path, name, damage, message):
  (tmp_path / 'one.txt').write_text('a line')
  prepare.prepare(tmp_path / 'one.txt', tmp_path, 'one')
  path = tmp_path / 'own/one/1.0.0' / name
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=f'{message}.*prepare the data again: uni-moe prepare-data'):
    file_dataset.load('own:one', tmp_path, 'train')


def test_errors_for_unknown_names_suggest_the_nearest(images):
  with pytest.raises(FileNotFoundError, match="did you mean 'colors'"):
    file_dataset.load('own:coolors', images[0], 'train')
  with pytest.raises(ValueError, match="did you mean 'train'"):
    file_dataset.load('own:colors', images[0], 'trains')


def test_the_first_of_several_rows_with_one_key_is_kept(tmp_path):
  rows = [{'key': key, 'text_a': text, 'text_b': 'other', 'label_name': 'same'}
          for key, text in (('a', 'one'), ('b', 'two'), ('a', 'three'), ('c', 'one'))]
  summary = _prepare(tmp_path, rows, 'keyed', max_corrupt_fraction=0.5)
  assert summary['skipped'] == {'duplicate key': {'count': 1, 'first': ['train.jsonl:3']}}
  assert [r['text_a'] for r in _read_all(tmp_path, source='own:keyed')[1]] == ['one', 'two', 'one']


# Prepares on a small disk: with 40 kB left for an array that needs 43 kB, then with more.
_SMALL_DISK = '''
import os, pathlib, sys
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.shards import writer
from uni_moe_jax.utils import errors
disk, filler, describe = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], 'filler'), writer.describe
(disk / 'data').mkdir()
(disk / 'in.txt').write_text(''.join(f'{i}\\n' for i in range(12_000)))
def on_a_full_disk(*arguments, **options):
  filler.write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 40_000))
  return describe(*arguments, **options)
writer.describe = on_a_full_disk
try:
  prepare.prepare(disk / 'in.txt', disk / 'data', 'x')
except OSError as e:
  print('full:', errors.disk_is_full(e))
filler.unlink()
writer.describe = describe
print(sum(prepare.prepare(disk / 'in.txt', disk / 'data', 'x')['splits'].values()))
'''


def test_a_disk_that_is_full_when_arrays_are_written_is_an_error_and_no_signal(tmp_path):
  if subprocess.run(['unshare', '-rm', 'true'], capture_output=True, check=False).returncode:
    pytest.skip('this machine has no user namespaces')
  mount = f'mount -t tmpfs -o size=16m tmpfs {tmp_path} && exec "$@"'
  done = subprocess.run(['unshare', '-rm', 'bash', '-c', mount, '', sys.executable, '-c', _SMALL_DISK, str(tmp_path)],
                        capture_output=True, text=True, env=processes.environment(1), check=False)
  assert (done.returncode, done.stdout) == (0, 'full: True\n12000\n'), done.stderr
