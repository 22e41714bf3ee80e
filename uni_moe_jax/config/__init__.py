"""The config of a run: fields, checks, and the plan that data, training and evaluation share.

Config files import what they need from here; `arguments` reads theirs: --config=pretrain:size=base,router=token.
"""

import pathlib
import types
from collections.abc import Collection
from typing import Any

from uni_moe_jax.cli import shipped
from uni_moe_jax.config.schema import base
from uni_moe_jax.config.task_schema import evaluator, target_set, task
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

__all__ = ['arguments', 'base', 'evaluator', 'target_set', 'task']
_BOOLS = {'true': True, 'false': False}


def arguments(
    arg: str | None, file: str, defaults: dict[str, Any], choices: dict[str, Collection[Any]] | None = None,
    required: Collection[str] = ()) -> types.SimpleNamespace:
  """Parse NAME=VALUE[,NAME=VALUE…].

  Args:
    arg: as the config file's `get_config` receives it.
    file: `__file__` of the config file, for error messages.
    defaults: of every name; they also give the types: string, bool or int.
    choices: name → valid values.
    required: names that must be given, and not be empty.

  Raises:
    UsageError: a name or value is unknown, given twice, or missing.
  """
  path, given = pathlib.Path(file), {}
  config = path.stem if shipped.configs().get(path.stem) == path.resolve() else file
  for part in arg.split(',') if arg else ():
    name, equals, value = part.partition('=')
    if not equals:
      raise UsageError(f'{config}:{arg}: {part!r} must be NAME=VALUE, with NAME one of {", ".join(defaults)}; for '
                       f'example {config}:{_example(defaults, required)}.')
    if name not in defaults:
      raise UsageError(f'{config}:{arg}: argument {name!r} is unknown; {nearest(name, defaults)}.')
    if name in given:
      raise UsageError(f'{config}:{arg}: argument {name!r} is given twice.')
    # Valid values by how they are written.
    valid = _BOOLS if isinstance(defaults[name], bool) else {str(x): x for x in (choices or {}).get(name, ())}
    written = value.lower() if valid is _BOOLS else value
    if valid and written not in valid:
      raise UsageError(f'{config}:{arg}: {name}={value!r} is unknown; {nearest(value, valid)}.')
    number = isinstance(defaults[name], int) and not valid
    if number and not value.isdecimal():
      raise UsageError(f'{config}:{arg}: {name}={value!r} must be an integer.')
    given[name] = int(value) if number else valid.get(written, value)
  values = defaults | given
  for name in required:
    if not values[name]:
      raise UsageError(f'{config}:{arg or ""}: argument {name!r} is missing; give {_example(defaults, required)}.')
  return types.SimpleNamespace(**values)


def _example(defaults: dict[str, Any], required: Collection[str]) -> str:
  shown = {name: str(x).lower() if isinstance(x, bool) else x or name.upper() for name, x in defaults.items()}
  return ','.join(f'{name}={shown[name]}' for name in required or defaults)
