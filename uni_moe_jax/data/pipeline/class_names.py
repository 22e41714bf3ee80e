"""Names and synonyms of classes: entries of target sets, and the files that hold them.

A file of class names has a line per class, in order: what the source calls the class, a tab, its name, and synonyms after '|'.

  n01440764<tab>tench|Tinca tinca
  n01443537<tab>goldfish|Carassius auratus

Without a tab the line is both. Empty lines and lines that begin with '#' do not count.
"""

import os
import pathlib
from collections.abc import Sequence

from uni_moe_jax.utils.errors import MissingFileError, UsageError

FILE = 'file:'
Entry = tuple[str, tuple[str, ...]]  # what the source calls a class; its name, then its synonyms


def entries(values: Sequence[str | tuple[str, ...]], field: str) -> tuple[Entry, ...]:
  """Entries of a set: a text is key and name at once, a tuple is (key, name, synonyms …).

  Raises:
    UsageError: a tuple without a name, or two entries with one key.
  """
  out = tuple((v, (v,)) if isinstance(v, str) else (v[0], tuple(v[1:])) for v in values)
  for key, names in out:
    if not names or not all(names):
      raise UsageError(f'config.{field}: entry {key!r} has no name or an empty one; give (key, name, synonyms …).')
  keys = [key for key, _ in out]
  if len(set(keys)) < len(keys):
    raise UsageError(f'config.{field}: entry {next(k for k in keys if keys.count(k) > 1)!r} occurs twice.')
  return out


def read(values: str, directory: str | os.PathLike[str], field: str) -> tuple[Entry, ...]:
  """Entries of 'file:PATH', relative to the data directory.

  Raises:
    MissingFileError: it is not there. UsageError: as of `entries`.
  """
  path = pathlib.Path(os.path.expanduser(directory)) / values.removeprefix(FILE)
  if not path.is_file():
    raise MissingFileError(f'config.{field}: the file of class names {path} is not there; docs/guides/benchmarks.md says how to make it.')
  lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
  found = []
  for line in lines:
    if line and not line.startswith('#'):
      key, tab, names = line.partition('\t')
      found.append((key, *(n.strip() for n in names.split('|'))) if tab else key)
  return entries(found, field)
