"""Splits of a user's own data: named or chosen, without groups or equal content in two of them."""

import shutil

import numpy as np
import pytest

from tests.data import own_files
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.prepare.summary import describe
from uni_moe_jax.data.shards import file_dataset


def _read_all(data, split, name):
  dataset = file_dataset.load(f'own:{name}', data, split)
  return dataset.read(np.arange(dataset.size))


@pytest.mark.parametrize('layout', ['a folder per image', 'a text per document'])
def test_the_test_split_has_its_fraction_of_groups_for_any_file_names(tmp_path, layout):
  has_images = layout == 'a folder per image'
  for i in range(300):
    if has_images:
      own_files.write_image(tmp_path / f'{i:04}/image.png', 'red', i, (8, 8))
    else:
      (tmp_path / f'{i:04}.txt').write_text(f'the text number {i}')
  if has_images:
    own_files.write_jsonl(tmp_path / 'all.jsonl', [
        {'image': f'{i // 2:04}/image.png', 'captions': [f'number {i}'], 'key': f'row {i}'} for i in range(600)])
  summary = prepare.prepare(tmp_path, tmp_path / 'out', 'fraction')
  assert 0.06 < summary['splits']['test'] / sum(summary['splits'].values()) < 0.14
  if has_images:  # rows of one image stay together
    images = _images_by_split(tmp_path / 'out', summary)
    assert not set(images['train']) & set(images['test'])
  tmp_path.rename(elsewhere := tmp_path.with_name(f'{tmp_path.name}, moved'))
  shutil.rmtree(elsewhere / 'out')
  assert prepare.prepare(elsewhere, elsewhere / 'out', 'fraction')['fingerprints'] == summary['fingerprints']


def test_groups_in_several_named_splits_are_reported(tmp_path):
  root = own_files.write_captioned_images(tmp_path / 'in', 5)
  rows = own_files.read_jsonl(root / 'data.jsonl')
  own_files.write_image(root / 'new.png', 'red', 99)
  own_files.write_jsonl(root / 'data.jsonl', [
      *rows, {'image': 'new.png', 'captions': ['once more'], 'split': 'test', 'group': 'roll 2'}])
  summary = prepare.prepare(root, tmp_path, 'leaky')
  assert 'warning: 1 groups are in several splits' in describe(summary)
  assert not summary['skipped']


def _leaky(root):
  """Eight images of the split test, seven of them copied to the split train under other names, beside 90 others."""
  rows = [{'image': f'{split}/{i}.png', 'caption': f'number {i}', 'split': split, 'group': f'{split} {i}'}
          for split, indices in (('train', range(90)), ('test', range(100, 108))) for i in indices]
  for i in range(108):
    own_files.write_image(root / f'{"test" if i > 99 else "train"}/{i}.png', 'red', i, (8, 8))
  for i in range(100, 107):
    (root / f'train/copy {i}.png').write_bytes((root / f'test/{i}.png').read_bytes())
    rows.append({'image': f'train/copy {i}.png', 'caption': f'another text {i}', 'split': 'train', 'key': f'copy {i}'})
  own_files.write_jsonl(root / 'all.jsonl', rows)
  return rows


def _images_by_split(data, summary):
  return {split: [r['image'] for r in _read_all(data, split, summary['name'])]
          for split in summary['splits']}


def test_a_copy_of_an_image_of_a_later_split_is_skipped(tmp_path):
  _leaky(tmp_path / 'in')
  summary = prepare.prepare(tmp_path / 'in', tmp_path, 'leaky')
  assert summary['splits'] == {'train': 90, 'test': 8}
  assert summary['skipped'] == {"same image as in split 'test'": {
      'count': 7, 'first': [f'all.jsonl:{line}' for line in range(99, 104)]}}
  images = _images_by_split(tmp_path, summary)
  assert not set(images['train']) & set(images['test'])


@pytest.mark.parametrize('repeated', ['one file', 'equal files', 'labeled text'])
@pytest.mark.parametrize('later', ['validation', 'test'])
def test_an_example_of_several_splits_stays_in_the_last_one_wherever_that_is_listed(tmp_path, repeated, later):
  def row(i, split, file):
    if repeated == 'labeled text':
      return {'text': f'text {i}', 'label': f'{i % 2}', 'split': split}
    own_files.write_image(tmp_path / 'in' / file, 'red', i, (8, 8))
    return {'image': file, 'caption': f'number {i}', 'split': split}

  copy = '3.png' if repeated == 'one file' else 'copy.png'
  rows = [*(row(i, 'train', f'{i}.png') for i in range(19)), row(3, later, copy), row(40, later, '40.png')]
  for name, order in (('after', rows), ('before', rows[::-1])):
    own_files.write_jsonl(tmp_path / 'in/all.jsonl', order)
    summary = prepare.prepare(tmp_path / 'in', tmp_path, name)
    assert summary['splits'] == {'train': 18, later: 2}
    reason = f'same {"text" if repeated == "labeled text" else "image"} as in split {later!r}'
    assert {k: v['count'] for k, v in summary['skipped'].items()} == {reason: 1}
    assert summary['skipped'][reason]['first'] == [f'all.jsonl:{1 + order.index(rows[3])}']


def test_equal_files_under_other_names_stay_in_one_split(tmp_path):
  rows = [{k: v for k, v in row.items() if k != 'split'} for row in _leaky(tmp_path / 'in')]
  own_files.write_jsonl(tmp_path / 'in/all.jsonl', rows)
  summary = prepare.prepare(tmp_path / 'in', tmp_path, 'joined', test_fraction=0.5)
  # Both captions of an image are kept.
  assert sum(summary['splits'].values()) == 105 and not summary['skipped']
  images = _images_by_split(tmp_path, summary)
  assert len(images['train'] + images['test']) - len(set(images['train'] + images['test'])) == 7
  assert not set(images['train']) & set(images['test'])


