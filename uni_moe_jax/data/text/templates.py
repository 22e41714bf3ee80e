"""Text-classification templates: strings that place the texts of an example around an answer slot."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.utils import templates
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_MARKER = re.compile('(<spe>|<eot>)')
CHARS_PER_TOKEN = 12  # more than two tokens of most texts


class FilledTemplate(NamedTuple):
  """A template with the texts of an example."""
  ids: list[int]
  slot: int  # index of `spe` in the ids
  in_field: list[bool]  # of every id: whether it comes from a text


def template_parts(template: str) -> list[str | templates.Field]:
  """Returns the fixed words, the markers `<spe>` and `<eot>`, and the fields of a template, in order."""
  parts = []
  for part in templates.parse(template):
    parts += [part] if isinstance(part, templates.Field) else filter(None, map(str.strip, _MARKER.split(part)))
  return parts


def fill_template(
    tokenizer: Tokenizer, template: str, row: Mapping[str, str], length: int) -> FilledTemplate:
  """Fills a template such as '{a} <eot> it is <spe> . <eot>' or '{a} <eot> <spe> , {b} <eot>'.

  Texts are truncated before they are inserted, so the fixed words and the slot are always present. The last of n fields
  gets at most 1/n of the tokens that are left, and so on: of two, the second gets at most half, the first the rest. So
  name the longer text first.

  Args:
    template: Fixed words, the markers `<spe>` (once) and `<eot>` (at least at the end), and fields; see
      `utils.templates`.
    row: Texts by column.

  Returns:
    At most `length` ids, the last of them `eot`.

  Raises:
    UsageError: The template is malformed or names a column that `row` lacks, or `length` is too small for it.
  """
  parts = template_parts(template)
  if (num_slots := parts.count('<spe>')) != 1:
    raise UsageError(f'Template {template!r} has {num_slots} slots <spe>; it needs exactly one.')
  if parts[-1] != '<eot>':
    raise UsageError(f'Template {template!r} must end in <eot>.')
  special = {'<spe>': [tokenizer.spe], '<eot>': [tokenizer.eot]}
  fields = [i for i, part in enumerate(parts) if isinstance(part, templates.Field)]
  ids = [() if i in fields else special.get(part) or tokenizer.encode(part) for i, part in enumerate(parts)]
  free = length - sum(map(len, ids))
  if free < len(fields):
    raise UsageError(f'length {length} is too small for template {template!r}: it needs at least '
                     f'{length - free + len(fields)}.')
  for remaining in range(len(fields), 0, -1):
    index = fields[remaining - 1]
    if (column := parts[index].column) not in row:
      raise UsageError(f'Template {template!r} names the column {column!r}, which the record lacks; '
                       f'{nearest(column, row)}.')
    ids[index] = first_tokens(tokenizer, parts[index].value(row), free // remaining)
    free -= len(ids[index])
  slot = sum(map(len, ids[:parts.index('<spe>')]))
  in_field = [i in fields for i, part in enumerate(ids) for _ in part]
  return FilledTemplate([token for part in ids for token in part], slot, in_field)


def first_tokens(tokenizer: Tokenizer, text: str, number: int) -> list[int]:
  """The first ids of a text. Of one that may be a document only a part is tokenized."""
  size = CHARS_PER_TOKEN * number
  while size < len(text):
    if len(ids := tokenizer.encode(text[:size])) >= 2 * number:  # the last ones may differ from those of the text
      return ids[:number]
    size *= 4
  return tokenizer.encode(text)[:number]
