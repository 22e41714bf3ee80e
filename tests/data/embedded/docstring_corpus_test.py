import os
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized

from uni_moe_jax.data.embedded import docstring_corpus
from uni_moe_jax.utils.errors import UsageError

_CODE = b'''
"""Says what the module is for."""
raise SystemExit('this file must be read, not run')

def f():
  """Says what the function

     is for."""
  text = """A string that documents nothing."""

class C:
  width = 3
  """Says what the width is."""
  if width:
    def g(self):
      """Says what the method is for."""
'''


class DocstringsTest(parameterized.TestCase):

  def test_strings_that_stand_alone_are_read_in_the_order_of_the_file_without_running_it(self):
    self.assertEqual(docstring_corpus.docstrings(_CODE), [
        'Says what the module is for.',
        'Says what the function\n\nis for.',
        'Says what the width is.',
        'Says what the method is for.',
    ])

  @parameterized.named_parameters(
      ('function', 'add_newdoc("numpy", "zeros", """Makes zeros of a shape.""")'),
      ('attribute', 'core.add_newdoc("numpy", "ndarray", ("fill", """Makes zeros of a shape."""))'),
  )
  def test_docs_of_compiled_functions_are_read(self, code):
    self.assertEqual(docstring_corpus.docstrings(code.encode()), ['Makes zeros of a shape.'])

  @parameterized.named_parameters(
      ('code_of_another_python', b'"""Says what it is for."""\nprint "hello"'),
      ('null_bytes', b'"""Says what it is for."""\n\0'),
      ('one_word', b'"""Doc."""'),
  )
  def test_nothing_is_read_from(self, code):
    self.assertEqual(docstring_corpus.docstrings(code), [])


class FoldersTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path

  def _write(self, path, text):
    path = pathlib.Path(self.folder, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""{text}"""')

  def test_order_of_the_file_system_changes_nothing(self):
    for path in ('b.py', 'a/c.py', 'a/b.py', 'd/x.py', 'a.py'):
      self._write(path, f'Says what {path} is.')
    walk = os.walk

    def backwards(folder):
      for where, names, files in walk(folder):
        names.sort(reverse=True)
        yield where, names, sorted(files, reverse=True)

    expected = docstring_corpus.folder_documents('s', 'p', self.folder)
    with mock.patch.object(os, 'walk', backwards):
      self.assertEqual(docstring_corpus.folder_documents('s', 'p', self.folder), expected)
    self.assertEqual(
        [document.unit for document in expected],
        ['p/a.py', 'p/a/b.py', 'p/a/c.py', 'p/b.py', 'p/d/x.py'])

  @parameterized.parameters(
      'tests/a.py', 'a_test.py', 'test_a.py', 'conftest.py', '_vendor/a.py', 'a.txt')
  def test_left_out(self, path):
    self._write(path, 'Says what it is.')
    self._write('doctest.py', 'Says what stays.')
    self.assertEqual(
        docstring_corpus.folder_documents('s', 'p', self.folder),
        [docstring_corpus.Document('s', 'p/doctest.py', 'Says what stays.')])

  def test_packages_that_are_not_installed_are_named(self):
    with mock.patch.dict(docstring_corpus.PACKAGES, {'x': ('no_such_a', 'numpy'), 'y': ('no_such_b',)}):
      with self.assertRaisesRegex(
          UsageError, r'not installed: no_such_a, no_such_b\. .*constraints\.txt'):
        docstring_corpus.documents()

  def test_help_topics_and_licences_are_read_too(self):
    with mock.patch.dict(docstring_corpus.PACKAGES, clear=True), mock.patch.object(
        docstring_corpus, 'folder_documents', return_value=[]):
      found = docstring_corpus.documents()
    topics = {document.unit: document for document in found if document.source == 'python'}
    self.assertIn('if', topics['topics/if'].text)
    licences = [document for document in found if document.source == 'licences']
    self.assertTrue(any('WITHOUT WARRANTIES' in document.text for document in licences))
    self.assertEqual({document.unit for document in licences}, {'licences'})


if __name__ == '__main__':
  absltest.main()
