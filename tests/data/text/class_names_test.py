"""Entries of target sets: keys, names, synonyms, and files that list them."""

import pytest

from uni_moe_jax.data.text import class_names


def test_a_string_is_key_and_name_and_a_tuple_has_synonyms():
  entries = class_names.parse_entries(('cat', ('n02', 'dog', 'hound')), 'target_sets.x')
  assert entries == (('cat', ('cat',)), ('n02', ('dog', 'hound')))


def test_a_file_has_a_line_per_class(tmp_path):
  (tmp_path / 'names').mkdir()
  (tmp_path / 'names/x.tsv').write_text('# two birds\nn01\tcrane | heron\n\nn02\tcrane\nplain name\n')
  assert class_names.read_entries('file:names/x.tsv', tmp_path, 'target_sets.x') == (
      ('n01', ('crane', 'heron')), ('n02', ('crane',)), ('plain name', ('plain name',)))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
  for first, expected in (('n01\ttench\n', (('n01', ('tench',)),)), ('# fish\n', ())):
    (tmp_path / 'x.tsv').write_bytes(b'\xef\xbb\xbf' + f'{first}n02\tgoldfish\n'.encode())
    assert class_names.read_entries('file:x.tsv', tmp_path, 'target_sets.x') == (*expected, ('n02', ('goldfish',)))


@pytest.mark.parametrize('values, message', [
    (('a', 'b', 'a'), "config.target_sets.x: entry 'a' occurs twice"),
    ((('k',),), "entry 'k' has no name"),
    ((('k', 'a', ''),), "entry 'k' has no name or an empty one"),
])
def test_an_invalid_entry_is_named(values, message):
  with pytest.raises(ValueError, match=message):
    class_names.parse_entries(values, 'target_sets.x')


def test_a_missing_file_is_named_with_the_guide(tmp_path):
  message = 'config.target_sets.x: the file of class names .*gone.tsv does not exist; see docs/guides/benchmarks.md'
  with pytest.raises(FileNotFoundError, match=message):
    class_names.read_entries('file:gone.tsv', tmp_path, 'target_sets.x')
