"""Text datasets from docstrings: paragraphs and their packages, pairs of a summary and a paragraph.

No paragraph occurs twice, not even with other numbers, punctuation or rare names. All paragraphs of a file are in one
split, and text that was copied between files is left out of the test splits: no test can be solved by memorization.
"""

import collections
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from uni_moe_jax.data.embedded import docstring_corpus, prose_filter
from uni_moe_jax.data.shards.writer import Split

SPLITS = ('train', 'validation', 'test')
PACKAGES = (  # the ten largest sources
    'fonttools', 'jax', 'keras', 'matplotlib', 'numpy', 'orbax', 'python', 'scipy', 'sklearn', 'tensorflow')
ANSWERS = ('no', 'yes')  # does the paragraph continue the summary?

_TEST_FRACTION, _VALIDATION_FRACTION = 0.08, 0.04  # of the files
_COMMON_COUNT = 50  # entries that must contain a word for it to count as common
_MIN_COMMON_WORDS = 7  # an entry with fewer is compared by all its words
_NGRAM = 5  # words; a longer overlap is unlikely to be a coincidence
_PAIRS_PER_DOCUMENT = 4
_MIN_ITEM_WORDS = 20  # shorter descriptions of arguments are hardly distinguishable


class Entry(NamedTuple):
  """A paragraph with its origin."""
  source: str  # of `docstring_corpus`
  unit: str  # what a split must not divide
  document: int  # index of its document; paragraphs of a document are adjacent
  role: str  # of `prose_filter`
  text: str

  @property
  def is_paragraph(self) -> bool:
    """False for a short summary, which is used in pairs only."""
    return len(self.text.split()) >= prose_filter.MIN_WORDS


def split_of(unit: str) -> str:
  """Returns the split of a unit, a function of its name."""
  u = int.from_bytes(hashlib.sha256(unit.encode()).digest()[:4], 'big') / 2**32
  if u < _TEST_FRACTION:
    return 'test'
  return 'validation' if u < _TEST_FRACTION + _VALIDATION_FRACTION else 'train'


def extract_entries(documents: Iterable[docstring_corpus.Document]) -> list[Entry]:
  """Returns paragraphs and short summaries of the documents, in order, without duplicates."""
  entries = [Entry(document.source, document.unit, index, role, text)
             for index, document in enumerate(documents)
             for text, role in prose_filter.extract_paragraphs(document.text)]
  return drop_duplicates(drop_duplicates(entries, frozenset()), common_words(entries))


def split_entries(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
  """Returns entries by split, without those of test splits that share half of their wording with train."""
  splits = {split: [] for split in SPLITS}
  for entry in entries:
    splits[split_of(entry.unit)].append(entry)
  trained = {ngram for entry in splits['train'] for ngram in _ngrams(entry.text)}

  def is_new(entry: Entry) -> bool:
    ngrams = _ngrams(entry.text)
    return 2 * sum(ngram in trained for ngram in ngrams) < max(len(ngrams), 1)

  return {split: members if split == 'train' else list(filter(is_new, members)) for split, members in splits.items()}


def common_words(entries: Sequence[Entry]) -> frozenset[str]:
  """Returns the words that occur in at least `_COMMON_COUNT` entries."""
  counts = collections.Counter(word for entry in entries for word in set(_words(entry.text)))
  return frozenset(word for word, count in counts.items() if count >= _COMMON_COUNT)


def drop_duplicates(entries: Sequence[Entry], common: frozenset[str]) -> list[Entry]:
  """Keeps the first of entries with the same words.

  Only `common` words are compared if an entry has enough of them: "Samples a Beta variable of the given shape and
  type." equals "Samples a Gumbel variable of …".
  """
  kept = {}
  for entry in entries:
    words = _words(entry.text)
    shared = tuple(word for word in words if word in common)
    kept.setdefault(shared if len(shared) >= _MIN_COMMON_WORDS else ('', *words), entry)
  return list(kept.values())


def _words(text: str) -> tuple[str, ...]:
  return tuple(re.findall('[a-z]+', text.lower()))


def _ngrams(text: str) -> list[str]:
  words = _words(text)
  return [' '.join(words[start:start + _NGRAM]) for start in range(len(words) - _NGRAM + 1)]


def make_pairs(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
  """Makes balanced (summary, paragraph, answer) rows from the entries of one split.

  A paragraph that does not continue a summary continues another summary of the same source. So both answers have the
  same summaries and the same paragraphs: neither alone reveals the answer.
  """
  by_source = collections.defaultdict(list)
  for _, document in itertools.groupby(entries, key=lambda entry: entry.document):
    first, *rest = document
    following = [entry.text for entry in rest if entry.role == prose_filter.BODY or (
        entry.role == prose_filter.ITEM and len(entry.text.split()) >= _MIN_ITEM_WORDS)][:_PAIRS_PER_DOCUMENT]
    if first.role == prose_filter.SUMMARY and following and first.source != docstring_corpus.LICENSES:
      by_source[first.source].append((first.text, following))
  rows = []
  for source in sorted(by_source):
    # Hash order, so that an adjacent document is any document of the source, not the next function of the file.
    documents = sorted(by_source[source], key=lambda item: hashlib.sha256(item[0].encode()).digest())
    true = [(summary, text) for summary, texts in documents for text in texts]
    # After rotation by the size of the largest document, no paragraph is paired with its own summary.
    shift = max(len(texts) for _, texts in documents)
    if 2 * shift <= len(true):
      for i, (summary, text) in enumerate(true):
        rows += [(summary, text, 'yes'), (summary, true[(i + shift) % len(true)][1], 'no')]
  return rows


def read_entries(report: Callable[[str], None] = print) -> dict[str, list[Entry]]:
  """Returns the entries of the installed packages by split. Raises UsageError for packages that are missing."""
  entries = extract_entries(docstring_corpus.documents())
  report(f'texts: from {len({entry.source for entry in entries})} sources')
  return split_entries(entries)


def paragraphs(entries: Mapping[str, Sequence[Entry]], report: Callable[[str], None] = print) -> Iterator[Split]:
  """Yields SPLITS: text, package ('' if it is not one of PACKAGES)."""
  for split, members in entries.items():
    kept = [entry for entry in members if entry.is_paragraph]
    report(f'paragraphs: {split} has {len(kept)} ({sum(len(entry.text.encode()) for entry in kept) / 1e6:.1f} MB)')
    yield split, {
        'text': np.array([entry.text for entry in kept], str),
        'package': np.array([entry.source if entry.source in PACKAGES else '' for entry in kept], str),
    }, {'package': PACKAGES}


def pairs(entries: Mapping[str, Sequence[Entry]], report: Callable[[str], None] = print) -> Iterator[Split]:
  """Yields SPLITS: text_a (summary), text_b (paragraph), label ('yes': b continues a)."""
  for split, members in entries.items():
    rows = make_pairs(members)
    report(f'pairs: {split} has {len(rows)}')
    yield split, {name: np.array([row[i] for row in rows], str)
                  for i, name in enumerate(('text_a', 'text_b', 'label'))}, {'label': ANSWERS}
