"""Arrays in files: what a dictionary gives, in pieces."""

import errno

import numpy as np
import pytest

from tests.helpers import file_size
from uni_moe_jax.data.prepare import columns
from uni_moe_jax.data.prepare.columns import Column, smallest_by_key


@pytest.mark.parametrize('num_keys', [1, 7, 10**6])
def test_the_smallest_value_of_equal_keys_is_found_in_pieces(tmp_path, monkeypatch, num_keys):
  monkeypatch.setattr(columns, '_PIECE', 16)
  rng = np.random.default_rng(num_keys)
  keys = rng.integers(0, num_keys, 300).astype(np.uint64) * np.uint64(2**43 + 1)
  values, ids = rng.integers(-50, 50, 300), np.arange(300)
  used = ids % 3 != 0
  smallest_by_key(((ids[i:i + 20][used[i:i + 20]], keys[i:i + 20][used[i:i + 20]], values[i:i + 20][used[i:i + 20]])
                   for i in range(0, 300, 20)), 300, out := Column(tmp_path / 'out', 'i8', 300))
  expected = {k: min(values[used & (keys == k)], default=0) for k in keys}
  np.testing.assert_array_equal(out[:], np.where(used, [expected[k] for k in keys], 0))


def test_a_column_is_read_and_written_anywhere(tmp_path):
  column = Column(tmp_path / 'x', 'i4', 5)
  column.append(np.array([1, 2]))
  column[1:3] = np.array([8, 9])
  column[np.array([6, 0])] = np.array([-1, 7])
  assert column[0:7].tolist() == [7, 8, 9, 0, 0, 1, -1] and column[np.array([6, 1])].tolist() == [-1, 8]


def test_what_was_read_is_a_copy_and_an_empty_column_is_read_and_written(tmp_path):
  column = Column(tmp_path / 'x', 'i4', 3)
  for read in (column[0:2], column[np.array([0, 1])]):
    read += 1
  assert column[:].tolist() == [0, 0, 0]
  empty, none = Column(tmp_path / 'y', 'i4'), np.empty(0, np.int64)
  empty[none] = none
  assert empty[:].tolist() == empty[none].tolist() == []


def test_an_array_that_cannot_be_written_whole_is_an_error(tmp_path):
  array = np.arange(1000, dtype=np.int32)  # 4,128 bytes with its header
  with file_size.at_most(4128):
    columns.save(tmp_path / 'x.npy', array)
  np.testing.assert_array_equal(np.load(tmp_path / 'x.npy'), array)
  with file_size.at_most(4096), pytest.raises(OSError) as raised:
    columns.save(tmp_path / 'y.npy', array)
  assert raised.value.errno == errno.EFBIG
