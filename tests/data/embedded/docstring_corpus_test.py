"""The docstring corpus: which strings are read, from which files, in which order."""

import pytest

from uni_moe_jax.data.embedded import docstring_corpus
from uni_moe_jax.data.embedded.docstring_corpus import Document
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


def test_documenting_strings_are_read_in_order_without_running_the_file():
  assert docstring_corpus.docstrings(_CODE) == [
      'Says what the module is for.',
      'Says what the function\n\nis for.',
      'Says what the width is.',
      'Says what the method is for.',
  ]


@pytest.mark.parametrize('code', [
    'add_newdoc("numpy", "zeros", """Makes zeros of a shape.""")',
    'core.add_newdoc("numpy", "ndarray", ("fill", """Makes zeros of a shape."""))',
], ids=['function', 'attribute'])
def test_docs_of_compiled_functions_are_read(code):
  assert docstring_corpus.docstrings(code.encode()) == ['Makes zeros of a shape.']


@pytest.mark.parametrize('code', [
    b'"""Says what it is for."""\nprint "hello"', b'"""Says what it is for."""\n\0', b'"""Doc."""',
], ids=['syntax of another Python', 'null bytes', 'one word'])
def test_no_docstring_is_read_from(code):
  assert docstring_corpus.docstrings(code) == []


def _write(folder, path, text):
  (folder / path).parent.mkdir(parents=True, exist_ok=True)
  (folder / path).write_text(f'"""{text}"""')


def test_documents_are_in_the_order_of_their_names(tmp_path):
  for path in ('b.py', 'a/c.py', 'a/b.py', 'd/x.py', 'a.py'):
    _write(tmp_path, path, f'Says what {path} is.')
  documents = docstring_corpus.folder_documents('s', 'p', tmp_path)
  assert [document.unit for document in documents] == ['p/a.py', 'p/a/b.py', 'p/a/c.py', 'p/b.py', 'p/d/x.py']


@pytest.mark.parametrize('path', ['tests/a.py', 'a_test.py', 'test_a.py', 'conftest.py', '_vendor/a.py', 'a.txt'])
def test_tests_bundled_projects_and_other_files_are_excluded(tmp_path, path):
  _write(tmp_path, path, 'Says what it is.')
  _write(tmp_path, 'doctest.py', 'Says what stays.')
  assert docstring_corpus.folder_documents('s', 'p', tmp_path) == [Document('s', 'p/doctest.py', 'Says what stays.')]


def test_packages_that_are_not_installed_are_named():
  with pytest.raises(UsageError, match=r'not installed: no_such_a, no_such_b\. .*constraints\.txt'):
    docstring_corpus.documents({'x': ('no_such_a', 'numpy'), 'y': ('no_such_b',)})


def test_help_topics_and_licenses_are_read_too():
  documents = docstring_corpus.documents({})
  topics = {document.unit: document for document in documents if document.source == 'python'}
  assert 'if' in topics['topics/if'].text
  licenses = [document for document in documents if document.source == docstring_corpus.LICENSES]
  assert any('WITHOUT WARRANTIES' in document.text for document in licenses)
  assert {document.unit for document in licenses} == {'licences'}  # the split is a hash of this name
