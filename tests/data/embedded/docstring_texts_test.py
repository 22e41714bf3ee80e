"""Text datasets: duplicates, splits, pairs, and the prepared folders."""

import collections
import random

import pytest

from uni_moe_jax.data.embedded import docstring_corpus, docstring_texts, prose_filter
from uni_moe_jax.data.embedded.docstring_corpus import Document
from uni_moe_jax.data.embedded.docstring_texts import Entry

_LETTERS = 'bcdfghjklmnprstvwz'


def _sentence(rng):
  """Twelve words; four of them occur in every sentence, too few to be compared without the others."""
  a, b, c, d, e, f, g, h = (''.join(rng.choice(_LETTERS) + rng.choice('aeiou') for _ in range(4)) for _ in range(8))
  return f'Counts {a} {b} {c} when {d} {e} and {f} {g} are {h}.'


def _documents():
  """Two documents of each of 150 files of two sources, with a summary and two paragraphs each."""
  rng = random.Random(0)
  return [Document(source, f'{source}/{file}.py', '\n\n'.join(_sentence(rng) for _ in range(3)))
          for source in ('numpy', 'flax') for file in range(150) for _ in range(2)]


def _entry(text, role=prose_filter.BODY, source='numpy', unit='numpy/a.py', document=0):
  return Entry(source, unit, document, role, text)


@pytest.mark.parametrize('first, second', [
    ('Returns the sum of the values.', 'Returns the sum of the values.'),
    ('Returns the sum of the values.', 'Returns, the sum: of the Values!'),
    ('Has 2 rows of the 10 values.', 'Has 3 rows of the 11 values.'),
], ids=['equal', 'case and punctuation', 'digits'])
def test_the_first_of_two_duplicates_is_kept(first, second):
  entries = [_entry(first), _entry(second, document=1)]
  assert docstring_texts.drop_duplicates(entries, frozenset()) == entries[:1]


def test_rare_words_do_not_count_beside_seven_common_ones_which_fifty_paragraphs_have():
  common = frozenset('the value of a variable in this'.split())
  beta, gumbel = (_entry(f'The value of a {name} variable in this.') for name in ('Beta', 'Gumbel'))
  assert docstring_texts.drop_duplicates([beta, gumbel], common) == [beta]
  assert docstring_texts.drop_duplicates([beta, gumbel], common - {'this'}) == [beta, gumbel]
  assert docstring_texts.common_words([_entry('all all some')] * 49 + [_entry('all')]) == {'all'}


def test_entries_keep_order_origin_and_role():
  body = 'This is the longer description of what the function is for.'
  entries = docstring_texts.extract_entries([
      Document('numpy', 'numpy/a.py', f'Says what it is.\n\n{body}'),
      Document('scipy', 'scipy/a.py', f'Says what it was.\n\n{body}'),
  ])
  assert entries == [
      Entry('numpy', 'numpy/a.py', 0, prose_filter.SUMMARY, 'Says what it is.'),
      Entry('numpy', 'numpy/a.py', 0, prose_filter.BODY, body),
      Entry('scipy', 'scipy/a.py', 1, prose_filter.SUMMARY, 'Says what it was.'),
  ]
  assert [entry.is_paragraph for entry in entries] == [False, True, False]


def test_splits_have_their_fractions_and_licenses_are_in_train():
  counts = collections.Counter(docstring_texts.split_of(f'package/{i}.py') for i in range(20_000))
  # 4 standard errors of a binomial fraction at 20,000 are 0.0077 and 0.0055.
  assert counts['test'] / 20_000 == pytest.approx(0.08, abs=0.0077)
  assert counts['validation'] / 20_000 == pytest.approx(0.04, abs=0.0055)
  assert docstring_texts.split_of(docstring_corpus.LICENSES) == 'train'


def test_wording_of_train_is_left_out_of_the_other_splits():
  units = {docstring_texts.split_of(f'{i}.py'): f'{i}.py' for i in range(999)}
  trained = _entry('one two three four five six seven eight nine ten', unit=units['train'])
  # Sequences of five words: three up to "seven" are in train, four up to "seven x y z w" are new.
  new = _entry('one two three four five six seven x y z w', unit=units['test'])
  half = _entry('one two three four five six seven x y z', unit=units['test'])  # 3 and 3
  assert docstring_texts.split_entries([trained, new, half]) == {'train': [trained], 'validation': [], 'test': [new]}


def test_pairs_are_balanced_and_yes_is_the_same_document_and_no_another_one_of_the_source():
  documents = _documents()
  origin = {text: (index, document.source)
            for index, document in enumerate(documents) for text in document.text.split('\n\n')}
  rows = docstring_texts.make_pairs(docstring_texts.extract_entries(documents))
  yes, no = ([row for row in rows if row[2] == answer] for answer in ('yes', 'no'))
  assert len(yes) == 2 * 150 * 2 * 2
  for column in (0, 1):
    assert sorted(row[column] for row in yes) == sorted(row[column] for row in no)
  for summary, text, answer in rows:
    assert (origin[summary][0] == origin[text][0]) == (answer == 'yes')
    assert origin[summary][1] == origin[text][1]


def test_items_in_pairs_have_at_least_twenty_words():
  rest = [_entry('word ' * n, prose_filter.ITEM, document=d) for d in (0, 1) for n in (19, 20)]
  first, second = (_entry(f'Number {d}.', prose_filter.SUMMARY, document=d) for d in (0, 1))
  rows = docstring_texts.make_pairs([first, *rest[:2], second, *rest[2:]])
  assert {row[1] for row in rows} == {'word ' * 20}


def test_a_document_without_a_summary_gives_no_pairs():
  entries = [_entry(_sentence(random.Random(i)), document=i // 2) for i in range(20)]
  assert docstring_texts.make_pairs(entries) == []


@pytest.fixture(name='splits')
def _splits():
  """(paragraphs, pairs) of a short corpus, by split."""
  entries = docstring_texts.split_entries(docstring_texts.extract_entries(_documents()))
  return [{split: (columns, classes) for split, columns, classes in make(entries, lambda line: None)}
          for make in (docstring_texts.paragraphs, docstring_texts.pairs)]


def test_no_text_is_in_two_splits_and_none_is_lost(splits):
  paragraphs, pairs = splits
  texts = [{*paragraphs[split][0]['text'], *pairs[split][0]['text_a'], *pairs[split][0]['text_b']}
           for split in docstring_texts.SPLITS]
  assert all(texts)
  assert len(set.union(*texts)) == sum(map(len, texts)) == 2 * 150 * 2 * 3


def test_labels_are_packages_and_answers(splits):
  (paragraphs, packages), (pairs, answers) = (made['train'] for made in splits)
  assert set(paragraphs['package']) == {'numpy', ''}  # flax is not one of the ten
  assert packages == {'package': docstring_texts.PACKAGES}
  assert set(pairs['label']) == {'no', 'yes'}
  assert answers == {'label': ('no', 'yes')}
