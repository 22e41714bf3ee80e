"""English text from installed packages: docstrings, help topics and licenses.

Code is parsed, never run. The sources are fixed: Python's standard library and pinned dependencies of this project.
Other installed packages and the order in which a file system lists files have no influence.
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
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from uni_moe_jax.utils.errors import UsageError

# Source name → its import packages. Left out: packages with fewer than about 300 paragraphs, and those that a platform
# or an extra may leave uninstalled.
PACKAGES = {name: (name,) for name in (
    'flax', 'grpc', 'jax', 'jaxlib', 'keras', 'narwhals', 'numpy', 'optax', 'orbax', 'portalocker', 'pygments', 'rich',
    'scipy', 'sklearn', 'tensorboard', 'tensorflow', 'treescope', 'werkzeug')} | {
        'fonttools': ('fontTools',),
        'matplotlib': ('matplotlib', 'mpl_toolkits'),
        'pillow': ('PIL',),
        'tfds': ('tensorflow_datasets',),
    }
STDLIB = 'python'
LICENSES = 'licences'  # part of the content: the split of a unit is a hash of its name
# Distributions whose wheels contain license texts of their own and of what they bundle.
LICENSED = (
    'absl-py', 'fonttools', 'grpcio', 'jaxlib', 'matplotlib', 'numpy', 'pillow', 'scikit-learn', 'scipy', 'tensorboard',
    'tensorstore')

_EXCLUDED_FOLDERS = frozenset({
    '__pycache__', 'site-packages', 'dist-packages',
    # Tests describe themselves, not the library.
    'test', 'tests', 'testing',
    # Text of another project, which would get the wrong source.
    '_vendor', 'vendor', 'vendored', 'externals', 'array_api_compat', 'array_api_extra',
    # Some distributions of Python ship these separately, or not at all.
    'distutils', 'ensurepip', 'idlelib', 'lib2to3', 'tkinter', 'turtledemo',
})
_EXCLUDED_PATHS = frozenset({'tensorflow/python/keras'})  # an old copy of keras
_TEST_FILE = re.compile(r'(^|_)tests?(_|\.)|conftest')
_LICENSE_FILE = re.compile(r'licen[cs]e|copying|notice', re.IGNORECASE)


class Document(NamedTuple):
  """One docstring, help topic or license."""
  source: str  # a key of `PACKAGES`, `STDLIB` or `LICENSES`
  unit: str  # name of the file (or topic) that contains the text; a split must not divide it
  text: str  # without common indentation, lines separated by newlines


def documents(import_names: Mapping[str, Sequence[str]] = PACKAGES) -> list[Document]:
  """Returns all documents of Python and the packages, in an order that depends on names only.

  Raises UsageError if packages of the fixed list are not installed.
  """
  roots = [(STDLIB, STDLIB, [sysconfig.get_path('stdlib')])]
  roots += [(source, package, _folders(package)) for source, packages in import_names.items()
            for package in packages]
  if missing := [package for _, package, folders in roots if not folders]:
    raise UsageError(
        f'The embedded text is read from packages that are not installed: {", ".join(missing)}. '
        'Install the project with its constraints file: pip install -c constraints.txt -e .')
  docs = [document for source, package, folders in sorted(roots) for folder in folders
          for document in folder_documents(source, package, folder)]
  return docs + _help_topics() + _licenses()


def folder_documents(source: str, package: str, folder: str | os.PathLike[str]) -> list[Document]:
  """Returns the docstrings of a package's files under `folder`, without tests and bundled projects."""
  paths = []  # relative to `folder`, with '/' as separator
  for root, names, files in os.walk(folder):
    parent = pathlib.PurePosixPath(pathlib.Path(root).relative_to(folder).as_posix())
    names[:] = [name for name in names if name not in _EXCLUDED_FOLDERS
                and (package / parent / name).as_posix() not in _EXCLUDED_PATHS]
    paths += [(parent / name).as_posix() for name in files if name.endswith('.py') and not _TEST_FILE.search(name)]
  return [Document(source, f'{package}/{path}', text) for path in sorted(paths)
          for text in docstrings(pathlib.Path(folder, path).read_bytes())]


def docstrings(code: bytes) -> list[str]:
  """Extracts strings that document something, dedented: those that are a statement, and arguments of `add_newdoc`.

  A file that this Python cannot parse has none.
  """
  if b'"""' not in code and b"'''" not in code:
    return []  # parsing takes half of the time, and prose in other quotes is rare
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # invalid escapes in other projects
      tree = ast.parse(code)
  except (SyntaxError, ValueError):
    return []
  strings = []
  for statement in _statements(tree):
    if isinstance(statement, ast.Expr):
      value = statement.value
      if isinstance(value, ast.Constant):
        strings.append(value.value)
      elif isinstance(value, ast.Call) and 'add_newdoc' in (
          getattr(value.func, 'id', None), getattr(value.func, 'attr', None)):
        # The documentation of compiled functions in numpy and scipy; of methods as pairs (name, doc).
        leaves = (leaf for argument in value.args for leaf in ast.walk(argument))
        strings += [leaf.value for leaf in leaves if isinstance(leaf, ast.Constant)]
  return [inspect.cleandoc(text) for text in strings if isinstance(text, str) and ' ' in text.strip()]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
  """Yields statements in the order of the file, without expressions, which are most of a tree."""
  for block in ('body', 'handlers', 'orelse', 'finalbody', 'cases'):
    for child in getattr(node, block, ()):
      yield child
      yield from _statements(child)


def _folders(package: str) -> Sequence[str]:
  spec = importlib.util.find_spec(package)  # does not import a top-level package
  return list(spec.submodule_search_locations or ()) if spec else ()


def _help_topics() -> list[Document]:
  """Returns the language reference behind `help()`: one dict from topic to text, in one file."""
  path = pathlib.Path(sysconfig.get_path('stdlib'), 'pydoc_data', 'topics.py')
  (table,) = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Dict))
  topics = sorted(ast.literal_eval(table).items())
  return [Document(STDLIB, f'topics/{name}', inspect.cleandoc(text)) for name, text in topics]


def _licenses() -> list[Document]:
  """Returns license texts. All of them are one unit, because they quote each other nearly word for word."""
  paths = (path for name in LICENSED for path in sorted(importlib.metadata.files(name) or (), key=str)
           if path.parts[0].endswith('.dist-info') and _LICENSE_FILE.search(path.name))
  return [Document(LICENSES, LICENSES, inspect.cleandoc(path.locate().read_text(encoding='utf-8', errors='replace')))
          for path in paths]
