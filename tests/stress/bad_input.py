"""Bad input by hypothesis: it must end in one sentence with exit code 1 or 2, or in a counted skip.

Every property draws an input, writes it to a folder and processes it as the commands do. No input may cause a traceback
or a hang, execute code, or write outside its folder.
"""

import collections
import contextlib
import copy
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import strategies as st

from tests.helpers.same_examples import same_examples
from uni_moe_jax import __version__
from uni_moe_jax import config as config_lib
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config import presets
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.train import manifest, workdir
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.utils import exit_codes

REFUSED, FAILED, ACCEPTED = 'refused in one sentence (2)', 'failed in one sentence (1)', 'harmless: accepted (0)'
SKIPPED = 'skipped: '  # and the reason

_CODE = ("__import__('pathlib').Path('executed').touch()", '$(touch executed)', '`touch executed`',
         '; touch executed ;', "!!python/object/apply:os.system ['touch executed']",
         '{0.__class__.__init__.__globals__}', '%(x)s%n', '{name.__class__}')
ODD_STRINGS = st.sampled_from((
    *_CODE, '', ' ', '\0', 'a' * 100_000, '../' * 40 + 'etc/passwd', '~no_such_user/x', '\ud800', '\u202eמימין',
    '🙂' * 50, 'a\nb', '{', '}', '{}', '{{name}', '{name!r:>9}', '{name:>99999999}', '[', '(?P<', '*', '-1', 'nan',
    'None')) | st.text()
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ODD_STRINGS,
                    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(), s, max_size=3), max_leaves=4)
# Paths for which the system reports another error than a missing file, or that error.
UNREACHABLE = ('x' * 5000, 'x' * 300 + '/y', '/dev/null/x', '~no_such_user/x', '/proc/1/nothing/x',
               *(() if os.geteuid() == 0 else ('/proc/1/fd/x', '/proc/1/root/x')))  # root may access everything
_NOT_FINITE = (float('nan'), float('inf'), float('-inf'), 10**40, -10**40, 1e300)
# Sections in which a negative number is wrong. Elsewhere (means, seeds) it may be right.
_NOT_NEGATIVE = ('model', 'moe', 'tokenizer', 'optim', 'train', 'tasks', 'target_sets', 'evaluators', 'mesh')
_CHOICES = ('posemb', 'prompt_sharing', 'dtype', 'router', 'gmm', 'placement', 'type', 'mixture',
            'contrastive_reduction', 'schedule', 'unused_params', 'family', 'softmax', 'target_set')


@dataclasses.dataclass(frozen=True)
class Case:
  """An input.

  Attributes:
    main: processes it; returns an exit code, or 'skipped: …' if it was skipped and counted.
    bad: it must not be accepted.
    timeout: seconds.
  """
  main: Callable[[], int | str]
  bad: bool = False
  timeout: int = 20


Property = Callable[[Callable[[st.SearchStrategy], Any], pathlib.Path], Case]  # of `draw` and an empty folder


def check(prop: Property, num_examples: int, seed: int, folder: pathlib.Path,
          shrink: bool = True) -> collections.Counter[str]:
  """Process inputs of a property. Return their number per outcome. Raises AssertionError for the simplest violation."""
  counts, phases = collections.Counter(), [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])]

  @hypothesis.settings(max_examples=num_examples, deadline=None, database=None, phases=phases,
                       report_multiple_bugs=False, suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.seed(seed)
  @hypothesis.given(st.data())
  def process(data):
    for name in ('input', 'cwd'):
      shutil.rmtree(folder / name, ignore_errors=True)
      (folder / name).mkdir(parents=True)
    case = prop(data.draw, folder / 'input')
    with contextlib.chdir(folder / 'cwd'):
      result = outcome(case)
    written = sorted(path.name for path in (folder / 'cwd').iterdir())
    assert not written, f'wrote {written} to the working directory: code was executed'
    assert result.startswith((REFUSED, FAILED, ACCEPTED, SKIPPED)), result
    assert result != ACCEPTED or not case.bad, 'accepted, although it is bad'
    counts[result] += 1

  with _silent_libraries(), same_examples():
    process()
  return counts


class _Hang(BaseException):
  """No Exception, so that nothing handles it as an error of its own."""


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
  def stop(*_):
    raise _Hang
  old = signal.signal(signal.SIGALRM, stop)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def _silent_libraries() -> Iterator[None]:
  """Discard what C libraries print about damaged images. Python's own standard error is still checked."""
  errors, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 2)
  try:
    yield
  finally:
    os.dup2(errors, 2)
    os.close(errors)
    os.close(null)


