"""The embedded text: paragraphs, the package each is from, and pairs of a summary and a paragraph.

No paragraph occurs twice, also not with other numbers, punctuation or rare names; all paragraphs of
a file are in one split, and what was pasted between files is no test: what a test asks cannot have
been learnt by heart.
"""

import collections
import hashlib
import itertools
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from uni_moe_jax.data.embedded import docstring_corpus, prose_filter
from uni_moe_jax.data.pipeline import npz_records
from uni_moe_jax.data.pipeline.records import Records

SPLITS = ('train', 'validation', 'test')
# The ten largest sources.
PACKAGES = (
    'fonttools', 'jax', 'keras', 'matplotlib', 'numpy', 'orbax', 'python', 'scipy', 'sklearn',
    'tensorflow',
)
ANSWERS = ('no', 'yes')  # does the paragraph continue the summary?

_TEST_SHARE, _VALIDATION_SHARE = 0.08, 0.04  # of the files
_COMMON = 50  # paragraphs that a word must occur in, to count when near-duplicates are compared
_ENOUGH_COMMON_WORDS = 7  # with fewer, the rare ones are compared too
_RUN = 5  # words that make a coincidence unlikely
_PAIRS_PER_DOCUMENT = 4
_TELLING_ITEM = 20  # words that the description of an argument needs to differ from any other
# The number changes with the content: an older folder is not read, but made anew.
_FOLDER = 'texts-1'


class Entry(NamedTuple):
  """A paragraph with its origin.

  Attributes:
    source: a source of `harvest`.
    unit: what a split must not divide.
    document: index of its document; paragraphs of a document are neighbours.
    role: a role of `prose`.
    text: the paragraph.
  """
  source: str
  unit: str
  document: int
  role: str
  text: str

  @property
  def is_paragraph(self) -> bool:
    """False for a short summary, which only asks what follows it."""
    return len(self.text.split()) >= prose_filter.MIN_WORDS


def split_of(unit: str) -> str:
  """The split of a unit, from its name alone."""
  place = int.from_bytes(hashlib.sha256(unit.encode()).digest()[:4], 'big') / 2**32
  if place < _TEST_SHARE:
    return 'test'
  return 'validation' if place < _TEST_SHARE + _VALIDATION_SHARE else 'train'


def entries(documents: Iterable[docstring_corpus.Document]) -> list[Entry]:
  """Paragraphs and short summaries of the documents, in order; of equal ones the first stays."""
  found = []
  for index, document in enumerate(documents):
    found += [
        Entry(document.source, document.unit, index, role, text)
        for text, role in prose_filter.paragraphs(document.text)
    ]
  return without_duplicates(without_duplicates(found, frozenset()), common_words(found))


def divide(found: Iterable[Entry]) -> dict[str, list[Entry]]:
  """Entries by split; outside train without those that repeat half of their wording from train."""
  parts = {split: [] for split in SPLITS}
  for entry in found:
    parts[split_of(entry.unit)].append(entry)
  learnt = {run for entry in parts['train'] for run in _runs(entry.text)}

  def is_new(entry: Entry) -> bool:
    runs = _runs(entry.text)
    return 2 * sum(run in learnt for run in runs) < max(len(runs), 1)

  for split in ('validation', 'test'):
    parts[split] = [entry for entry in parts[split] if is_new(entry)]
  return parts


def common_words(found: Sequence[Entry]) -> frozenset[str]:
  """Words that occur in at least `_COMMON` entries."""
  counts = collections.Counter(word for entry in found for word in set(_words(entry.text)))
  return frozenset(word for word, count in counts.items() if count >= _COMMON)


def without_duplicates(found: Sequence[Entry], common: frozenset[str]) -> list[Entry]:
  """Of entries with the same words, the first; beside enough `common` words others do not count.

  "Samples a Beta variable of the given shape and type." equals "Samples a Gumbel variable of …".
  """
  kept = {}
  for entry in found:
    words = _words(entry.text)
    shared = tuple(word for word in words if word in common)
    key = shared if len(shared) >= _ENOUGH_COMMON_WORDS else ('', *words)
    kept.setdefault(key, entry)
  return list(kept.values())


