"""Prepared records on disk: atomic folders, files and fingerprints."""

import numpy as np
import pytest

from uni_moe_jax.data.examples import npz_records
from uni_moe_jax.data.examples.records import Records
from uni_moe_jax.utils.errors import UsageError

_COLUMNS = {'pixels': np.arange(12, dtype=np.uint8).reshape(3, 2, 2), 'name': np.array(['a', 'b', ''])}
_CLASSES = {'name': ('b', 'a')}


def test_equal_content_has_equal_fingerprints_however_it_is_stored():
  other = {'name': _COLUMNS['name'].astype('<U40'), 'pixels': np.asfortranarray(_COLUMNS['pixels'])}
  assert Records(other, _CLASSES).fingerprint == Records(_COLUMNS, _CLASSES).fingerprint


@pytest.mark.parametrize('columns, classes', [
    ({'pixels': _COLUMNS['pixels'] + 1}, _CLASSES),
    ({'pixels': _COLUMNS['pixels'].reshape(3, 1, 4)}, _CLASSES),
    ({'name': np.array(['ab', '', ''])}, _CLASSES),
    ({}, {'name': ('a', 'b')}),
], ids=['values', 'shape', 'end of a text', 'order of classes'])
def test_a_change_changes_the_fingerprint(columns, classes):
  assert Records(_COLUMNS | columns, classes).fingerprint != Records(_COLUMNS, _CLASSES).fingerprint


@pytest.mark.parametrize('store', [list, lambda texts: texts.astype(object),
                                   lambda texts: texts.astype(np.dtypes.StringDType())])
def test_python_strings_are_converted_so_that_their_fingerprint_is_that_of_their_content(store):
  records = Records(_COLUMNS | {'name': store(_COLUMNS['name'])}, _CLASSES)
  assert records.columns['name'].dtype == '<U1'
  assert records.fingerprint == Records(_COLUMNS, _CLASSES).fingerprint


@pytest.mark.parametrize('columns, message', [
    ({'pixels': _COLUMNS['pixels'] / 255}, r"column 'pixels' of records is float64 \[3, 2, 2\]; .* uint8 \[N, H, W\] "),
    ({'pixels': _COLUMNS['pixels'].astype(np.int64)}, "'pixels' of records is int64 "),
    ({'pixels': _COLUMNS['pixels'][0]}, r"'pixels' of records is uint8 \[2, 2\]; images are gray"),
    ({'pixels': np.zeros((3, 4, 4, 3), np.uint8)}, r"'pixels' of records is uint8 \[3, 4, 4, 3\]; images are gray"),
    ({'name': np.arange(3)}, r"column 'name' of records is int64 \[3\]; .* by `\.astype\(str\)`"),
    ({'name': _COLUMNS['name'][:, None]}, r"'name' of records is <U1 \[3, 1\]; .* strings \[N\]"),
    ({'name': np.array(['a', None, 'b'])}, "'name' of records has the item None; .* '' where there is none"),
    ({'name': _COLUMNS['name'][:2]}, "the same length, got {'pixels': 3, 'name': 2}"),
])
def test_a_column_that_would_be_misread_is_named(columns, message):
  with pytest.raises(UsageError, match=message):
    Records(_COLUMNS | columns, _CLASSES)


def test_class_names_are_strings_as_labels_are():
  with pytest.raises(UsageError, match="classes of 'name' of records have the name 0; names are strings"):
    Records(_COLUMNS, {'name': ('a', 0)})


class TestAtomicFolder:

  def test_the_folder_appears_when_the_block_ends_without_an_error(self, tmp_path):
    with pytest.raises(RuntimeError), npz_records.atomic_folder(tmp_path / 'made') as folder:
      (folder / 'half').touch()
      raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with npz_records.atomic_folder(tmp_path / 'made') as folder:
      (folder / 'part').touch()
      assert not (tmp_path / 'made').exists()
    assert [file.name for file in (tmp_path / 'made').iterdir()] == ['part']

  def test_of_two_concurrent_builds_the_first_to_finish_is_kept(self, tmp_path):
    with npz_records.atomic_folder(tmp_path / 'made') as slow:
      with npz_records.atomic_folder(tmp_path / 'made') as fast:
        (fast / 'fast').touch()
      (slow / 'slow').touch()
    paths = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob('*'))
    assert paths == ['made', 'made/fast']

  def test_the_second_of_two_that_need_not_be_equal_is_an_error(self, tmp_path):
    with pytest.raises(UsageError, match='made was made by another process in the meantime'):
      with npz_records.atomic_folder(tmp_path / 'made', is_reproducible=False) as slow:
        with npz_records.atomic_folder(tmp_path / 'made', is_reproducible=False) as fast:
          (fast / 'fast').touch()
        (slow / 'slow').touch()
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob('*')) == ['made', 'made/fast']


def test_a_data_directory_of_an_unknown_user_does_not_exist():
  with pytest.raises(FileNotFoundError, match='Data directory ~nobody_of_this_name/x does not exist'):
    npz_records.check_directory('~nobody_of_this_name/x')


class TestFiles:

  def test_records_are_read_as_they_were_saved(self, tmp_path):
    npz_records.save(tmp_path, 'train', _COLUMNS, _CLASSES)
    records = npz_records.load(tmp_path, '.', 'train')
    np.testing.assert_array_equal(records.columns['pixels'], _COLUMNS['pixels'])
    assert records.columns['name'].tolist() == ['a', 'b', '']
    assert records.classes == _CLASSES
    assert records.fingerprint == Records(_COLUMNS, _CLASSES).fingerprint

  def test_columns_of_different_lengths_are_refused(self, tmp_path):
    with pytest.raises(ValueError, match="'train'.*the same length.*'pixels': 3, 'name': 2"):
      npz_records.save(tmp_path, 'train', _COLUMNS | {'name': np.array(['a', 'b'])}, {})

  @pytest.mark.parametrize('damage', [
      lambda path: path.write_bytes(path.read_bytes()[:-40]),
      lambda path: path.write_bytes(path.read_bytes().replace(b'PK', b'KP')),
      lambda path: path.write_bytes(b''),
      lambda path: (path.unlink(), path.mkdir()),
      lambda path: np.savez(path, name=np.array([{'code': 1}], object)),
  ], ids=['truncated', 'altered', 'empty', 'a folder', 'pickled objects'])
  def test_an_unreadable_file_is_named_with_the_fix(self, tmp_path, damage):
    npz_records.save(tmp_path, 'train', _COLUMNS, _CLASSES)
    damage(tmp_path / 'train.npz')
    message = r'train\.npz cannot be read \(.*damaged: delete .* and run: uni-moe prepare-data'
    with pytest.raises(ValueError, match=message):
      npz_records.load(tmp_path, '.', 'train')