def outcome(case: Case) -> str:
  """Process an input as the commands do, and describe the result."""
  errors = io.StringIO()
  try:
    with _time_limit(case.timeout), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
      code = cli.guarded(case.main)
  except _Hang:
    return f'HANGS for more than {case.timeout} s'
  except (Exception, SystemExit) as e:
    frame = traceback.extract_tb(e.__traceback__)[-1]
    return f'TRACEBACK {type(e).__name__}: {str(e)[:80]!r} at {pathlib.Path(frame.filename).name}:{frame.lineno}'
  if isinstance(code, str):
    return code
  lines = [line for line in errors.getvalue().splitlines() if line and not line.startswith(('note: ', 'warning: '))]
  if code == exit_codes.FINISHED:
    return ACCEPTED
  if len(lines) != 1 or not lines[0].startswith('error: '):
    return f'exit code {code} WITHOUT ONE SENTENCE: {errors.getvalue()[-200:]!r}'
  return {exit_codes.USAGE: REFUSED, exit_codes.ERROR: FAILED}.get(code, f'EXIT CODE {code}')


def skipped(*reasons: str) -> str:
  """Return the outcome of skipped rows: the first reason, without what it quotes of the input."""
  return SKIPPED + re.sub(r"'.*'|\".*\"", '…', sorted(reasons)[0])


def corrupted(content: bytes) -> st.SearchStrategy[bytes]:
  """Draw a file as crashes, disks and editors leave it."""
  positions, few_bytes = st.integers(0, max(0, len(content) - 1)), st.binary(min_size=1, max_size=8)

  def flip(bits):
    out = bytearray(content)
    for position, bit in bits if out else ():
      out[position] ^= 1 << bit
    return bytes(out)

  return st.one_of(
      positions.map(lambda i: content[:i]),
      st.lists(st.tuples(positions, st.integers(0, 7)), min_size=1, max_size=8).map(flip),
      st.tuples(positions, few_bytes).map(lambda p: content[:p[0]] + p[1] + content[p[0]:]),
      st.sampled_from((bytes(len(content)), b'', b'[' * 100_000, b'{"config": ' + b'9' * 6000 + b'}')),
      st.binary(max_size=64), JSON.map(lambda value: json.dumps(value).encode()))


def _base_config() -> dict[str, Any]:
  """Return a valid config with tasks of six types and evaluators, as in JSON."""
  c = config_lib.base()
  presets.embedded(c)
  return json.loads(json.dumps(c.to_dict()))


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
  return [p for k, v in tree.items() for p in _leaves(v, (*path, k))] if isinstance(tree, dict) and tree else [path]


