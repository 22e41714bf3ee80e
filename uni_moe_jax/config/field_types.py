"""Whether a config has every field, no other, and values of the right type: what a file by hand or from elsewhere may lack."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import schema
from uni_moe_jax.utils import files
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

# Entries of these sections have names of their own, and fields as the function of that name gives them.
_ENTRIES = {'tasks': config.task('', '', batch_size=0), 'target_sets': config.target_set('', family=''),
            'evaluators': config.evaluator('', '', split='')}
_FREE = ('task_types', 'target_families', 'preflight.target_lengths', 'preflight.num_frames')  # rows of their own, checked where they are read
_STRING, _NUMBER = (str,), (int, float)
# What tuples hold, where the default does not show it.
_ITEMS = {'model.video_mean': _NUMBER, 'model.video_std': _NUMBER, 'model.extra_temperature_groups': _STRING, 'caption_templates': _STRING,
          'optim.param_groups': (tuple,)}
_LARGEST = 2**53  # beyond it, not every integer is a float


def check(c: ml_collections.ConfigDict) -> None:
  """Checks fields and types, not what they mean.

  Raises:
    UsageError: the first field that is missing, unknown, of another type than its default, not a finite number, or an address.
  """
  _section('', c, config.base())
  # Files, and what may name some; a template of texts may have an address in it.
  named = {f'{section}.{field}': c[section][field] for section, field in schema.PATHS}
  named |= {f'tasks.{name}.source': task.source for name, task in c.tasks.items()}
  named |= {f'target_sets.{name}.entries': s.entries for name, s in c.target_sets.items() if isinstance(s.entries, str)}
  for field, path in named.items():
    files.check_local(path, f'config.{field}')


def _section(name: str, given: Any, known: ml_collections.ConfigDict) -> None:
  if not isinstance(given, ml_collections.ConfigDict):
    raise UsageError(f'config.{name}={_short(given)} must be a section with the fields {", ".join(known)}.')
  prefix = f'{name}.' if name else ''
  for field in given:
    if field not in known:
      raise UsageError(f'config.{prefix}{field}: the config has no such field; {nearest(field, known)}.')
  for field, default in known.items():
    if field not in given:
      raise UsageError(f'config.{prefix}{field} is missing; its default is {_short(default)}.')
    _field(f'{prefix}{field}', given[field], default)


def _field(name: str, value: Any, default: Any) -> None:
  if name in _ENTRIES or name in _FREE:
    if not isinstance(value, ml_collections.ConfigDict):
      raise UsageError(f'config.{name}={_short(value)} must be a section of named entries.')
    for entry, fields in value.items() if name in _ENTRIES else ():
      _section(f'{name}.{entry}', fields, _ENTRIES[name])
  elif isinstance(default, ml_collections.ConfigDict):
    _section(name, value, default)
  elif name == 'moe.placement':
    _one_of(name, value, _STRING if isinstance(value, str) else (tuple,), 'a name or a tuple of layer indices')
    _items(name, value, (int,))
  elif name.startswith('target_sets.') and name.endswith('.entries'):
    _one_of(name, value, (str, tuple), 'a name or a tuple of texts')
    _items(name, value, (str, tuple))
    for i, synonyms in enumerate(value if isinstance(value, tuple) else ()):
      _items(f'{name}[{i}]', synonyms, _STRING)
  elif isinstance(default, bool):
    _one_of(name, value, (bool,), 'True or False')
  elif isinstance(default, int):
    _one_of(name, value, (int,), 'a whole number')
  elif isinstance(default, float):
    _one_of(name, value, _NUMBER, 'a finite number')
  elif isinstance(default, str):
    _one_of(name, value, _STRING, 'a text')
  else:
    _one_of(name, value, (tuple,), 'a tuple')
    _items(name, value, _ITEMS.get(name, _ITEMS.get(name.rpartition('.')[2], tuple({type(d) for d in default}))))


def _one_of(name: str, value: Any, types: tuple[type, ...], what: str) -> None:
  numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not isinstance(value, types) or isinstance(value, bool) and bool not in types or (
      numeric and not abs(value) <= _LARGEST):  # NaN is not, either
    raise UsageError(f'config.{name}={_short(value)} must be {what}.')


def _items(name: str, value: Any, types: tuple[type, ...]) -> None:
  for i, item in enumerate(value if isinstance(value, tuple) else ()):
    _one_of(f'{name}[{i}]', item, types, ' or '.join({str: 'a text', tuple: 'a tuple'}.get(t, 'a finite number') for t in types))


def _short(value: Any) -> str:
  """At most 60 characters."""
  try:
    said = repr(dict(value) if isinstance(value, Mapping) else value)
  except ValueError:  # an integer with thousands of digits
    return 'a number with thousands of digits'
  return said if len(said) <= 60 else f'{said[:57]}…'
