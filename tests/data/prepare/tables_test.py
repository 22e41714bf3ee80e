"""Quotes in tables: legal ones, and those that lack the second one."""

import pytest

from uni_moe_jax.data.formats import input_shards
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.utils.errors import UsageError

_WRONG = 'another number of fields than in the first line'


def _rows(path, content):
  """(number of the line, text or why it is skipped) of each row of a table."""
  path.write_text(content, newline='')
  rows = [row for shard in input_shards.plan(path) for row in input_shards.read(shard)]
  return [(int(row.location.rpartition(':')[2]), row.texts.get('text') or row.skipped) for row in rows]


def _sentences(delimiter, **lines):
  """A table of a thousand rows, some of which are replaced; row i is line i + 1."""
  rows = [lines.get(f'row_{i}', f'sentence {i}{delimiter}{i % 2}') for i in range(1, 1001)]
  return f'text{delimiter}label\n' + ''.join(f'{row}\n' for row in rows)


def _expected(**others):
  rows = [(i + 1, others.get(f'row_{i}', f'sentence {i}')) for i in range(1, 1001)]
  return [row for row in rows if row[1]]


def test_a_quote_without_a_second_one_costs_its_own_row(tmp_path):
  content = _sentences(',', row_100='"the end,1', row_1000='1,"')
  assert _rows(tmp_path / 'x.csv', content) == _expected(row_100=_WRONG, row_1000=_WRONG)
  # A quote within a later row closes it, but what follows is no end of a field.
  content = _sentences(',', row_100='"the end,1', row_500='"one, two",1', row_900='so "he" said,1')
  assert _rows(tmp_path / 'x.csv', content) == _expected(row_100=_WRONG, row_500='one, two', row_900='so "he" said')
  # It closes it where a field ends: no text has one comma in each of 401 lines.
  content = _sentences(',', row_100='"the end,1', row_500='so he said",1')
  assert _rows(tmp_path / 'x.csv', content) == _expected(row_100=_WRONG, row_500='so he said"')
  # Or it makes another number of fields.
  content = _sentences(',', row_100='1,"the end', row_103='so he said",1')
  assert _rows(tmp_path / 'x.csv', content) == _expected(row_100=_WRONG, row_103='so he said"')


def test_rows_that_a_quote_damages_count_for_max_corrupt_fraction(tmp_path):
  content = _sentences(',', **{f'row_{i}': '"the end,1' for i in range(1, 1000, 10)})
  (tmp_path / 'x.csv').write_text(content)
  with pytest.raises(UsageError, match='100 of 1000 rows'):
    prepare.prepare(tmp_path / 'x.csv', tmp_path / 'data', 'x', max_corrupt_fraction=0.09)
  summary = prepare.prepare(tmp_path / 'x.csv', tmp_path / 'data', 'x', max_corrupt_fraction=0.11)
  assert summary['skipped'][_WRONG]['count'] == 100 and sum(summary['splits'].values()) == 900


def test_a_quote_of_tsv_is_a_letter_where_it_makes_no_field(tmp_path):
  content = _sentences('\t', row_100='"the end\t1', row_900='"Yes" he said\t0', row_1000='5"\t"1')
  assert _rows(tmp_path / 'x.tsv', content) == _expected(row_100='"the end', row_900='"Yes" he said', row_1000='5"')
  # Quotes around two sentences: each line is a row.
  content = _sentences('\t', row_100='"the end\t1', row_101='of it"\t0')
  assert _rows(tmp_path / 'x.tsv', content) == _expected(row_100='"the end', row_101='of it"')
  assert _rows(tmp_path / 'x.tsv', _sentences('\t', row_7='"7')) == _expected(row_7=_WRONG)


