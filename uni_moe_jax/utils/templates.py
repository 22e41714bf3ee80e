"""Templates over the columns of a record: fixed text with fields `{column}` or `{column|filter}`.

A column is any text without braces and bars, such as 'shot.at', 'a-b' or 'captions/text'; `{{` and `}}` are literal
braces. Nothing in braces is evaluated, unlike in Python's format strings. The filter `no_stop` removes the period that
ends a sentence, so that a template can place its own.
"""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_PART = re.compile(r'\{\{|\}\}|\{([^{}|]*)(?:\|([^{}]*))?\}|[{}]')
# Only after a letter, a digit or a blank: tokenizers split no period from other signs ('etc...', '(so).').
_FINAL_STOP = re.compile(r'(?<=[^\W_]|\s)\.\s*$')
_FILTERS = {'': lambda text: text, 'no_stop': lambda text: _FINAL_STOP.sub('', text)}


class Field(NamedTuple):
  """A field of a template."""
  column: str
  filter: str = ''

  def value(self, row: Mapping[str, str]) -> str:
    """Return the filtered text of the column in a record."""
    return _FILTERS[self.filter](row[self.column])


@functools.lru_cache(maxsize=1024)
def parse(template: str) -> tuple[str | Field, ...]:
  """Return the literal texts and fields of a template, in order. Raise UsageError for a malformed one."""
  parts, start = [], 0

  def error(position: int, problem: str) -> UsageError:
    return UsageError(f'template {template!r}: the brace at position {position + 1} {problem}')

  for match in _PART.finditer(template):
    parts.append(template[start:match.start()])
    start, (column, name) = match.end(), match.groups()
    if match[0] in ('{{', '}}'):
      parts.append(match[0][0])
    elif column is None:
      raise error(match.start(), "is not closed; write '{{' for a brace." if match[0] == '{' else
                  "closes no field; write '}}' for a brace.")
    elif not column:
      raise error(match.start(), 'begins a field without a column; write {column}.')
    elif name is not None and (not name or name not in _FILTERS):
      raise UsageError(f'template {template!r}: filter {name!r} is unknown; {nearest(name, filter(None, _FILTERS))}.')
    else:
      parts.append(Field(column, name or ''))
  return tuple(part for part in (*parts, template[start:]) if part)


def columns(template: str) -> list[str]:
  """Return the columns that a template names, in order: '{name} in {face}' → ['name', 'face']."""
  return list(dict.fromkeys(part.column for part in parse(template) if isinstance(part, Field)))


def fill(template: str, row: Mapping[str, str]) -> str:
  """Return a template with its fields replaced by a record's texts. Raise KeyError for a column without one."""
  return ''.join(part.value(row) if isinstance(part, Field) else part for part in parse(template))
