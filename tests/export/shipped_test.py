"""The modules inside an exported folder are short and import only what a server has."""

import ast
import pathlib
import sys

import pytest

from uni_moe_jax.export import loader, texts


@pytest.mark.parametrize('module, needs', [(loader, {'jax', 'numpy'}), (texts, {'numpy', 'sentencepiece'})])
def test_the_loader_is_short_and_needs_little(module, needs):
  source = pathlib.Path(module.__file__).read_text()
  assert len(source.splitlines()) < 100
  imported = {(n.names[0].name if isinstance(n, ast.Import) else n.module).partition('.')[0]
              for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Import, ast.ImportFrom))}
  assert imported - set(sys.stdlib_module_names) == needs
