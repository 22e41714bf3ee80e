"""One declaration per config field: `field(default, doc, …)` gives default, checks and documentation.

A `ConfigDict` is what users write and override (`to_config_dict`); `parse` checks one and returns the dataclass.
"""

import dataclasses
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from uni_moe_jax.io import storage
from uni_moe_jax.utils import templates
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

REQUIRED = dataclasses.MISSING
_BOUNDS = {'at_least': operator.ge, 'above': operator.gt, 'at_most': operator.le, 'below': operator.lt}
_LARGEST = 2**53  # beyond it, not every integer is a float
_NAMES = {bool: 'True or False', int: 'a whole number', float: 'a finite number', str: 'a string', tuple: 'a tuple'}
_PLURALS = {int: 'whole numbers', float: 'numbers', str: 'strings', tuple: 'tuples'}

T = TypeVar('T')


def field(
    default: Any, doc: str, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None,
    below: float | None = None, choices: Iterable[str] = (), off: float | None = None, published: Any = REQUIRED,
    path: bool = False, template: bool = False) -> Any:
  """Declare a config field.

  Args:
    default: `REQUIRED` if there is none.
    doc: meaning and unit, for the reference.
    at_least, above, at_most, below: bounds of a number, or of every number of a tuple.
    choices: valid strings of a string field, or of the items of a tuple.
    off: value that disables the feature, for the error message.
    published: value in the published system, which `compat='published'` sets.
    path: whether it is, or may be, a path: a wrong address such as gcs://… is refused.
    template: whether it is a template over columns, or a tuple of them; see `utils.templates`.
  """
  metadata = dict(doc=doc, at_least=at_least, above=above, at_most=at_most, below=below, choices=tuple(choices),
                  off=off, published=published, path=path, template=template)
  return dataclasses.field(default=default, metadata=metadata)


def entries(cls: type | None, doc: str) -> Any:
  """Declare a section of named entries, each a `cls`; None: of values that `make_plan` parses."""
  return dataclasses.field(default_factory=dict, hash=False, metadata=dict(doc=doc, entry=cls))


def to_config_dict(value: Any) -> ml_collections.ConfigDict:
  """The ConfigDict of a config dataclass."""
  hints = typing.get_type_hints(type(value))

  def entry(name: str, x: Any) -> Any:
    if dataclasses.is_dataclass(x):
      return to_config_dict(x)
    x = _as_float(x, hints[name])
    # A value of another type of a union can be assigned.
    return config_dict.FieldReference(x, field_type=object) if isinstance(hints[name], types.UnionType) else x

  return ml_collections.ConfigDict({name: entry(name, x) for name, x in vars(value).items()})


