"""The error classes of the commands."""

import ast

import pytest

from tests.helpers.processes import ROOT
from uni_moe_jax.utils.errors import MissingFileError, UsageError, first_few

_EXEMPT = {
    # Copied into exports, where the package is not installed.
    'export/loader.py', 'export/texts.py', 'export/example.py', 'export/onnx_model.py',
    'train/manifest.py',  # it catches its errors itself
    'preflight/hlo.py'}  # a text of XLA that it cannot parse is a defect


@pytest.mark.parametrize('number, expected', [
    (1, 'a and 2 more'), (2, 'a; b and 1 more'), (3, 'a; b; c'), (4, 'a; b; c')])
def test_a_message_names_the_first_few_items_and_counts_the_others(number, expected):
  assert first_few(['a', 'b', 'c'], number, '; ') == expected


def test_library_code_may_catch_the_built_in_classes():
  with pytest.raises(ValueError):
    raise UsageError('x')
  with pytest.raises(FileNotFoundError, match='^no file$'):
    raise MissingFileError('no file')


def test_deliberate_errors_have_a_class_that_the_commands_report():
  raises = [
      f'{path.relative_to(ROOT)}:{node.lineno}' for folder in ('uni_moe_jax', 'configs', 'launch')
      for path in sorted((ROOT / folder).rglob('*.py')) if str(path.relative_to(ROOT / folder)) not in _EXEMPT
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
      and ast.unparse(node.exc.func) in ('ValueError', 'FileNotFoundError')]
  assert not raises, f'raise UsageError or MissingFileError (uni_moe_jax/utils/errors.py) in {raises}'
