"""Launch scripts and configs by name: in the repository, or in the installed package, where setup.py puts them."""

import ast
import os
import pathlib

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def _files(installed: str, in_repository: str) -> list[pathlib.Path]:
  folder = _PACKAGE / installed
  return sorted((folder if folder.is_dir() else _PACKAGE.parent / in_repository).glob('[!_]*.py'))


def scripts() -> dict[str, pathlib.Path]:
  """Return {command: launch script}, such as {'prepare-data': …/prepare_data.py}."""
  return {file.stem.replace('_', '-'): file for file in _files('commands', 'launch')}


def configs() -> dict[str, pathlib.Path]:
  """Return {name: config file}, such as {'quickstart': …/quickstart.py}."""
  return {file.stem: file for file in _files('configs', 'configs')}


def config_path(config: str) -> str:
  """Return the path of NAME[:ARGUMENTS] or FILE.py[:ARGUMENTS], with its arguments. Raise UsageError."""
  name, colon, arguments = config.partition(':')
  if '/' in name or name.endswith('.py'):
    return os.path.expanduser(config)
  if name not in configs():
    raise UsageError(f'config {name!r} is unknown; {nearest(name, configs())}. For a file of your own, write FILE.py.')
  return f'{configs()[name]}{colon}{arguments}'


def docstring(file: pathlib.Path) -> str:
  """Return the docstring of a script or config without importing it."""
  return ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or ''