def _get(tree: Any, path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


_BASE = _base_config()
_LEAVES = _leaves(_BASE)
_SECTIONS = sorted({p[:i] for p in _LEAVES for i in range(1, len(p))})
_NUMBERS = [p for p in _LEAVES if type(_get(_BASE, p)) in (int, float)]
_STRINGS = [p for p in _LEAVES if isinstance(_get(_BASE, p), str)]
_FREE_FORM = {('moe', 'placement'): (str, list), ('task_types',): (dict,), ('target_families',): (dict,),
              **{('target_sets', name, 'entries'): (str, list) for name in _BASE['target_sets']}}


def _has_other_type(path: tuple[str, ...], value: Any) -> bool:
  right = type(_get(_BASE, path))
  return type(value) not in ((int, float) if right is float else (right,)) + _FREE_FORM.get(path, ())


@st.composite
def bad_fields(draw) -> tuple[tuple[str, ...], Any, bool]:
  """Draw (path, value, whether the value is surely bad) of a config field."""
  mistake = draw(st.sampled_from(
      ('wrong type', 'not finite', 'negative', 'unknown choice', 'unknown field', 'odd string')))
  if mistake == 'wrong type':
    path, value = draw(st.sampled_from(_LEAVES)), draw(JSON)
    return path, value, _has_other_type(path, value)
  if mistake == 'not finite':
    return draw(st.sampled_from(_NUMBERS)), draw(st.sampled_from(_NOT_FINITE)), True
  if mistake == 'negative':
    path = draw(st.sampled_from([p for p in _NUMBERS if p[0] in _NOT_NEGATIVE]))
    size = draw(st.sampled_from((2, 3, 10**6) if isinstance(_get(_BASE, path), int) else (.5, 2., 1e6)))
    return path, -size, True
  if mistake == 'unknown choice':
    path = draw(st.sampled_from([p for p in _STRINGS if p[-1] in _CHOICES and _get(_BASE, p)]))
    return path, _get(_BASE, path) + draw(st.sampled_from(('x', '?', '_', ' '))), True
  if mistake == 'unknown field':
    section = draw(st.sampled_from(_SECTIONS))
    return (*section, draw(st.sampled_from(('widht', 'lr', '__class__', 'items'))) + '7'), 3, True
  return draw(st.sampled_from(_STRINGS)), draw(ODD_STRINGS), False


def _changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
  tree = copy.deepcopy(_BASE)
  _get(tree, path[:-1])[path[-1]] = value
  return tree


def _write_config(folder: pathlib.Path, content: bytes | dict[str, Any]) -> None:
  if isinstance(content, dict):
    content = json.dumps({'uni_moe_jax': __version__, 'config': _BASE, 'data': None, 'versions': {}} | content).encode()
  (folder / workdir.CONFIG_FILE).write_bytes(content)


def _load_config(folder: pathlib.Path) -> int:
  c = workdir.load_config(folder)
  workdir.check_workdir(folder, c)
  workdir.check_versions(folder)
  make_plan(c).check_trains()
  file_dataset.check_directory(c.data.dir)
  return exit_codes.FINISHED


def config(draw, folder: pathlib.Path) -> Case:
  """A work directory whose config has a mistake."""
  path, value, bad = draw(bad_fields())
  _write_config(folder, {'config': _changed(path, value)})
  return Case(lambda: _load_config(folder), bad)


def config_file(draw, folder: pathlib.Path) -> Case:
  """A work directory whose config.json is damaged."""
  versions = JSON.map(lambda v: {'versions': v}) | JSON.map(lambda v: {'versions': {'jax': v}}) | JSON.map(
      lambda v: {'versions': {'jax': '9.9'}, 'earlier_versions': v}) | JSON.map(lambda v: {'uni_moe_jax': v})
  _write_config(folder, {})
  _write_config(folder, draw(versions | corrupted((folder / workdir.CONFIG_FILE).read_bytes())))
  return Case(lambda: _load_config(folder))


def unreachable_path(draw, folder: pathlib.Path) -> Case:
  """A data directory or a work directory that cannot be accessed."""
  is_data_dir, path = draw(st.booleans()), draw(st.sampled_from(UNREACHABLE))
  hypothesis.assume(is_data_dir or not path.startswith('~'))  # a work directory's name may start with '~'
  c = config_lib.base()
  c.data.dir = path if is_data_dir else str(folder)

  def main() -> int:
    file_dataset.check_directory(c.data.dir)
    new = folder / 'run' if is_data_dir else path
    workdir.check_workdir(new, c)
    workdir.claim_workdir(new, c, 'fingerprint')
    return exit_codes.FINISHED
  return Case(main, bad=True)


def checkpoint(draw, folder: pathlib.Path) -> Case:
  """A checkpoint in which one small file, such as the manifest, is damaged."""
  step = folder / workdir.CHECKPOINTS / '7'
  unnamed = step.with_name('7.tmp')
  (unnamed / 'default').mkdir(parents=True)
  (unnamed / 'default/array').write_bytes(bytes(range(200)))
  (unnamed / '_CHECKPOINT_METADATA').write_text(json.dumps({'init_timestamp_nsecs': 1}))
  manifest.write(unnamed, step, {'loss/total': 1.5}, {'params': 3}, {})
  unnamed.rename(step)
  (step / 'commit_success.txt').write_text(f'Checkpoint commit was successful to {step}')
  path = step / draw(st.sampled_from(('manifest.json', '_CHECKPOINT_METADATA', 'commit_success.txt', 'default/array')))
  old, new = path.read_bytes(), draw(corrupted(path.read_bytes()))
  path.write_bytes(new)

  def main() -> int:
    with Checkpoints(folder, max_to_keep=None) as checkpoints:
      checkpoints.latest()
    return exit_codes.FINISHED
  return Case(main, bad=new != old)


PROPERTIES: dict[str, Property] = {
    'config': config, 'config_file': config_file, 'checkpoint': checkpoint, 'path': unreachable_path}
