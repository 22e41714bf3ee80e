"""MkDocs hook: fills reference/config.md with every config field, from the schema."""

import dataclasses
import typing

from uni_moe_jax.config import fields
from uni_moe_jax.config.schema import Config

_PAGE = 'reference/config.md'
_HEAD = ('| field | type | default | meaning |', '| --- | --- | --- | --- |')
_LONGEST = 40  # characters of a published value that the table shows


def on_page_markdown(markdown: str, page, **_) -> str:
  """Append the tables to the page of the config reference; other pages stay as they are."""
  return f'{markdown}\n\n{tables()}' if page.file.src_uri == _PAGE else markdown


def tables() -> str:
  """One Markdown table per section, in the order of the schema."""
  hints = typing.get_type_hints(Config)
  scalars, sections = [], []
  for f in dataclasses.fields(Config):
    if dataclasses.is_dataclass(hints[f.name]):
      sections.append(_section(f'`{f.name}`', hints[f.name]))
    elif 'entry' not in f.metadata:
      scalars.append(_row(f, hints[f.name]))
    elif f.metadata['entry'] is None:
      sections.append(f'## `{f.name}`\n\n{f.metadata["doc"]}')
    else:
      sections.append(_section(f'`{f.name}.NAME`', f.metadata['entry']))
  return '\n\n'.join(['\n'.join([*_HEAD, *scalars]), *sections])


def _section(title: str, cls: type) -> str:
  hints = typing.get_type_hints(cls)
  rows = [_row(f, hints[f.name]) for f in dataclasses.fields(cls)]
  return '\n'.join([f'## {title}', '', cls.__doc__.partition('\n')[0], '', *_HEAD, *rows])


def _row(f: dataclasses.Field, hint: typing.Any) -> str:
  m = f.metadata
  notes = []
  if 'entry' not in m:
    notes.append(fields.bounds(m))
    notes.append(m['choices'] and 'one of ' + ', '.join(f'`{c}`' for c in m['choices'] if c))
    if m['published'] is not fields.REQUIRED:
      published = repr(m['published'])
      notes.append(f'published: `{published}`' if len(published) < _LONGEST else 'the published value differs')
  notes = [note for note in notes if note]
  default = '' if f.default is fields.REQUIRED else f'`{f.default!r}`'
  plain_class = isinstance(hint, type) and not typing.get_args(hint)
  type_name = hint.__name__ if plain_class else str(hint).replace('typing.', '')
  meaning = m['doc'] + (f' ({"; ".join(notes)})' if notes else '')
  cells = (x.replace('|', '\\|').replace('\n', ' ') for x in (f'`{f.name}`', f'`{type_name}`', default, meaning))
  return f'| {" | ".join(cells)} |'