def _words(text: str) -> tuple[str, ...]:
  return tuple(re.findall('[a-z]+', text.lower()))


def _runs(text: str) -> list[str]:
  words = _words(text)
  return [' '.join(words[start:start + _RUN]) for start in range(len(words) - _RUN + 1)]


def pairs(found: Sequence[Entry]) -> list[tuple[str, str, str]]:
  """Balanced (summary, paragraph, answer) rows out of the entries of one split.

  The paragraphs that do not continue a summary are those that continue another one of the same
  source. So both answers have the same summaries and the same paragraphs: neither tells alone.
  """
  by_source = collections.defaultdict(list)
  for _, document in itertools.groupby(found, key=lambda entry: entry.document):
    first, *rest = document
    following = [
        entry for entry in rest
        if entry.role == prose_filter.BODY or (
            entry.role == prose_filter.ITEM and len(entry.text.split()) >= _TELLING_ITEM)
    ][:_PAIRS_PER_DOCUMENT]
    if first.role == prose_filter.SUMMARY and following and first.source != docstring_corpus.LICENCES:
      by_source[first.source].append((first.text, [entry.text for entry in following]))
  rows = []
  for source in sorted(by_source):
    # In hash order a neighbour is any document of the source, not the next function of the file.
    documents = sorted(
        by_source[source], key=lambda item: hashlib.sha256(item[0].encode()).digest())
    true = [(summary, text) for summary, texts in documents for text in texts]
    # Rotated by the size of the largest document, no paragraph stays with its own summary.
    shift = max(len(texts) for _, texts in documents)
    if 2 * shift > len(true):
      continue
    for place, (summary, text) in enumerate(true):
      rows += [(summary, text, 'yes'), (summary, true[(place + shift) % len(true)][1], 'no')]
  return rows


def build(directory: str | os.PathLike[str], report: Callable[[str], None] = print) -> None:
  """Makes paragraphs and pairs in `directory`, unless they are there; reports sizes and seconds.

  Raises:
    ModuleNotFoundError: a package that the text is read from is not installed.
  """
  folder = pathlib.Path(directory) / _FOLDER
  if folder.is_dir():
    return
  start = time.monotonic()
  found = entries(docstring_corpus.documents())
  parts = divide(found)
  with npz_records.atomic_folder(folder) as temporary:
    for kind in ('paragraphs', 'pairs'):
      (temporary / kind).mkdir()
    for split, part in parts.items():
      paragraphs = [entry for entry in part if entry.is_paragraph]
      packages = [entry.source if entry.source in PACKAGES else '' for entry in paragraphs]
      npz_records.save(temporary / 'paragraphs', split, {
          'text': np.array([entry.text for entry in paragraphs], str),
          'package': np.array(packages, str),
      }, {'package': PACKAGES})
      rows = pairs(part)
      npz_records.save(temporary / 'pairs', split, {
          name: np.array([row[place] for row in rows], str)
          for place, name in enumerate(('text_a', 'text_b', 'label'))
      }, {'label': ANSWERS})
      size = sum(len(entry.text.encode()) for entry in paragraphs) / 1e6
      report(
          f'texts: {split} has {len(paragraphs)} paragraphs ({size:.1f} MB) and {len(rows)} pairs')
  sources = len({entry.source for entry in found})
  report(f'texts: from {sources} sources; {time.monotonic() - start:.1f} s')


def load_paragraphs(directory: str | os.PathLike[str], split: str) -> Records:
  """One of SPLITS as Records: text, package ('' where it is not one of PACKAGES).

  Raises:
    MissingFileError: if `build` has not made them in `directory`.
    UsageError: if there is no such split.
  """
  return npz_records.load(pathlib.Path(directory) / _FOLDER / 'paragraphs', split, directory)


def load_pairs(directory: str | os.PathLike[str], split: str) -> Records:
  """One of SPLITS as Records: text_a (summary), text_b (paragraph), label ('yes': b continues a).

  Raises:
    MissingFileError: if `build` has not made them in `directory`.
    UsageError: if there is no such split.
  """
  return npz_records.load(pathlib.Path(directory) / _FOLDER / 'pairs', split, directory)