@pytest.mark.parametrize('suffix, delimiter', [('csv', ','), ('tsv', '\t')])
def test_legal_quotes_may_contain_lines_delimiters_and_quotes(tmp_path, suffix, delimiter):
  text = '"a ""b""' + delimiter + '\n\nc\r\n' + 'many\n' * 2000 + '"'
  rows = _rows(tmp_path / f'x.{suffix}', f'text{delimiter}label\n{text}{delimiter}1\nnext{delimiter}"0"\n')
  a = ' '.join(f'a "b"{delimiter}'.split())
  assert rows == [(2, f'{a} c' + ' many' * 2000), (2006, 'next')]
  rows = _rows(tmp_path / f'x.{suffix}', f'label{delimiter}text\n1{delimiter}"one\ntwo"\n0{delimiter}three\n')
  assert rows == [(2, 'one two'), (4, 'three')]
  letter = 'text,label\n"Dear Ann,\nthanks, it came\nyours Bob",1\n'  # each line has one comma
  assert _rows(tmp_path / 'x.csv', letter) == [(2, 'Dear Ann, thanks, it came yours Bob')]
  assert _rows(tmp_path / f'x.{suffix}', 'text\n"one\ntwo"\nthree\n') == [(2, 'one two'), (4, 'three')]


def test_text_after_a_closed_quote_of_csv_stays_in_its_field(tmp_path):
  assert _rows(tmp_path / 'x.csv', 'text,label\n"Yes" he said,1\n"No",0\n') == [(2, 'Yes he said'), (3, 'No')]


@pytest.mark.parametrize('num_lines, is_damaged', [(10_000, False), (10_001, True)])
def test_a_record_of_more_than_ten_thousand_lines_is_damaged(tmp_path, num_lines, is_damaged):
  rows = _rows(tmp_path / 'x.csv', 'text,label\n"' + 'word\n' * (num_lines - 1) + 'end",1\nlast,0\n')
  assert rows[0] == ((2, _WRONG) if is_damaged else (2, 'word ' * (num_lines - 1) + 'end'))
  assert rows[-1] == (num_lines + 2, 'last') and len(rows) == (num_lines + 1 if is_damaged else 2)


@pytest.mark.parametrize('suffix, delimiter', [('csv', ','), ('tsv', '\t')])
def test_damaged_rows_do_not_depend_on_the_size_of_shards(tmp_path, monkeypatch, suffix, delimiter):
  lines = ['"open,1', 'a,0', '"b" c,1', '', '"d', 'e",0', '1,"f', 'g",h', '"i"', 'j"",1', '"k,1']
  content = 'text,label\n' + '\n'.join(lines * 3)
  rows = _rows(tmp_path / f'x.{suffix}', content.replace(',', delimiter))
  assert len(rows) > 15 and len({text for _, text in rows}) > 3
  for size in (1, 2, 3, 4):
    monkeypatch.setattr(input_shards, '_NUM_ROWS', size)
    assert len(list(input_shards.plan(tmp_path / f'x.{suffix}'))) > 3
    assert _rows(tmp_path / f'x.{suffix}', content.replace(',', delimiter)) == rows


_FIELDS = 'the first line of a table must name fields such as text, .*separated by commas, in UTF-8 .*it names'


@pytest.mark.parametrize('content, names', [
    (b'', 'none'), (b'text;label\none;1\n', "'text;label'"), (b'title,price\none,1\n', "'title', 'price'"),
    ('text,label\none,1\n'.encode('utf-16'), r"'.*t\\x00e.*"), (b'text,label\rone,1\r', 'none')])
def test_the_error_for_a_table_whose_first_line_has_no_field_gives_what_it_names(tmp_path, content, names):
  (tmp_path / 'x.csv').write_bytes(content)
  with pytest.raises(UsageError, match=f'{_FIELDS} {names}'):
    prepare.prepare(tmp_path / 'x.csv', tmp_path / 'data', 'x')


@pytest.mark.parametrize('name', ['x.csv', 'x.txt', 'x.jsonl'])
def test_an_input_without_rows_is_refused_as_such(tmp_path, name):
  (tmp_path / name).write_text('text,label\n' if name == 'x.csv' else '\n')
  with pytest.raises(UsageError, match=f'{name} has no rows'):
    prepare.prepare(tmp_path / name, tmp_path / 'data', 'x')
