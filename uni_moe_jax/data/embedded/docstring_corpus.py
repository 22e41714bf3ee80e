"""English that is already on the machine: docstrings, help topics, licences; read, never run.

The sources are fixed: Python's library and pinned dependencies of this project. Which other
packages are installed, and the order in which a file system lists them, changes nothing.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from uni_moe_jax.utils.errors import UsageError

# Source name -> the import packages it is read from. Left out: packages with fewer than about 300
# paragraphs, and those that a platform or an extra may leave uninstalled.
PACKAGES = {
    'flax': ('flax',),
    'fonttools': ('fontTools',),
    'grpc': ('grpc',),
    'jax': ('jax',),
    'jaxlib': ('jaxlib',),
    'keras': ('keras',),
    'matplotlib': ('matplotlib', 'mpl_toolkits'),
    'narwhals': ('narwhals',),
    'numpy': ('numpy',),
    'optax': ('optax',),
    'orbax': ('orbax',),
    'pillow': ('PIL',),
    'portalocker': ('portalocker',),
    'pygments': ('pygments',),
    'rich': ('rich',),
    'scipy': ('scipy',),
    'sklearn': ('sklearn',),
    'tensorboard': ('tensorboard',),
    'tensorflow': ('tensorflow',),
    'tfds': ('tensorflow_datasets',),
    'treescope': ('treescope',),
    'werkzeug': ('werkzeug',),
}
LIBRARY = 'python'
LICENCES = 'licences'
# Distributions whose wheels carry licence texts of their own and of what they bundle.
LICENSED = (
    'absl-py', 'fonttools', 'grpcio', 'jaxlib', 'matplotlib', 'numpy', 'pillow', 'scikit-learn',
    'scipy', 'tensorboard', 'tensorstore',
)

_FOLDERS_LEFT_OUT = frozenset({
    '__pycache__', 'site-packages', 'dist-packages',
    # Tests describe themselves, not the library.
    'test', 'tests', 'testing',
    # One project's prose inside another: a source would no longer mean what it says.
    '_vendor', 'vendor', 'vendored', 'externals', 'array_api_compat', 'array_api_extra',
    # Some distributions of Python ship these apart, or not at all.
    'distutils', 'ensurepip', 'idlelib', 'lib2to3', 'tkinter', 'turtledemo',
})
# An old copy of keras.
_PATHS_LEFT_OUT = frozenset({'tensorflow/python/keras'})
_TEST_FILE = re.compile(r'(^|_)tests?(_|\.)|conftest')
_LICENCE_FILE = re.compile(r'licen[cs]e|copying|notice', re.IGNORECASE)


class Document(NamedTuple):
  """One docstring, help topic or licence.

  Attributes:
    source: a key of `PACKAGES`, 'python' or 'licences'.
    unit: what a split must not divide: the file (or the topic) that the text stands in.
    text: as written, common indentation removed, lines ended by a newline.
  """
  source: str
  unit: str
  text: str


def documents() -> list[Document]:
  """All documents, in an order that depends on names only.

  Raises:
    UsageError: a package of the fixed list is not installed; names all that are missing.
  """
  roots = [(LIBRARY, LIBRARY, [sysconfig.get_path('stdlib')])]
  for source, packages in PACKAGES.items():
    roots += [(source, package, _folders(package)) for package in packages]
  if missing := [package for _, package, folders in roots if not folders]:
    raise UsageError(
        f'The embedded text is read from packages that are not installed: {", ".join(missing)}. '
        'Install the project with its constraints file: pip install -c constraints.txt -e .')
  found = []
  for source, package, folders in sorted(roots):
    for folder in folders:
      found += folder_documents(source, package, folder)
  return found + _topics() + _licences()


def folder_documents(source: str, package: str, folder: str | os.PathLike[str]) -> list[Document]:
  """Docstrings of the Python files under `folder`, where `package` lies.

  Tests and other projects that are bundled with the package are left out.
  """
  found = []
  for path in _python_files(folder, package):
    code = pathlib.Path(folder, path).read_bytes()
    found += [Document(source, f'{package}/{path}', text) for text in docstrings(code)]
  return found


def docstrings(code: bytes) -> list[str]:
  """Strings that document something: those that are a statement, and arguments of `add_newdoc`.

  Args:
    code: a Python file, in the encoding that it declares.

  Returns:
    The strings, dedented. Nothing if this Python cannot parse the file.
  """
  if b'"""' not in code and b"'''" not in code:
    return []  # parsing takes half of the time, and prose in other quotes is rare
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # invalid escapes are not ours to report
      tree = ast.parse(code)
  except (SyntaxError, ValueError):
    return []
  found = []
  for statement in _statements(tree):
    if isinstance(statement, ast.Expr):
      value = statement.value
      if isinstance(value, ast.Constant):
        found.append(value.value)
      elif isinstance(value, ast.Call) and 'add_newdoc' in (
          getattr(value.func, 'id', None), getattr(value.func, 'attr', None)):
        # So are compiled functions of numpy and scipy documented; methods by pairs (name, doc).
        leaves = (leaf for argument in value.args for leaf in ast.walk(argument))
        found += [leaf.value for leaf in leaves if isinstance(leaf, ast.Constant)]
  return [
      inspect.cleandoc(text) for text in found if isinstance(text, str) and ' ' in text.strip()]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
  """Statements in the order of the file. Expressions, most of a tree, are not looked into."""
  for block in ('body', 'handlers', 'orelse', 'finalbody', 'cases'):
    for child in getattr(node, block, ()):
      yield child
      yield from _statements(child)


def _folders(package: str) -> Sequence[str]:
  spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
  return list(spec.submodule_search_locations or ()) if spec else ()


def _python_files(folder: str | os.PathLike[str], package: str) -> list[str]:
  """Paths of .py files under `folder`, relative to it, with '/' between parts, sorted."""
  paths = []
  for where, names, files in os.walk(folder):
    here = pathlib.Path(where).relative_to(folder).as_posix()
    names[:] = [
        name for name in names if name not in _FOLDERS_LEFT_OUT
        and pathlib.PurePosixPath(package, here, name).as_posix() not in _PATHS_LEFT_OUT
    ]
    paths += [
        pathlib.PurePosixPath(here, name).as_posix() for name in files
        if name.endswith('.py') and not _TEST_FILE.search(name)
    ]
  return sorted(paths)


def _topics() -> list[Document]:
  """The language reference behind `help()`: one dict from topic to text, in one file."""
  path = pathlib.Path(sysconfig.get_path('stdlib'), 'pydoc_data', 'topics.py')
  (table,) = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Dict))
  topics = sorted(ast.literal_eval(table).items())
  return [Document(LIBRARY, f'topics/{name}', inspect.cleandoc(text)) for name, text in topics]


def _licences() -> list[Document]:
  """Licence texts. They quote each other nearly word for word, so that all of them are one unit."""
  found = []
  for name in LICENSED:
    for path in sorted(importlib.metadata.files(name) or (), key=str):
      if path.parts[0].endswith('.dist-info') and _LICENCE_FILE.search(path.name):
        text = path.locate().read_text(encoding='utf-8', errors='replace')
        found.append(Document(LICENCES, LICENCES, inspect.cleandoc(text)))
  return found
