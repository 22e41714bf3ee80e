"""Names and synonyms of classes: the entries of target sets, and files that list them.

A file of class names has one line per class, in order: the source's key of the class, a tab, the class name, then
synonyms separated by '|'.

  n01440764<tab>tench|Tinca tinca
  n01443537<tab>goldfish|Carassius auratus

A line without a tab is both key and name. Empty lines and lines that start with '#' are ignored.
"""

import os
import pathlib
from collections.abc import Sequence

from uni_moe_jax.utils.errors import MissingFileError, UsageError

FILE_PREFIX = 'file:'
Entry = tuple[str, tuple[str, ...]]  # the source's key of a class; its name, then its synonyms


def parse_entries(values: Sequence[str | tuple[str, ...]], field: str) -> tuple[Entry, ...]:
  """Parses entries of a set: a string is both key and name, a tuple is (key, name, synonyms …).

  Raises:
    UsageError: A tuple has no name, or two entries have the same key.
  """
  entries = tuple((v, (v,)) if isinstance(v, str) else (v[0], tuple(v[1:])) for v in values)
  keys = set()
  for key, names in entries:
    if not names or not all(names):
      raise UsageError(f'config.{field}: entry {key!r} has no name or an empty one; give (key, name, synonyms …).')
    if key in keys:
      raise UsageError(f'config.{field}: entry {key!r} occurs twice.')
    keys.add(key)
  return entries


def read_entries(values: str, directory: str | os.PathLike[str], field: str) -> tuple[Entry, ...]:
  """Reads the entries of 'file:PATH'; PATH is relative to the data directory.

  Raises:
    MissingFileError: The file does not exist.
    UsageError: See `parse_entries`.
  """
  path = pathlib.Path(os.path.expanduser(directory)) / values.removeprefix(FILE_PREFIX)
  if not path.is_file():
    raise MissingFileError(f'config.{field}: the file of class names {path} does not exist; see '
                           'docs/guides/benchmarks.md for how to make it.')
  entries = []
  for line in map(str.strip, path.read_text(encoding='utf-8').splitlines()):
    if line and not line.startswith('#'):
      key, tab, names = line.partition('\t')
      entries.append((key, *(n.strip() for n in names.split('|'))) if tab else key)
  return parse_entries(entries, field)
