"""MkDocs hook: fills reference/config.md with every config field, from the schema."""

import dataclasses
import typing

from uni_moe_jax.config.schema import Config

_PAGE = 'reference/config.md'
_BOUNDS = (('at_least', '≥ {}'), ('above', '> {}'), ('at_most', '≤ {}'), ('below', '< {}'))
_NONE = dataclasses.MISSING


def on_page_markdown(markdown: str, page, **_) -> str:
  """Appends the tables to the page of the config reference; other pages stay as they are."""
  return f'{markdown}\n\n{tables()}' if page.file.src_uri == _PAGE else markdown


def tables() -> str:
  """One Markdown table per section, in the order of the schema."""
  hints = typing.get_type_hints(Config)
  scalars, sections = [], []
  for field in dataclasses.fields(Config):
    entry = field.metadata.get('entry', _NONE)
    if dataclasses.is_dataclass(hints[field.name]):
      sections.append(_section(f'`{field.name}`', hints[field.name]))
    elif entry is _NONE:
      scalars.append(_row(field.name, field, hints[field.name]))
    elif entry is None or not dataclasses.is_dataclass(entry):
      sections.append(f'## `{field.name}`\n\n{field.metadata["doc"]}')
    else:
      sections.append(_section(f'`{field.name}.NAME`', entry))
  return '\n\n'.join(['\n'.join([*_HEAD, *scalars]), *sections])


_HEAD = ('| field | type | default | meaning |', '| --- | --- | --- | --- |')


def _section(title: str, cls: type) -> str:
  hints = typing.get_type_hints(cls)
  rows = [_row(f.name, f, hints[f.name]) for f in dataclasses.fields(cls)]
  return '\n'.join([f'## {title}', '', cls.__doc__.partition('\n')[0], '', *_HEAD, *rows])


def _row(name: str, field: dataclasses.Field, hint) -> str:
  m = field.metadata
  bounds = [text.format(m[key]) for key, text in _BOUNDS if m.get(key) is not None]
  if m.get('choices'):
    bounds.append('one of ' + ', '.join(f'`{c}`' for c in m['choices'] if c))
  if m.get('published', _NONE) is not _NONE:
    bounds.append(f'published: `{m["published"]!r}`' if len(repr(m['published'])) < 40 else 'the published value differs')
  default = '' if field.default is _NONE else f'`{field.default!r}`'
  type_name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace('typing.', '')
  meaning = m.get('doc', '') + (f' ({"; ".join(bounds)})' if bounds else '')
  return '| ' + ' | '.join(x.replace('|', '\\|').replace('\n', ' ') for x in (f'`{name}`', f'`{type_name}`', default, meaning)) + ' |'
