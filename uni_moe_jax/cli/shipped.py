"""Launch scripts and configs by name: in the repository, or in the installed package, where setup.py puts them."""

import ast
import os
import pathlib

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def _files(package: pathlib.Path, installed: str, in_repository: str) -> list[pathlib.Path]:
  folder = package / installed
  return sorted((folder if folder.is_dir() else package.parent / in_repository).glob('[!_]*.py'))


def command_name(script: pathlib.Path) -> str:
  """Return 'prepare-data' for …/prepare_data.py."""
  return script.stem.replace('_', '-')


def scripts(package: pathlib.Path = _PACKAGE) -> dict[str, pathlib.Path]:
  """Return {command: launch script}, such as {'prepare-data': …/prepare_data.py}."""
  return {command_name(file): file for file in _files(package, 'commands', 'launch')}


def configs(package: pathlib.Path = _PACKAGE) -> dict[str, pathlib.Path]:
  """Return {name: config file}, such as {'quickstart': …/quickstart.py}."""
  return {file.stem: file for file in _files(package, 'configs', 'configs')}


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
