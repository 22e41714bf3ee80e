"""People's own data becomes a data set: what is taken, what is rewritten, what is skipped and why."""

import dataclasses
import io
import json
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.data import own_files
from uni_moe_jax.data.files import file_dataset, prepare
from uni_moe_jax.data.files.formats import read


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """(data directory, source folder, what prepare said, expectation per odd picture)."""
  root = own_files.write_captioned_images(tmp_path_factory.mktemp('pictures') / 'in')
  odd = own_files.append_odd_rows(root)
  data = tmp_path_factory.mktemp('data')
  return data, root, prepare.prepare(root, data, 'colours', max_corrupt_fraction=0.4), odd


def _all(data, split='train', source='own:colours'):
  records = file_dataset.load(source, data, split)
  return records, records.read(np.arange(records.size))


def test_splits_are_those_that_the_data_names(pictures):
  # 30 rows, every fifth for the test; in training thirteen odd pictures more that are fine, one repeated, one without captions, and
  # seven with fields of which nothing can be made.
  assert pictures[2]['splits'] == {'train': 24 + 13 + 2 + 7, 'test': 6}


def test_every_skipped_row_has_its_reason_and_first_paths(pictures):
  skipped = pictures[2]['skipped']
  counts = {reason: found['count'] for reason, found in skipped.items()}
  assert counts == {
      'missing file': 1, 'broken picture': 1, 'smaller than 8 pixels': 1, 'not a picture': 2, 'empty caption': 1,
      "wrong type of 'captions'": 1, 'duplicate': 1, 'not an object': 1, 'neither a picture, a clip nor a text': 1,
      'not UTF-8': 2, 'unreadable file': 3, "wrong type of 'text_a'": 1, "wrong type of 'label'": 1,
      'no picture': 1, 'a clip, and most rows have a picture': 1,
      "split 'nowhere' is not train, validation or test": 1, 'not JSON': 2}
  # Line 31 is the first odd row.
  assert skipped['missing file']['first'] == ['data.jsonl:31']
  assert 'skipped, missing file: 1 (data.jsonl:31)' in prepare.describe(pictures[2])


def test_a_field_of_which_nothing_can_be_made_costs_no_row_and_is_told(pictures):
  data, _, said, _ = pictures
  assert said['left_out'] == {"'colour'": 2, "'sentids'": 2, "'where'": 1, "'what / where'": 1, "'text_length'": 1}
  assert "left out, field 'sentids' of another type or name than can be used: 2" in prepare.describe(said)
  assert set(said['columns']) == {'image', 'captions', 'colour'}
  extra = [row for row in _all(data)[1] if row['captions'] and row['captions'][0].startswith('extra')]
  assert [row['captions'] for row in extra] == [(f'extra {i}',) for i in range(7)]
  assert not any(row['colour'] for row in extra) and all(row['where'].startswith('data.jsonl:') for row in extra)


