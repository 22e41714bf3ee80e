import collections
import random
import re
from unittest import mock

from absl.testing import absltest, parameterized

from uni_moe_jax.data.embedded import docstring_corpus, docstring_texts, prose_filter
from uni_moe_jax.data.embedded.docstring_texts import Entry

_LETTERS = 'bcdfghjklmnprstvwz'


def _word(rng):
  return ''.join(rng.choice(_LETTERS) + rng.choice('aeiou') for _ in range(4))


def _sentence(rng):
  """Twelve words, of which four occur in every sentence: fewer than are compared alone."""
  a, b, c, d, e, f, g, h = (_word(rng) for _ in range(8))
  return f'Counts {a} {b} {c} when {d} {e} and {f} {g} are {h}.'


def _documents(files=150, sources=('numpy', 'flax')):
  """Two documents a file, each a summary and two paragraphs."""
  rng = random.Random(0)
  return [
      docstring_corpus.Document(source, f'{source}/{file}.py', '\n\n'.join(_sentence(rng) for _ in range(3)))
      for source in sources for file in range(files) for _ in range(2)
  ]


def _entry(text, role=prose_filter.BODY, source='numpy', unit='numpy/a.py', document=0):
  return Entry(source, unit, document, role, text)


class DuplicatesTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('equal', 'Returns the sum of the values.', 'Returns the sum of the values.'),
      ('case_and_stops', 'Returns the sum of the values.', 'Returns, the sum: of the Values!'),
      ('digits', 'Has 2 rows of the 10 values.', 'Has 3 rows of the 11 values.'),
  )
  def test_the_first_of_two_stays(self, first, second):
    found = [_entry(first), _entry(second, document=1)]
    self.assertEqual(docstring_texts.without_duplicates(found, frozenset()), found[:1])

  def test_rare_words_do_not_count_beside_seven_common_ones(self):
    common = frozenset('the value of a variable in this'.split())
    beta = _entry('The value of a Beta variable in this.')
    gumbel = _entry('The value of a Gumbel variable in this.')
    self.assertEqual(docstring_texts.without_duplicates([beta, gumbel], common), [beta])
    self.assertEqual(docstring_texts.without_duplicates([beta, gumbel], common - {'this'}), [beta, gumbel])

  def test_words_in_fifty_paragraphs_are_common(self):
    found = [_entry('all all some')] * 49 + [_entry('all')]
    self.assertEqual(docstring_texts.common_words(found), {'all'})

  def test_entries_keep_order_origin_and_role(self):
    body = 'This is the longer description of what the function is for.'
    found = docstring_texts.entries([
        docstring_corpus.Document('numpy', 'numpy/a.py', f'Says what it is.\n\n{body}'),
        docstring_corpus.Document('scipy', 'scipy/a.py', f'Says what it was.\n\n{body}'),
    ])
    self.assertEqual(found, [
        Entry('numpy', 'numpy/a.py', 0, prose_filter.SUMMARY, 'Says what it is.'),
        Entry('numpy', 'numpy/a.py', 0, prose_filter.BODY, body),
        Entry('scipy', 'scipy/a.py', 1, prose_filter.SUMMARY, 'Says what it was.'),
    ])
    self.assertEqual([entry.is_paragraph for entry in found], [False, True, False])


class SplitsTest(parameterized.TestCase):

  def test_shares(self):
    counts = collections.Counter(docstring_texts.split_of(f'package/{i}.py') for i in range(20_000))
    # 4 standard errors of a binomial share at 20,000 are 0.0077 and 0.0055.
    self.assertAlmostEqual(counts['test'] / 20_000, 0.08, delta=0.0077)
    self.assertAlmostEqual(counts['validation'] / 20_000, 0.04, delta=0.0055)

  def test_licences_are_for_training(self):
    self.assertEqual(docstring_texts.split_of(docstring_corpus.LICENCES), 'train')

  def test_wording_of_train_is_left_out_of_the_other_splits(self):
    units = {docstring_texts.split_of(f'{i}.py'): f'{i}.py' for i in range(999)}
    learnt = _entry('one two three four five six seven eight nine ten', unit=units['train'])
    # Runs of five words: three up to "seven" are learnt, four up to "seven x y z w" new.
    new = _entry('one two three four five six seven x y z w', unit=units['test'])
    half = _entry('one two three four five six seven x y z', unit=units['test'])  # 3 and 3
    self.assertEqual(
        docstring_texts.divide([learnt, new, half]), {'train': [learnt], 'validation': [], 'test': [new]})


