"""Text-classification templates: strings that place the texts of a sample around an answer slot."""

import difflib
import re
import string
from collections.abc import Mapping, Sequence

from uni_moe_jax.data.pipeline.tokenizer import Tokenizer
from uni_moe_jax.utils.errors import UsageError

_PART = re.compile(r'(<spe>|<eot>|\{\w*\})')


def columns_of(template: str) -> list[str]:
  """Columns that a template names, each once, in order: '{name} in {face}' → ['name', 'face']."""
  return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None))


def fill_template(
    tokenizer: Tokenizer, template: str, texts: Mapping[str, Sequence[int]], length: int,
) -> tuple[list[int], int]:
  """Fills a template such as '{a} <eot> it is <spe> . <eot>' or '{a} <eot> <spe> , {b} <eot>'.

  Texts are cut before they are filled in, so that the fixed words and the slot are always there.
  The last of n fields gets at most 1/n of the room, and so on: of two, the second at most half,
  then the first the rest. So name the longer text first.

  Args:
    tokenizer: makes ids of the fixed words.
    template: fixed words, the markers `<spe>` (once) and `<eot>` (at least at the end), and fields
      in braces.
    texts: field -> ids of a text, without special tokens.
    length: tokens that the result may have.

  Returns:
    (ids, slot): at most `length` ids, the last of them `eot`, and the index of `spe` in them.

  Raises:
    UsageError: the template has not exactly one slot, does not end in `<eot>`, has a field that
      `texts` lacks or a brace that is no field; or `length` has no room for one token per field.
  """
  parts = [part.strip() for part in _PART.split(template)]
  parts = [part for part in parts if part]
  if (slots := parts.count('<spe>')) != 1:
    raise UsageError(f'Template {template!r} has {slots} slots <spe>; it needs exactly one.')
  if parts[-1] != '<eot>':
    raise UsageError(f'Template {template!r} must end in <eot>.')
  fields = [place for place, part in enumerate(parts) if _PART.fullmatch(part) and part[0] == '{']
  ids = [
      () if place in fields else _fixed(tokenizer, template, part)
      for place, part in enumerate(parts)
  ]
  room = length - sum(map(len, ids))
  if room < len(fields):
    raise UsageError(
        f'length {length} is too small for template {template!r}: '
        f'it needs at least {length - room + len(fields)}.')
  for remaining in range(len(fields), 0, -1):
    place = fields[remaining - 1]
    ids[place] = _text(template, parts[place][1:-1], texts)[:room // remaining]
    room -= len(ids[place])
  slot = sum(map(len, ids[:parts.index('<spe>')]))
  return [token for part in ids for token in part], slot


def _fixed(tokenizer: Tokenizer, template: str, part: str) -> Sequence[int]:
  if part == '<spe>':
    return [tokenizer.spe]
  if part == '<eot>':
    return [tokenizer.eot]
  if '{' in part or '}' in part:
    raise UsageError(
        f'Template {template!r} has a brace that encloses no field name; fields look like {{a}}.')
  return tokenizer.encode(part)


def _text(template: str, field: str, texts: Mapping[str, Sequence[int]]) -> Sequence[int]:
  if field not in texts:
    near = difflib.get_close_matches(field, texts, n=3, cutoff=0) or ['none']
    raise UsageError(
        f'Template {template!r} names the field {field!r}, which the texts lack; '
        f'nearest: {", ".join(near)}.')
  return texts[field]
