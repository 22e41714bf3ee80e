"""Text-classification templates: strings that place the texts of an example around an answer slot."""

import re
import string
from collections.abc import Mapping, Sequence

from uni_moe_jax.data.pipeline.tokenizer import Tokenizer
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_PART = re.compile(r'(<spe>|<eot>|\{\w*\})')


def template_columns(template: str) -> list[str]:
  """Returns the columns that a template names, in order: '{name} in {face}' → ['name', 'face']."""
  return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None))


def fill_template(
    tokenizer: Tokenizer, template: str, texts: Mapping[str, Sequence[int]], length: int) -> tuple[list[int], int]:
  """Fills a template such as '{a} <eot> it is <spe> . <eot>' or '{a} <eot> <spe> , {b} <eot>'.

  Texts are truncated before they are inserted, so the fixed words and the slot are always present. The last of n fields
  gets at most 1/n of the tokens that are left, and so on: of two, the second gets at most half, the first the rest. So
  name the longer text first.

  Args:
    template: Fixed words, the markers `<spe>` (once) and `<eot>` (at least at the end), and fields in braces.
    texts: Field → token ids of a text, without special tokens.

  Returns:
    (ids, slot): at most `length` ids, the last of them `eot`, and the index of `spe` in them.

  Raises:
    UsageError: The template is malformed or names a field that `texts` lacks, or `length` is too small for it.
  """
  parts = [part for part in map(str.strip, _PART.split(template)) if part]
  if (num_slots := parts.count('<spe>')) != 1:
    raise UsageError(f'Template {template!r} has {num_slots} slots <spe>; it needs exactly one.')
  if parts[-1] != '<eot>':
    raise UsageError(f'Template {template!r} must end in <eot>.')
  special = {'<spe>': [tokenizer.spe], '<eot>': [tokenizer.eot]}
  fields, ids = [], []
  for index, part in enumerate(parts):
    if part[0] == '{' and _PART.fullmatch(part):
      fields.append(index)
      ids.append(())
    elif '{' in part or '}' in part:
      raise UsageError(f'Template {template!r} has a brace that encloses no field name; fields look like {{a}}.')
    else:
      ids.append(special.get(part) or tokenizer.encode(part))
  free = length - sum(map(len, ids))
  if free < len(fields):
    raise UsageError(f'length {length} is too small for template {template!r}: it needs at least '
                     f'{length - free + len(fields)}.')
  for remaining in range(len(fields), 0, -1):
    index = fields[remaining - 1]
    field = parts[index][1:-1]
    if field not in texts:
      raise UsageError(f'Template {template!r} names the field {field!r}, which the texts lack; '
                       f'{nearest(field, texts)}.')
    ids[index] = texts[field][:free // remaining]
    free -= len(ids[index])
  slot = sum(map(len, ids[:parts.index('<spe>')]))
  return [token for part in ids for token in part], slot
