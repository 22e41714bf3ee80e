"""Prints the size of the repository beside its limits: python .ci/budgets.py

Lines are counted with blank ones. Tokens are those of Python's tokenizer without comments, docstrings and line breaks.
A small module has fewer than 60 lines and is imported by one other.
"""

import ast
import io
import pathlib
import re
import tokenize

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_LIMITS = {'package lines': 27_500, 'package tokens': 225_000, 'test lines': 33_000, 'calls of monkeypatch': 170,
           'files with capacity_factor': 6}
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
           tokenize.ENDMARKER)


def _docstring_lines(code: str) -> set[int]:
  """Lines of statements that are only a string."""
  return {line for node in ast.walk(ast.parse(code))
          if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
          for line in range(node.lineno, node.end_lineno + 1)}


def _num_tokens(code: str) -> int:
  skipped = _docstring_lines(code)
  return sum(token.type not in _LAYOUT and not (token.type == tokenize.STRING and token.start[0] in skipped)
             for token in tokenize.generate_tokens(io.StringIO(code).readline))


def _imports(code: str) -> set[str]:
  """Names of modules that a file imports, also inside functions; of `from a import b` both a and a.b."""
  names = set()
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
  return names


def main() -> None:
  read = lambda folder: {path: path.read_text() for path in sorted((_ROOT / folder).rglob('*.py'))}
  package, tests = read('uni_moe_jax'), read('tests')
  imports = {path: _imports(code) for path, code in {**package, **read('launch'), **read('configs')}.items()}

  def num_importers(path: pathlib.Path) -> int:
    name = '.'.join(path.relative_to(_ROOT).with_suffix('').parts)
    return sum(name in names for other, names in imports.items() if other != path)

  small = [path for path, code in package.items()
           if path.name != '__init__.py' and code.count('\n') < 60 and num_importers(path) == 1]
  sizes = {
      'package lines': sum(code.count('\n') for code in package.values()),
      'package tokens': sum(map(_num_tokens, package.values())),
      'test lines': sum(code.count('\n') for code in tests.values()),
      'calls of monkeypatch': sum(len(re.findall(r'\bmonkeypatch\.\w+\(', code)) for code in tests.values()),
      'files with capacity_factor': sum('capacity_factor' in code for code in package.values()),
      'small modules with one importer': len(small)}
  for name, size in sizes.items():
    print(f'{name:32} {size:8,} {"of " + format(_LIMITS[name], ",") if name in _LIMITS else ""}')
  print(*(path.relative_to(_ROOT) for path in small), sep='\n')


if __name__ == '__main__':
  main()
