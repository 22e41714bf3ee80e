"""Templates over columns: fields, filters, literal braces and errors."""

import pytest

from uni_moe_jax.utils import templates
from uni_moe_jax.utils.errors import UsageError

_ROW = {'a': 'cat', 'a.b': 'dog', 'a:b': 'cow', 'a-b': 'ant', 'a b': 'bee', 'captions/text': 'elk', '0': 'fox',
        'a!r': 'yak', 'a[0]': 'emu', 'ä': 'owl'}


@pytest.mark.parametrize('column', list(_ROW))
def test_any_text_without_braces_and_bars_is_a_column(column):
  template = f'a {{{column}}}, {{{column}|no_stop}}.'
  assert templates.columns(template) == [column]
  assert templates.fill(template, _ROW) == f'a {_ROW[column]}, {_ROW[column]}.'


@pytest.mark.parametrize('template, filled', [
    ('', ''), ('an image', 'an image'), ('{a}{a.b}', 'catdog'), ('{{x}}', '{x}'), ('{{{a}}}', '{cat}'),
    ('{a}}}{{', 'cat}{'), ('{a|no_stop}|', 'cat|')])
def test_doubled_braces_are_literal(template, filled):
  assert templates.fill(template, _ROW) == filled


@pytest.mark.parametrize('text, kept', [
    ('it rained.', 'it rained'), ('it rained . ', 'it rained '), ('in 1990.', 'in 1990'), ('so schön.', 'so schön'),
    ('e.g. this', 'e.g. this'), ('etc...', 'etc...'), ('(so).', '(so).'), ('why?.', 'why?.'), ('snake_.', 'snake_.'),
    ('.', '.'), ('', '')])
def test_the_filter_no_stop_removes_the_period_that_ends_a_sentence(text, kept):
  assert templates.fill('{a|no_stop}', {'a': text}) == kept
  assert templates.fill('{a}', {'a': text}) == text


@pytest.mark.parametrize('template, message', [
    ('{a', r"template '{a': the brace at position 1 is not closed; write '{{' for a brace\."),
    ('{a{b}', 'the brace at position 1 is not closed'),
    ('{a} }', "the brace at position 5 closes no field; write '}}' for a brace"),
    ('an {} image', 'the brace at position 4 begins a field without a column; write {column}'),
    ('{|no_stop}', 'without a column'),
    ('{a|nostop}', "filter 'nostop' is unknown; did you mean 'no_stop'"),
    ('{a|}', "filter '' is unknown"),
    ('{a|no_stop|no_stop}', 'filter .* is unknown')])
def test_a_malformed_template_is_reported_with_the_position_and_the_fix(template, message):
  with pytest.raises(UsageError, match=message):
    templates.parse(template)


def test_a_column_that_the_record_lacks_is_a_key_error():
  with pytest.raises(KeyError, match='b'):
    templates.fill('{b}', {'a': 'cat'})