class PairsTest(parameterized.TestCase):

  def test_answers_share_summaries_and_paragraphs_so_that_neither_tells(self):
    rows = docstring_texts.pairs(docstring_texts.entries(_documents()))
    yes = [row for row in rows if row[2] == 'yes']
    no = [row for row in rows if row[2] == 'no']
    self.assertLen(yes, 2 * 150 * 2 * 2)
    for column in (0, 1):
      self.assertCountEqual([row[column] for row in yes], [row[column] for row in no])

  def test_yes_is_the_same_document_and_no_another_one_of_the_source(self):
    documents = _documents()
    origin = {
        text: (index, document.source)
        for index, document in enumerate(documents) for text in document.text.split('\n\n')
    }
    rows = docstring_texts.pairs(docstring_texts.entries(documents))
    self.assertNotEmpty(rows)
    for summary, text, answer in rows:
      self.assertEqual(origin[summary][0] == origin[text][0], answer == 'yes')
      self.assertEqual(origin[summary][1], origin[text][1])

  def test_items_need_twenty_words(self):
    rest = [_entry('word ' * n, prose_filter.ITEM, document=d) for d in (0, 1) for n in (19, 20)]
    first, second = (_entry(f'Number {d}.', prose_filter.SUMMARY, document=d) for d in (0, 1))
    found = [first, *rest[:2], second, *rest[2:]]
    self.assertEqual({row[1] for row in docstring_texts.pairs(found)}, {'word ' * 20})

  def test_a_document_without_its_summary_gives_none(self):
    found = [_entry(_sentence(random.Random(i)), document=i // 2) for i in range(20)]
    self.assertEqual(docstring_texts.pairs(found), [])


class BuildTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.directory = self.create_tempdir().full_path
    self.harvest = self.enter_context(
        mock.patch.object(docstring_corpus, 'documents', side_effect=_documents))
    self.reports = []

  def _all_texts(self, split):
    columns = docstring_texts.load_pairs(self.directory, split).columns
    paragraphs = docstring_texts.load_paragraphs(self.directory, split).columns
    return {*paragraphs['text'], *columns['text_a'], *columns['text_b']}

  def test_no_text_is_in_two_splits_and_none_is_lost(self):
    docstring_texts.build(self.directory, self.reports.append)
    parts = [self._all_texts(split) for split in docstring_texts.SPLITS]
    self.assertTrue(all(parts))
    self.assertLen(set.union(*parts), sum(map(len, parts)))
    self.assertLen(set.union(*parts), 2 * 150 * 2 * 3)

  def test_labels(self):
    docstring_texts.build(self.directory, self.reports.append)
    paragraphs = docstring_texts.load_paragraphs(self.directory, 'train')
    # flax is not one of the ten.
    self.assertEqual(set(paragraphs.columns['package']), {'numpy', ''})
    self.assertEqual(paragraphs.classes, {'package': docstring_texts.PACKAGES})
    pairs = docstring_texts.load_pairs(self.directory, 'train')
    self.assertEqual(set(pairs.columns['label']), {'no', 'yes'})
    self.assertEqual(pairs.classes, {'label': ('no', 'yes')})

  def test_same_documents_same_fingerprint(self):
    other = self.create_tempdir().full_path
    docstring_texts.build(self.directory, self.reports.append)
    docstring_texts.build(other, self.reports.append)
    for load in (docstring_texts.load_paragraphs, docstring_texts.load_pairs):
      test = load(self.directory, 'test').fingerprint
      self.assertEqual(test, load(other, 'test').fingerprint)
      self.assertNotEqual(test, load(self.directory, 'train').fingerprint)

  def test_what_is_there_is_not_made_again(self):
    docstring_texts.build(self.directory, self.reports.append)
    docstring_texts.build(self.directory, self.reports.append)
    self.harvest.assert_called_once()

  def test_a_failed_build_leaves_nothing_to_read(self):
    with mock.patch.object(docstring_texts, 'pairs', side_effect=KeyboardInterrupt):
      with self.assertRaises(KeyboardInterrupt):
        docstring_texts.build(self.directory, self.reports.append)
    command = f'python launch/prepare_data.py --data_dir={self.directory}'
    with self.assertRaisesRegex(FileNotFoundError, re.escape(command)):
      docstring_texts.load_paragraphs(self.directory, 'train')

  def test_an_unknown_split_lists_the_known_ones(self):
    docstring_texts.build(self.directory, self.reports.append)
    with self.assertRaisesRegex(ValueError, "split 'dev' .*test, train, validation"):
      docstring_texts.load_pairs(self.directory, 'dev')


if __name__ == '__main__':
  absltest.main()