def test_a_text_without_anything_else_of_use_is_no_row(tmp_path):
  lines = [{'tags': ['one', 'two']}, {'text': 'a text', 'tags': 'three'}, {'text': 'a text', 'tags': 'four'}]
  (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  said = prepare.prepare(tmp_path, tmp_path / 'out', 'texts', max_corrupt_fraction=0.5)
  assert said['splits'] == {'train': 2} and set(said['skipped']) == {'neither a picture, a clip nor a text'}


def test_odd_pictures_that_are_fine_are_there_with_their_captions(pictures):
  data, _, _, odd = pictures
  captions = [row['captions'] for row in _all(data)[1]]
  for name, reason in odd.items():
    assert ((f'рыжий кот {name}',) in captions) == (not reason), name


def test_bytes_are_those_of_the_file_but_for_what_would_be_seen_wrongly(pictures):
  data, root, said, odd = pictures
  kept = {row['captions'][0].removeprefix('рыжий кот '): row['image'] for row in _all(data)[1] if row['captions']}
  same = {name for name, reason in odd.items() if not reason and (root / 'pictures' / name).read_bytes() == kept[name]}
  assert same == {'UPPER.JPG', 'palette.png', 'grey.png', 'web.webp', 'camera.jpg', 'bits.png', 'deep.png'}
  assert said['rewritten'] == {
      'transparent: on white': 1, 'animated: first frame': 1, 'turned as its camera was': 1, 'colours CMYK': 1,
      'format BMP': 2}
  opened = {name: np.asarray(Image.open(io.BytesIO(kept[name]))) for name in ('alpha.png', 'turned.jpg', 'moving.gif')}
  assert (opened['alpha.png'] == 255).all()
  assert opened['turned.jpg'].shape == (own_files.SIDE + 8, own_files.SIDE, 3)
  assert opened['moving.gif'].mean(axis=(0, 1)).argmax() == 0  # red, not blue


def test_tensorflow_reads_every_stored_picture_as_pillow_does(pictures):
  import tensorflow as tf
  for row in _all(pictures[0])[1]:
    read = tf.io.decode_image(row['image'], channels=3, expand_animations=False).numpy().astype(int)
    image = Image.open(io.BytesIO(row['image']))
    seen = np.asarray(image.convert('RGB') if image.mode[0] != 'I' else Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                      .convert('RGB'))
    exact = image.format == 'PNG'  # others are decoded by other libraries, which round as they like
    assert np.abs(read - seen).max() <= (0 if exact else 6), row['where']


@pytest.mark.parametrize('name, form', [('index', 'P'), ('bits', '1')])
def test_a_bmp_shows_its_colours(pictures, name, form):
  [stored_bytes] = [row['image'] for row in _all(pictures[0])[1] if row['captions'] == (f'рыжий кот {name}.bmp',)]
  seen = np.asarray(Image.open(io.BytesIO(stored_bytes)))
  np.testing.assert_array_equal(seen, own_files.color_image('red', 99).convert(form).convert('RGB'))


def test_a_field_whose_values_repeat_is_a_class_and_says_which_rows_have_none(pictures):
  records, rows = _all(pictures[0])
  assert records.classes == {'colour': ('blue', 'green', 'red')}
  assert [r['colour'] for r in rows[:4]] == ['red', 'green', 'blue', 'red']
  np.testing.assert_array_equal(records.labels['colour'], [('blue', 'green', 'red', '').index(r['colour']) if r['colour']
                                                           else -1 for r in rows])
  assert pictures[2]['classes']['colour']['counts']['test'] == [2, 2, 2]


def test_it_is_known_beforehand_which_rows_have_texts(pictures):
  records, rows = _all(pictures[0])
  assert records.present['captions'].tolist() == [bool(r['captions']) for r in rows]
  assert records.present['captions'].sum() == records.size - 1


def test_of_two_media_the_commoner_stays_and_of_texts_what_most_rows_have(tmp_path):
  own_files.write_videos(tmp_path / 'in', count=2)
  lines = [{'text_a': f'one {i}', 'text_b': f'two {i}'} for i in range(5)]
  lines += [{'text_a': 'one'}, {'text_a': 'six', 'text_b': 'six', 'text_c': 'more'}]
  (tmp_path / 'texts.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  said = prepare.prepare(tmp_path / 'texts.jsonl', tmp_path, 'texts', test_fraction=0.0, max_corrupt_fraction=0.5)
  assert said['skipped'] == {"no 'text_b'": {'count': 1, 'first': ['texts.jsonl:6']}} and said['splits'] == {'train': 6}
  assert _all(tmp_path, source='own:texts')[0].present['text_c'].tolist() == [False] * 5 + [True]
  for i in range(3):
    (tmp_path / f'in/moves/{i}.png').write_bytes(own_files.encode_image(own_files.color_image('red', i), 'PNG'))
  said = prepare.prepare(tmp_path / 'in', tmp_path, 'mixed', test_fraction=0.0, max_corrupt_fraction=0.5)
  assert said['columns'] == {'image': 'image', 'label': 'class'} and said['splits'] == {'train': 3}
  assert {reason: found['count'] for reason, found in said['skipped'].items()} == {'a clip, and most rows have a picture': 2}


def test_statistics_say_sizes_and_captions(pictures):
  assert pictures[2]['sizes']['median'] == [32, 24]
  assert pictures[2]['captions_per_example'] == {'least': [1], 'median': [2], 'most': [2]}


def test_a_version_is_written_once_and_the_newest_is_read(pictures, tmp_path):
  data, root, said, _ = pictures
  with pytest.raises(ValueError, match='is there already'):
    prepare.prepare(root, data, 'colours', max_corrupt_fraction=0.4)
  again = prepare.prepare(root, tmp_path, 'colours', max_corrupt_fraction=0.4)
  assert again['fingerprints'] == said['fingerprints']
  (root / 'data.jsonl').write_text(''.join((root / 'data.jsonl').read_text(errors='replace').splitlines(True)[:20]))
  prepare.prepare(root, tmp_path, 'colours', '1.10.0')
  assert file_dataset.load('own:colours', tmp_path, 'train').size == 16
  assert file_dataset.load('own:colours/1.0.0', tmp_path, 'train').size == 46


def test_too_many_bad_rows_stop_with_the_first(tmp_path):
  (tmp_path / 'data.jsonl').write_text('{"image": "a.jpg", "captions": ["a"]}\n{"image": "b.jpg", "captions": ["b"]}\n')
  with pytest.raises(ValueError, match="2 of 2 rows .* most are 'missing file' .* data.jsonl:1"):
    prepare.prepare(tmp_path, tmp_path / 'out', 'none')
  assert not list(tmp_path.glob('out/own/none/*'))


def test_a_folder_by_class_with_splits(tmp_path):
  for split, colour, i in (('train', 'red', 0), ('train', 'blue', 1), ('Val', 'red', 2), ('other', 'red', 3)):
    place = tmp_path / 'in' / split / colour
    place.mkdir(parents=True, exist_ok=True)
    (place / f'{i}.JPEG').write_bytes(own_files.encode_image(own_files.color_image(colour, i)))
  (tmp_path / 'in/train/red/notes.txt.bak').write_text('x')
  said = prepare.prepare(tmp_path / 'in', tmp_path, 'folder', max_corrupt_fraction=0.5)
  assert said['splits'] == {'train': 2, 'validation': 1}
  assert said['classes']['label']['names'] == ['blue', 'red']
  assert set(said['skipped']) == {'not a picture or clip', 'split folder is not train, validation or test'}


def test_labelled_text_counts_whole_numbers_as_numbers(tmp_path):
  lines = [{'text_a': f'one {i}', 'text_b': 'two', 'label': i % 11} for i in range(33)]
  (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  (tmp_path / 'dev.jsonl').write_text(json.dumps({**lines[0], 'text_a': 'zero'}) + '\n')
  said = prepare.prepare(tmp_path, tmp_path / 'out', 'pairs')
  assert said['classes']['label']['names'] == [str(i) for i in range(11)]
  assert said['splits'] == {'train': 33, 'validation': 1}
  assert file_dataset.load('own:pairs', tmp_path / 'out', 'validation').read(np.array([0]))[0]['text_a'] == 'zero'


def test_labels_are_read_back_with_one_space_between_words_and_an_empty_one_is_none(tmp_path):
  lines = [{'text': f'number {i}', 'label': label} for i, label in enumerate((' pad ', 'two\n  words', '', ' ', '\xa0', 'pad'))]
  (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  prepare.prepare(tmp_path, tmp_path / 'out', 'odd')
  records, rows = _all(tmp_path / 'out', source='own:odd')
  assert [row['label'] for row in rows] == ['pad', 'two words', '', '', '', 'pad']
  assert records.classes == {'label': ('pad', 'two words')} and records.labels['label'].tolist() == [0, 1, -1, -1, -1, 0]


def test_text_beside_folders_of_classes_is_no_data(tmp_path):
  for i, place in enumerate(('red', 'blue ', ' ')):
    (tmp_path / 'in' / place).mkdir(parents=True)
    (tmp_path / 'in' / place / f'{i}.png').write_bytes(own_files.encode_image(own_files.color_image('red', i), 'PNG'))
  (tmp_path / 'in/README.txt').write_text('About\nthese\npictures')
  said = prepare.prepare(tmp_path / 'in', tmp_path, 'folder', max_corrupt_fraction=0.5)
  assert said['columns'] == {'image': 'image', 'label': 'class'} and said['classes']['label']['names'] == ['blue', 'red']
  assert said['skipped'] == {'text beside folders of classes': {'count': 1, 'first': ['README.txt']},
                             'empty label': {'count': 1, 'first': [' /2.png']}}


@pytest.mark.parametrize('layout', ['a folder for each picture', 'a text for each document'])
def test_a_tenth_of_the_groups_is_held_out_however_their_files_are_named(tmp_path, layout):
  for i in range(300):
    if layout == 'a text for each document':
      (tmp_path / f'{i:04}.txt').write_text(f'the text number {i}')
    else:
      (tmp_path / f'{i:04}').mkdir()
      (tmp_path / f'{i:04}/image.png').write_bytes(own_files.encode_image(own_files.color_image('red', i, (8, 8)), 'PNG'))
  if layout == 'a folder for each picture':
    lines = [{'image': f'{i // 2:04}/image.png', 'captions': [f'number {i}'], 'key': f'row {i}'} for i in range(600)]
    (tmp_path / 'all.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  found = list(prepare._distinct(read(tmp_path), {}))
  checked = [prepare.Checked(row, (), '') for row in found]
  splits = prepare._split(checked, 0.1, tmp_path)
  assert 0.06 < len(splits['test']) / len(found) < 0.14
  if layout == 'a folder for each picture':  # rows of one picture stay together
    assert not {c.row.path for c in splits['train']} & {c.row.path for c in splits['test']}
  moved = [dataclasses.replace(c, row=dataclasses.replace(c.row, path=c.row.path and pathlib.Path('/there', c.row.path.relative_to(
      tmp_path)))) for c in checked]
  assert [len(m) for m in prepare._split(moved, 0.1, pathlib.Path('/there')).values()] == [len(m) for m in splits.values()]


def test_a_file_or_group_that_the_data_itself_puts_into_two_splits_is_told(tmp_path):
  root = own_files.write_captioned_images(tmp_path / 'in', 5)
  again = {'captions': ['asked again'], 'split': 'test'}
  rows = [{**again, 'image': 'pictures/../pictures/000.jpg', 'key': 'new'}, {**again, 'image': 'pictures/001.png', 'group': 'roll 2'}]
  lines = [json.loads(line) for line in (root / 'data.jsonl').read_text().splitlines()]
  del lines[0]['group']
  (root / 'data.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines + rows))
  said = prepare.prepare(root, tmp_path, 'leaky')  # the picture 0, and roll 2
  assert 'groups or files in several splits: 2: a test may know them from training' in prepare.describe(said)


def test_of_few_groups_some_stay_to_train_on_and_an_empty_split_is_told(tmp_path):
  (tmp_path / 'one.txt').write_text('a document\nof two lines')
  for i, test_fraction in enumerate((0.001, 0.999)):
    said = prepare.prepare(tmp_path / 'one.txt', tmp_path, f'few{i}', test_fraction=test_fraction)
    assert said['splits'] == {'train': 2}
    assert f'warning: no group fell to the split test by --test_fraction={test_fraction}' in prepare.describe(said)
  (tmp_path / 'test.txt').write_text('a document')
  said = prepare.prepare(tmp_path / 'test.txt', tmp_path, 'asked')
  assert 'warning: there is no split train' in prepare.describe(said)


def test_lines_of_text_stay_together_by_document_and_a_tenth_is_held_out(tmp_path):
  (tmp_path / 'book.txt').write_text('\n'.join(f'line {i} of it\n' * 2 if i % 2 else f'line {i} of it' for i in range(400)))
  said = prepare.prepare(tmp_path / 'book.txt', tmp_path, 'book')
  assert said['columns'] == {'text': 'text'} and set(said['splits']) == {'train', 'test'}
  assert 0.05 < said['splits']['test'] / sum(said['splits'].values()) < 0.2
  lines = [row['where'] for row in _all(tmp_path, 'test', 'own:book')[1]]
  assert not said['skipped'] and len(lines) == said['splits']['test']  # a line may occur twice
  documents = [{row['text'] for row in _all(tmp_path, split, 'own:book')[1]} for split in ('train', 'test')]
  assert not documents[0] & documents[1]


def test_frames_in_an_array_have_a_line_each(tmp_path):
  frames = np.stack([own_files.moving_bar(True), own_files.moving_bar(False)])
  np.savez(tmp_path / 'clips.npz', frames=frames)
  (tmp_path / 'clips.jsonl').write_text('{"label": "moves", "split": "train"}\n' * 2 + '{"label": "x", "split": "train"}\n')
  said = prepare.prepare(tmp_path, tmp_path / 'out', 'arrays', max_corrupt_fraction=0.5)
  assert said['skipped'] == {'a line more than the array has clips': {'count': 1, 'first': ['clips.jsonl:3']}}
  _, rows = _all(tmp_path / 'out', source='own:arrays')
  np.testing.assert_array_equal(np.load(io.BytesIO(rows[1]['video'])), frames[1])


@pytest.mark.parametrize('harm', [
    lambda data: data[:len(data) // 2],
    lambda data: b'',
    lambda data: data[:200] + bytes(100) + data[300:],
    lambda data: data.replace(b'PK\x01\x02', b'PK\x01\x03'),
    lambda data: _zipped(()),
    lambda data: _zipped(('frames.txt',)),
], ids=['cut off', 'empty', 'zeros', 'directory', 'nothing in it', 'no array in it'])
def test_a_damaged_array_costs_its_rows_alone(tmp_path, harm):
  np.savez_compressed(tmp_path / 'bad.npz', frames=np.stack([own_files.moving_bar(True)] * 2))
  (tmp_path / 'bad.npz').write_bytes(harm((tmp_path / 'bad.npz').read_bytes()))
  np.savez(tmp_path / 'good.npz', frames=own_files.moving_bar(False)[None])
  for name, count in (('bad', 2), ('good', 1)):
    (tmp_path / f'{name}.jsonl').write_text('{"label": "bar"}\n' * count)
  said = prepare.prepare(tmp_path, tmp_path / 'out', 'arrays', test_fraction=0.0, max_corrupt_fraction=0.7)
  assert said['splits'] == {'train': 1} and said['skipped']['broken array']['first'] == ['bad.jsonl:1', 'bad.jsonl:2']


def _zipped(names) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as archive:
    for name in names:
      archive.writestr(name, b'')
  return out.getvalue()


@pytest.mark.parametrize('name, harm, said', [
    ('prepared.json', lambda data: data[:100], 'prepared.json is damaged'),
    ('labels.npz', lambda data: data[:100], 'labels.npz cannot be read'),
    ('labels.npz', lambda data: b'', 'labels.npz cannot be read')])
def test_damage_of_what_was_prepared_says_to_prepare_it_again(tmp_path, name, harm, said):
  (tmp_path / 'one.txt').write_text('a line')
  prepare.prepare(tmp_path / 'one.txt', tmp_path, 'one')
  path = tmp_path / 'own/one/1.0.0' / name
  path.write_bytes(harm(path.read_bytes()))
  with pytest.raises(ValueError, match=f'{said} .*prepare the data again: python launch/prepare_data.py'):
    file_dataset.load('own:one', tmp_path, 'train')


def test_unknown_names_say_the_nearest(pictures):
  with pytest.raises(FileNotFoundError, match="did you mean 'colours'"):
    file_dataset.load('own:colors', pictures[0], 'train')
  with pytest.raises(ValueError, match="did you mean 'train'"):
    file_dataset.load('own:colours', pictures[0], 'trains')


def test_of_rows_with_one_key_the_first_stays_whatever_they_say(tmp_path):
  said = [('a', 'one'), ('b', 'two'), ('a', 'three'), ('c', 'one')]
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in/train.jsonl').write_text(''.join(
      json.dumps({'key': key, 'text_a': text, 'text_b': 'other', 'label_name': 'same'}) + '\n' for key, text in said))
  found = prepare.prepare(tmp_path / 'in', tmp_path, 'keyed', max_corrupt_fraction=0.5)
  assert {reason: s['first'] for reason, s in found['skipped'].items()} == {'duplicate key': ['train.jsonl:3']}
  assert [row['text_a'] for row in _all(tmp_path, source='own:keyed')[1]] == ['one', 'two', 'one']
