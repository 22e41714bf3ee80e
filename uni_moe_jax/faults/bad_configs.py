"""Generated mistakes in a config and damage of what a run keeps in its folder. Each is a folder and what to do with it."""

import copy
import dataclasses
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

from uni_moe_jax import config as config_lib
from uni_moe_jax.config import presets
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.pipeline import npz_records
from uni_moe_jax.train import manifest, workdir
from uni_moe_jax.train.checkpoint import Checkpoints

CANARY = 'executed'  # a file that no input may make
CODE = (f"__import__('pathlib').Path('{CANARY}').touch()", f'$(touch {CANARY})', f'`touch {CANARY}`', f'; touch {CANARY} ;',
         f"!!python/object/apply:os.system ['touch {CANARY}']", '{0.__class__.__init__.__globals__}', '%(x)s%n', '{name.__class__}')
ODD_TEXTS = (*CODE, '', ' ', '\0', 'a' * 100_000, '../' * 40 + 'etc/passwd', '~nobody_of_this_name/x', '\ud800', '‮מימין', '🙂' * 50,
              'line\nbreak', '{', '}', '{}', '{{name}', '{name!r:>9}', '{name:>99999999}', '[', '(?P<', '*', '-1', 'nan', 'None')
# Paths of which the system says more than that nothing is there, or says that.
UNREACHABLE = ('x' * 5000, 'x' * 300 + '/y', '/dev/null/x', '~nobody_of_this_name/x', '/proc/1/nothing/x',
               *(() if os.geteuid() == 0 else ('/proc/1/fd/x', '/proc/1/root/x')))  # to root nothing is denied
WRONG_TYPES: tuple[Any, ...] = (None, 'text', 3, 2.5, True, [], {}, [None], [{'a': 1}], {'a': 1}, [[[]]])
_NOT_FINITE = (float('nan'), float('inf'), float('-inf'), 10**40, -10**40, 1e300)
# Where a negative number is wrong. Elsewhere (means, seeds) it may be meant.
_NOT_NEGATIVE = ('model.', 'moe.', 'tokenizer.', 'optim.', 'train.', 'tasks.', 'target_sets.', 'evaluators.', 'mesh.')
_NAMES = ('model.posemb', 'model.prompt_sharing', 'model.text_posemb_init', 'model.mimetic_init', 'model.dtype', 'moe.router', 'moe.gmm',
          'moe.placement', 'tokenizer.type', 'train.mixture', 'train.contrastive_reduction', 'train.mask_duplicate_texts', 'optim.schedule',
          'optim.unused_params', 'kind', 'family', 'scoring', 'target_set')


@dataclasses.dataclass(frozen=True)
class Case:
  """An input.

  Attributes:
    kind: class under which it is counted.
    what: for whoever looks for its cause.
    main: reads it, as the commands do; returns an exit code, or 'skipped: …' where it was skipped and counted.
    bad: it must be refused; otherwise it may also be right, or harmless.
  """
  kind: str
  what: str
  main: Callable[[], int | str]
  bad: bool


def base_config() -> dict[str, Any]:
  """A right one, with tasks of six kinds and evaluators, as JSON has it."""
  c = config_lib.base()
  presets.embedded(c)
  return json.loads(json.dumps(c.to_dict()))


_BASE = base_config()


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
  if not isinstance(tree, dict) or not tree:
    return [path]
  return [p for k, v in tree.items() for p in _leaves(v, (*path, k))]


_LEAVES = _leaves(_BASE)
_SECTIONS = sorted({p[:i] for p in _LEAVES for i in range(1, len(p))})