def test_groups_are_joined_through_others_and_unrelated_rows_keep_their_split(tmp_path):
  """Five groups are a chain of equal labeled texts; its split is that of the group that comes first."""
  rows = [{'text': f'text {i}', 'label': 'x', 'group': f'group {i}'} for i in range(200)]
  chain = [{'text': text, 'label': f'y{i}', 'group': f'group {i}'} for text, groups in (
      ('one', (150, 7)), ('two', (7, 90)), ('three', (90, 3)), ('four', (3, 199))) for i in groups]
  splits = []
  for name, content in (('alone', rows), ('joined', rows + chain)):
    own_files.write_jsonl(tmp_path / name / 'all.jsonl', content)
    summary = prepare.prepare(tmp_path / name, tmp_path, name, test_fraction=0.5, max_corrupt_fraction=0.5)
    splits.append({r['text']: split for split in summary['splits'] for r in _read_all(tmp_path, split, name)})
  alone, joined = splits
  members = [f'text {i}' for i in (3, 7, 90, 150, 199)]
  assert {joined[text] for text in (*members, 'one', 'two', 'three', 'four')} == {alone['text 3']}
  assert len({alone[text] for text in members}) == 2  # they would have been separated
  assert {text: joined[text] for text in alone if text not in members} == {
      text: split for text, split in alone.items() if text not in members}


def test_labeled_texts_stay_in_one_split_and_running_text_does_not(tmp_path):
  texts = [{'text_a': f'question {i % 100}', 'text_b': 'or not?', 'label': f'{i // 100}'} for i in range(200)]
  own_files.write_jsonl(tmp_path / 'pairs/all.jsonl', texts)
  (tmp_path / 'lines.txt').write_text('\n\n'.join(f'line {i % 100}' for i in range(200)))
  for path, name, joined in ((tmp_path / 'pairs', 'text_a', True), (tmp_path / 'lines.txt', 'text', False)):
    summary = prepare.prepare(path, tmp_path, path.stem, test_fraction=0.5)
    assert sum(summary['splits'].values()) == 200
    train, test = ({r[name] for r in _read_all(tmp_path, split, path.stem)} for split in ('train', 'test'))
    assert bool(train & test) != joined


def test_a_copy_with_the_same_texts_and_labels_is_a_duplicate(tmp_path):
  own_files.write_image(tmp_path / 'in/red/1.png', 'red', 1)
  own_files.write_image(tmp_path / 'in/red/3.png', 'red', 3)
  for name in ('red/2.png', 'blue/2.png'):
    (tmp_path / 'in' / name).parent.mkdir(exist_ok=True)
    (tmp_path / 'in' / name).write_bytes((tmp_path / 'in/red/1.png').read_bytes())
  summary = prepare.prepare(tmp_path / 'in', tmp_path, 'copies', test_fraction=0, max_corrupt_fraction=0.5)
  assert summary['splits'] == {'train': 3}
  assert summary['skipped'] == {'duplicate': {'count': 1, 'first': ['red/2.png']}}


def test_few_groups_stay_in_training_and_an_empty_split_is_reported(tmp_path):
  (tmp_path / 'one.txt').write_text('a document\nof two lines')
  for i, fraction in enumerate((0.001, 0.999)):
    summary = prepare.prepare(tmp_path / 'one.txt', tmp_path, f'few{i}', test_fraction=fraction)
    assert summary['splits'] == {'train': 2}
    assert f'warning: the split test is empty with --test_fraction={fraction}' in describe(summary)
  (tmp_path / 'test.txt').write_text('a document')
  summary = prepare.prepare(tmp_path / 'test.txt', tmp_path, 'evaluated')
  assert 'warning: there is no split train' in describe(summary)


@pytest.mark.parametrize('file, field, warns', [
    ('train.jsonl', None, True), ('data.jsonl', 'train', True), ('data.jsonl', None, False)])
def test_data_of_which_all_rows_name_the_split_train_has_a_warning(tmp_path, file, field, warns):
  rows = [{'text': f'text {i}', 'label': f'{i % 2}', 'split': field} for i in range(40)]
  own_files.write_jsonl(tmp_path / file, rows)
  summary = prepare.prepare(tmp_path / file, tmp_path, 'texts')
  assert ('warning: every row is in the split train, ' in describe(summary)) == warns
  assert ('test' in summary['splits']) != warns
  summary = prepare.prepare(tmp_path / file, tmp_path, 'unheld', test_fraction=0)
  assert not summary['warnings'] and summary['splits'] == {'train': 40}
  own_files.write_jsonl(tmp_path / file, rows + [{'text': 'one', 'label': '1', 'split': 'validation'}])
  assert not prepare.prepare(tmp_path / file, tmp_path, 'named')['warnings']


def test_lines_of_a_document_stay_in_one_split(tmp_path):
  lines = (f'line {i} of it\n' * 2 if i % 2 else f'line {i} of it' for i in range(400))
  (tmp_path / 'book.txt').write_text('\n'.join(lines))
  summary = prepare.prepare(tmp_path / 'book.txt', tmp_path, 'book')
  assert summary['columns'] == {'text': 'text'} and set(summary['splits']) == {'train', 'test'}
  assert 0.05 < summary['splits']['test'] / sum(summary['splits'].values()) < 0.2
  train, test = (_read_all(tmp_path, split, 'book') for split in ('train', 'test'))
  assert not summary['skipped'] and len(test) == summary['splits']['test']  # a line may occur twice
  assert not {r['text'] for r in train} & {r['text'] for r in test}
