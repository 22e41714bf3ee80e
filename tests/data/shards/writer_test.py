"""A dataset is written as it was given, with labels and fingerprints; columns that would be misread are named."""

import json
import pathlib

import numpy as np
import pytest

from uni_moe_jax.data.shards import file_dataset, writer
from uni_moe_jax.utils.errors import RunError, UsageError

_COLUMNS = {'pixels': np.arange(12, dtype=np.uint8).reshape(3, 2, 2), 'class': np.array(['a', 'b', '']),
            'name': np.array(['x', 'y y', ''])}
_CLASSES = {'class': ('b', 'a')}


def _write(root: pathlib.Path, columns=_COLUMNS, classes=_CLASSES, split: str = 'train') -> file_dataset.FileDataset:
  """Writes and opens a split of glyphs."""
  writer.write_dataset(root, file_dataset.embedded_folder('glyphs'), lambda: [(split, columns, classes)])
  return file_dataset.load('glyphs', root, split)


def _shard(root: pathlib.Path) -> pathlib.Path:
  [path] = root.rglob('*.array_record*')
  return path


def test_records_are_read_as_they_were_written(tmp_path):
  records = _write(tmp_path)
  assert (records.size, records.shapes) == (3, {'pixels': (1, 2, 2, 1)})
  assert records.columns == {'pixels': 'array', 'class': 'class', 'name': 'text', 'source_location': 'text'}
  assert records.classes == _CLASSES and records.labels['class'].tolist() == [1, 0, -1]
  read = records.read(np.array([2, 0]))
  assert [(record['class'], record['name']) for record in read] == [('', ''), ('a', 'x')]
  np.testing.assert_array_equal([record['pixels'][0, ..., 0] for record in read], _COLUMNS['pixels'][[2, 0]])


def test_a_video_is_an_array_of_several_frames(tmp_path):
  pixels = np.arange(3 * 4 * 2 * 2, dtype=np.uint8).reshape(3, 4, 2, 2)
  records = _write(tmp_path, _COLUMNS | {'pixels': pixels})
  assert (records.media_type, records.shapes['pixels']) == ('video', (4, 2, 2, 1))
  np.testing.assert_array_equal(records.read(np.array([1]))[0]['pixels'][..., 0], pixels[1])


def test_equal_content_has_equal_fingerprints_however_it_is_stored(tmp_path):
  other = _COLUMNS | {'name': _COLUMNS['name'].astype('<U40'), 'pixels': np.asfortranarray(_COLUMNS['pixels'])}
  assert _write(tmp_path / '1', other).fingerprint == _write(tmp_path / '2').fingerprint


@pytest.mark.parametrize('columns, classes', [
    ({'pixels': _COLUMNS['pixels'] + 1}, _CLASSES),
    ({'pixels': _COLUMNS['pixels'][::-1]}, _CLASSES),
    ({'class': np.array(['a', 'b', 'b'])}, _CLASSES),
    ({'name': np.array(['x', 'y', 'y'])}, _CLASSES),
    ({}, {'class': ('a', 'b')}),
], ids=['values', 'order of records', 'label', 'text', 'order of classes'])
def test_a_change_changes_the_fingerprint(tmp_path, columns, classes):
  changed = _write(tmp_path / '1', _COLUMNS | columns, classes)
  assert changed.fingerprint != _write(tmp_path / '2').fingerprint


@pytest.mark.parametrize('columns, message', [
    ({'pixels': _COLUMNS['pixels'] / 255}, r"column 'pixels' is float64 \[3, 2, 2\]; images are gray, uint8 \[N, H, W"),
    ({'pixels': _COLUMNS['pixels'].astype(np.int64)}, "'pixels' is int64 "),
    ({'pixels': _COLUMNS['pixels'][0]}, r"'pixels' is uint8 \[2, 2\]"),
    ({'pixels': np.zeros((3, 4, 4, 3), np.uint8)}, r"'pixels' is uint8 \[3, 4, 4, 3\]; images are gray"),
    ({'name': np.arange(3)}, r"column 'name' is int64 \[3\]; .* texts and labels unicode \[N\]"),
    ({'name': _COLUMNS['name'][:, None]}, r"'name' is <U3 \[3, 1\]"),
    ({'name': _COLUMNS['name'][:2]}, "the same length, got {'pixels': 3, 'class': 3, 'name': 2}"),
    ({'class': np.array(['a', 'c', 'b'])}, "column 'class' has 'c', which is none of its classes"),
])
def test_a_column_that_would_be_misread_is_named_and_nothing_is_written(tmp_path, columns, message):
  with pytest.raises(UsageError, match=message):
    _write(tmp_path, _COLUMNS | columns)
  assert not [path for path in tmp_path.rglob('*') if path.is_file() and not path.name.endswith('.lock')]


def test_what_is_there_is_neither_made_nor_written_again(tmp_path):
  folder = file_dataset.embedded_folder('glyphs')
  assert writer.write_dataset(tmp_path, folder, lambda: [('train', _COLUMNS, _CLASSES)])
  assert not writer.write_dataset(tmp_path, folder, lambda: pytest.fail('made again'))


def test_a_damaged_description_is_named_with_the_fix(tmp_path):
  _write(tmp_path)
  [summary] = tmp_path.rglob('prepared.json')
  summary.write_text(summary.read_text()[:-40])
  with pytest.raises(UsageError, match=r'prepared\.json.*prepare the data again: uni-moe prepare-data'):
    file_dataset.load('glyphs', tmp_path, 'train')
  summary.write_text(json.dumps({'format': 1}))
  with pytest.raises(UsageError, match='prepare the data again'):
    file_dataset.load('glyphs', tmp_path, 'train')


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(path.read_bytes()[:-40]), lambda path: path.write_bytes(b'')],
    ids=['truncated', 'empty'])
def test_records_of_which_none_can_be_read_end_the_run(tmp_path, damage):
  _write(tmp_path)
  damage(_shard(tmp_path))
  with pytest.raises((RunError, UsageError), match='glyphs'):
    file_dataset.load('glyphs', tmp_path, 'train').read_valid(np.arange(3))


def test_a_data_directory_of_an_unknown_user_does_not_exist():
  with pytest.raises(FileNotFoundError, match='Data directory ~nobody_of_this_name/x does not exist'):
    file_dataset.check_directory('~nobody_of_this_name/x')