def with_floats(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
  """A copy of a stored section in which no field of floats has a whole number, since no fraction could override it."""
  hints, fields = typing.get_type_hints(cls), {f.name: f.metadata for f in dataclasses.fields(cls)}

  def entry(name: str, x: Any) -> Any:
    hint, cls = hints.get(name), fields.get(name, {}).get('entry')
    if isinstance(x, dict) and cls:
      return {key: with_floats(cls, value) if isinstance(value, dict) else value for key, value in x.items()}
    return with_floats(hint, x) if isinstance(x, dict) and dataclasses.is_dataclass(hint) else _as_float(x, hint)

  return {name: entry(name, x) for name, x in given.items()}


def _as_float(x: Any, hint: Any) -> Any:
  return float(x) if hint is float and type(x) is int and abs(x) <= _LARGEST else x


def parse(cls: type[T], given: Any, name: str = '') -> T:
  """Check names, types and bounds of a ConfigDict; return the dataclass. name: of a section; '' for the whole config.

  Raises:
    UsageError: a field is missing, unknown, of another type, not finite, out of bounds, unknown as a choice, or an
      address.
  """
  declared, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
  if not isinstance(given, ml_collections.ConfigDict):
    raise UsageError(f'config.{name}={short(given)} must be a section with the fields {", ".join(declared)}.')
  prefix = f'{name}.' if name else ''
  for key in given:
    if key not in declared:
      raise UsageError(f'config.{prefix}{key}: the config has no such field; {nearest(key, declared)}.')
  for key, f in declared.items():
    if key not in given:
      default = f'; its default is {short(f.default)}' if f.default is not REQUIRED else ''
      raise UsageError(f'config.{prefix}{key} is missing{default}.')
  return cls(**{key: _parse_field(f'{prefix}{key}', given[key], f, hints[key]) for key, f in declared.items()})


def _parse_field(name: str, value: Any, f: dataclasses.Field, hint: Any) -> Any:
  if dataclasses.is_dataclass(hint):
    return parse(hint, value, name)
  if 'entry' in f.metadata:
    if not isinstance(value, ml_collections.ConfigDict):
      raise UsageError(f'config.{name}={short(value)} must be a section of named entries.')
    cls = f.metadata['entry']
    return {key: parse(cls, x, f'{name}.{key}') if cls else x for key, x in value.items()}
  _check_type(name, value, hint)
  for i, x in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
    _check_value(name if i is None else f'{name}[{i}]', x, f.metadata)
  return value


def _check_type(name: str, value: Any, hint: Any) -> None:
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  for option in options:
    t = typing.get_origin(option) or option
    accepted = (int, float) if t is float else t
    if isinstance(value, accepted) and (t is bool or not isinstance(value, bool)):
      if isinstance(value, (int, float)) and not abs(value) <= _LARGEST:  # NaN is not, either
        break
      if t is tuple:
        [item, *_] = typing.get_args(option) or [object]
        for i, x in enumerate(value) if item is not object else ():
          _check_type(f'{name}[{i}]', x, item)
      return
  raise UsageError(f'config.{name}={short(value)} must be {" or ".join(map(_type_name, options))}.')


def _type_name(hint: Any) -> str:
  item = (typing.get_args(hint) or [None])[0]
  plural = _PLURALS.get(item, 'strings' if isinstance(item, types.UnionType) else None)
  return _NAMES.get(hint) or f'a tuple{f" of {plural}" if plural else ""}'


def _check_value(name: str, value: Any, m: Mapping[str, Any]) -> None:
  if m['path'] and isinstance(value, str):
    storage.path(value, f'config.{name}')
  if m['choices'] and isinstance(value, str):
    check_choice(name, value, m['choices'])
  if m['template']:
    _check_template(name, value)
  if isinstance(value, (int, float)) and not all(
      inside(value, m[b]) for b, inside in _BOUNDS.items() if m[b] is not None):
    off = '' if m['off'] is None else f'; {m["off"]:g} is off'
    raise UsageError(f'config.{name}={value} must be {bounds(m)}{off}.')


def bounds(m: Mapping[str, Any]) -> str:
  """'at least 1', 'in [0, 1)': the bounds in a field's metadata; '' if there are none."""
  low = [f'{bracket}{_plain(m[b])}' for b, bracket in (('at_least', '['), ('above', '(')) if m[b] is not None]
  high = [f'{_plain(m[b])}{bracket}' for b, bracket in (('at_most', ']'), ('below', ')')) if m[b] is not None]
  if low and high:
    return f'in {low[0]}, {high[0]}'
  return ' or '.join(f'{b.replace("_", " ")} {_plain(m[b])}' for b in _BOUNDS if m[b] is not None)


def _plain(bound: float) -> str:
  return str(bound) if isinstance(bound, int) else f'{bound:g}'  # all digits of a large whole number


def fail_if(wrong: Any, message: str) -> None:
  """Raise UsageError with a message, which 'config.' precedes, if something is wrong."""
  if wrong:
    raise UsageError(f'config.{message}')


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
  """Raise UsageError unless `value` is one of `choices`."""
  if value not in choices:
    raise UsageError(f'config.{name}={value!r} is unknown; {nearest(value, choices)}.')


def check_not_negative(name: str, value: Any, meaning: str, fix: str) -> None:
  """Raise UsageError unless `value`, inside a field of several types, is a finite number from 0 on."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  fail_if(not is_number or not 0 <= value <= _LARGEST,  # NaN is not, either
          f'{name}={short(value)} must be {meaning}, a finite number of at least 0; {fix}.')


def check_pattern(name: str, pattern: str) -> None:
  """Raise UsageError unless `pattern` is a regular expression."""
  try:
    re.compile(pattern)
  except re.error as e:
    raise UsageError(f'config.{name}={pattern!r} is not a regular expression: {e}.') from None


def _check_template(name: str, template: str) -> None:
  try:
    templates.parse(template)
  except UsageError as e:
    raise UsageError(f'config.{name}: {e}') from None


def short(value: Any) -> str:
  """`repr` in at most 60 characters."""
  try:
    text = repr(dict(value) if isinstance(value, Mapping) else value)
  except ValueError:  # an integer with thousands of digits
    return 'a number with thousands of digits'
  return text if len(text) <= 60 else f'{text[:57]}…'