def _at(tree: Any, path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
  tree = copy.deepcopy(_BASE)
  _at(tree, path[:-1])[path[-1]] = value
  return tree


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _of(rng: random.Random, test: Callable[[str, Any], bool]) -> tuple[str, ...]:
  return rng.choice([p for p in _LEAVES if test('.'.join(p), _at(_BASE, p))])


def wrong_type(rng: random.Random) -> tuple[dict, str, bool]:
  """A value of another type than its field's."""
  path = rng.choice(_LEAVES)
  right = _at(_BASE, path)
  def fits(value):
    if _is_number(right):
      return _is_number(value) and (isinstance(right, float) or isinstance(value, int))
    return type(value) is type(right)
  values = [v for v in WRONG_TYPES if not fits(v) and not ('.'.join(path) in ('moe.placement', *_set_values()) and v in ('text', []))
            and not (path[0] in ('kinds', 'families') and v in ({}, {'a': 1}))]
  value = rng.choice(values)
  return _changed(path, value), f'{".".join(path)}={value!r}', True


def _set_values() -> list[str]:
  return [f'target_sets.{name}.entries' for name in _BASE['target_sets']]


def not_finite(rng: random.Random) -> tuple[dict, str, bool]:
  """No number that a computation can take."""
  path, value = _of(rng, lambda _, v: _is_number(v)), rng.choice(_NOT_FINITE)
  return _changed(path, value), f'{".".join(path)}={value!r}', True


def negative(rng: random.Random) -> tuple[dict, str, bool]:
  """A negative size, count, rate or weight."""
  path = _of(rng, lambda name, v: _is_number(v) and name.startswith(_NOT_NEGATIVE))
  value = -rng.choice((2, 3, 10**6)) if isinstance(_at(_BASE, path), int) else -rng.choice((.5, 2., 1e6))
  return _changed(path, value), f'{".".join(path)}={value!r}', True


def unknown_name(rng: random.Random) -> tuple[dict, str, bool]:
  """A name that is mistyped, where names are few."""
  path = _of(rng, lambda name, v: v and isinstance(v, str) and (name in _NAMES or len(name.split('.')) == 3 and name.split('.')[2] in _NAMES))
  right = _at(_BASE, path)
  value = rng.choice([right + rng.choice('xyz'), right[:-1] + '?', right.upper() + '_', *ODD_TEXTS[:12]])
  return _changed(path, value), f'{".".join(path)}={value[:60]!r}', bool(value)


def unknown_field(rng: random.Random) -> tuple[dict, str, bool]:
  """A field that there is not."""
  section, name = rng.choice(_SECTIONS), f'{rng.choice(("widht", "lr", "x", "__class__", "items"))}{rng.randrange(100)}'
  if section in (('tasks',), ('sets',), ('evaluators',)):
    return _changed((*section, name), rng.choice((None, 3, 'text', []))), f'{".".join(section)}.{name}', True
  return _changed((*section, name), 3), f'{".".join(section)}.{name}', True


def odd_text(rng: random.Random) -> tuple[dict, str, bool]:
  """Text that is long, foreign, broken, or looks like code."""
  path, value = _of(rng, lambda _, v: isinstance(v, str)), rng.choice(ODD_TEXTS)
  return _changed(path, value), f'{".".join(path)}={value[:60]!r}', False


CONFIGS = (wrong_type, not_finite, negative, unknown_name, unknown_field, odd_text)


def config_case(rng: random.Random, folder: pathlib.Path) -> Case:
  """A work directory whose config has a mistake."""
  make = rng.choice(CONFIGS)
  tree, what, bad = make(rng)
  (folder / workdir.CONFIG_FILE).write_text(json.dumps({'config': tree, 'data': None, 'versions': {}}))
  return Case(f'config: {make.__name__.replace("_", " ")}', what, lambda: _read_config(folder), bad)


def _read_config(folder: pathlib.Path) -> int:
  c = workdir.load_config(folder)
  workdir.claim_workdir(folder, c)
  workdir.check_versions(folder)
  make_plan(c).check_trains()
  npz_records.check_directory(c.data.dir)
  return 0


def mangled(rng: random.Random, content: bytes) -> bytes:
  """A file as crashes, disks and editors leave it."""
  at = rng.randrange(len(content))
  return rng.choice((
      lambda: content[:at],
      lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:],
      lambda: content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:],
      lambda: bytes(len(content)),
      lambda: b'',
      lambda: rng.randbytes(64),
      lambda: b'[' * 100_000,
      lambda: b'{"config": ' + b'9' * 6000 + b'}',
      lambda: b'{"config": {"model": 3}}',
      lambda: json.dumps(rng.choice(WRONG_TYPES)).encode()))()


def config_file_case(rng: random.Random, folder: pathlib.Path) -> Case:
  """A work directory whose config.json is damaged."""
  content = json.dumps({'config': _BASE, 'data': None, 'versions': {}}).encode()
  if rng.random() < .3:
    odd = rng.choice((*WRONG_TYPES, *ODD_TEXTS))
    content = json.dumps({'config': _BASE, **rng.choice((
        {'versions': odd}, {'versions': {'jax': odd}}, {'versions': {'jax': '9.9'}, 'earlier_versions': odd}))}).encode()
  else:
    content = mangled(rng, content)
  (folder / workdir.CONFIG_FILE).write_bytes(content)
  return Case('config.json: damaged', repr(content[:60]), lambda: _read_config(folder), False)


def path_case(rng: random.Random, folder: pathlib.Path) -> Case:
  """A data directory or a work directory that cannot be reached."""
  of_data = rng.random() < .5
  # A work directory's name may begin with '~': it lies where the command runs, as the shell left it.
  path = rng.choice([p for p in UNREACHABLE if of_data or not p.startswith('~')])
  c = config_lib.base()
  c.data.dir = path if of_data else str(folder)

  def main() -> int:
    npz_records.check_directory(c.data.dir)
    workdir.claim_workdir(folder / 'run' if of_data else path, c)
    workdir.claim_workdir(folder / 'run' if of_data else path, c, fingerprint='print')
    return 0
  return Case('path', f'{"data.dir" if of_data else "--workdir"}={path[:60]}', main, True)


def metadata_case(rng: random.Random, folder: pathlib.Path) -> Case:
  """A checkpoint of which one small file, that says what the others are, is damaged."""
  step = folder / workdir.CHECKPOINTS / '7'
  shutil.rmtree(step, ignore_errors=True)
  (step / 'default').mkdir(parents=True)
  (step / 'default/array').write_bytes(rng.randbytes(200))
  (step / '_CHECKPOINT_METADATA').write_text(json.dumps({'init_timestamp_nsecs': 1}))
  manifest.write(step, step, {'loss/total': 1.5})
  (step / 'commit_success.txt').write_text(f'Checkpoint commit was successful to {step}')
  name = rng.choice(('manifest.json', '_CHECKPOINT_METADATA', 'commit_success.txt', 'default/array'))
  before = (step / name).read_bytes()
  after = mangled(rng, before)
  (step / name).write_bytes(after)
  return Case(f'checkpoint: damaged {name}', repr(after[:60]), lambda: _open_checkpoints(folder), after != before)


def _open_checkpoints(folder: pathlib.Path) -> int:
  with Checkpoints(folder, max_to_keep=None) as checkpoints:
    checkpoints.latest()
  return 0


KINDS = {'config': config_case, 'config.json': config_file_case, 'checkpoint': metadata_case, 'path': path_case}
