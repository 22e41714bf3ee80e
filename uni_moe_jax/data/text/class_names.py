"""Names and synonyms of classes: the entries of target sets, and files that list them.

A file of class names has one line per class, in order: the source's key of the class, a tab, the class name, then
synonyms separated by '|'.

  n01440764<tab>tench|Tinca tinca
  n01443537<tab>goldfish|Carassius auratus

A line without a tab is both key and name. Empty lines and lines that start with '#' are ignored.
"""

import os
from collections.abc import Sequence

from uni_moe_jax.data.shards.mirror import Mirror
from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import MissingFileError, UsageError

FILE_PREFIX = 'file:'
Entry = tuple[str, tuple[str, ...]]  # the source's key of a class; its name, then its synonyms


def parse_entries(values: Sequence[str | tuple[str, ...]], field: str) -> tuple[Entry, ...]:
  """Parses entries of a set: a string is both key and name, a tuple is (key, name, synonyms …).

  Raises UsageError for an entry without a name and for two with the same key.
  """
  entries = {}
  for value in values:
    key, *names = (value, value) if isinstance(value, str) else value
    if not names or not all(names):
      raise UsageError(f'config.{field}: entry {key!r} has no name or an empty one; give (key, name, synonyms …).')
    if key in entries:
      raise UsageError(f'config.{field}: entry {key!r} occurs twice.')
    entries[key] = tuple(names)
  return tuple(entries.items())


def read_entries(values: str, directory: str | os.PathLike[str], field: str) -> tuple[Entry, ...]:
  """Reads the entries of 'file:PATH', relative to the data directory. Raises MissingFileError, UsageError."""
  name = os.path.expanduser(values.removeprefix(FILE_PREFIX))
  path = storage.path(name if storage.is_remote(name) else storage.path(directory) / name)
  # An absolute path after the address of a bucket would be a file of this machine, which must stay as it is.
  if isinstance(directory, Mirror) and not os.path.isabs(name):
    directory.fetch_unlisted(name)
  if not path.is_file():
    raise MissingFileError(f'config.{field}: the file of class names {path} does not exist; see '
                           'docs/guides/benchmarks.md for how to make it.')
  entries = []
  for line in map(str.strip, path.read_text(encoding='utf-8-sig').splitlines()):
    if line and not line.startswith('#'):
      key, tab, names = line.partition('\t')
      entries.append((key, *(n.strip() for n in names.split('|'))) if tab else key)
  return parse_entries(entries, field)
