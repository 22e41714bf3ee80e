"""Generated bad input through the commands' error boundary: one clear sentence or a counted skip, and nothing else."""

import collections
import contextlib
import dataclasses
import io
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping

from uni_moe_jax.faults import bad_configs, bad_files
from uni_moe_jax.faults.bad_configs import CANARY, UNREACHABLE, Case
from uni_moe_jax.faults.bad_files import SKIPPED
from uni_moe_jax.utils import cli, exit_codes

KINDS = {**bad_configs.KINDS, **bad_files.KINDS}
_HANGS = 20  # seconds for one input
_ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Result:
  """Counts by 'class → outcome', and a sentence for each input that did what none may do."""
  counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  findings: list[str] = dataclasses.field(default_factory=list)


class _Hangs(BaseException):
  """Is no Exception, so that nothing on the way takes it for an error of its own."""


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
  def stop(*_):
    raise _Hangs
  old = signal.signal(signal.SIGALRM, stop)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def _libraries_silent() -> Iterator[None]:
  """Without what libraries of C print of every damaged picture; what Python prints is looked at all the same."""
  errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(errors, 2)
    os.close(errors)
    os.close(nowhere)


def through_boundary(number: int, seed: int, folder: pathlib.Path,
                     kinds: Mapping[str, Callable[[random.Random, pathlib.Path], Case]] = KINDS) -> Result:
  """Runs generated inputs in this process.

  Args:
    number: of inputs that are bad in truth, shared out among the kinds. Damage that turned out to be none, so that the input was
      accepted, is counted and does not count; of ten times as many inputs no more are made.
    seed: they follow from it.
    folder: is emptied for every input.
    kinds: generators by name.
  """
  result, names, here, bad = Result(), list(kinds), os.getcwd(), 0
  folder.mkdir(parents=True, exist_ok=True)
  os.chdir(folder)  # where code that was executed would leave its mark
  try:
    with _libraries_silent():
      for i in range(10 * number):
        if bad == number:
          break
        rng = random.Random(f'{seed} {i}')
        place = folder / 'input'
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        case = kinds[names[i % len(names)]](rng, place)
        outcome = judged(case)
        bad += case.bad or outcome != ACCEPTED
        result.counts[f'{case.kind} → {outcome}'] += 1
        if not outcome.startswith((REFUSED, FAILED, ACCEPTED, SKIPPED)) or outcome == ACCEPTED and case.bad:
          result.findings.append(f'seed {seed}, input {i}, {case.kind}, {case.what}: {outcome}')
        if pathlib.Path(CANARY).exists():
          result.findings.append(f'seed {seed}, input {i}, {case.kind}, {case.what}: code was executed')
          pathlib.Path(CANARY).unlink()
  finally:
    os.chdir(here)
  return result


REFUSED, FAILED, ACCEPTED = 'refused in one sentence (2)', 'failed in one sentence (1)', 'harmless: accepted (0)'


def judged(case: Case) -> str:
  """What came of an input."""
  said = io.StringIO()
  try:
    with _at_most(_HANGS), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
      code = cli.guarded(case.main)
  except _Hangs:
    return f'HANGS for more than {_HANGS} s'
  except BaseException as e:
    place = traceback.extract_tb(e.__traceback__)[-1]
    return f'TRACEBACK {type(e).__name__}: {str(e)[:80]!r} at {pathlib.Path(place.filename).name}:{place.lineno}'
  return code if isinstance(code, str) else _of_code(code, said.getvalue())


def _of_code(code: int, said: str) -> str:
  lines = [line for line in said.splitlines() if line and not line.startswith(('note: ', 'warning: '))]
  if code == exit_codes.FINISHED:
    return ACCEPTED
  if len(lines) != 1 or not lines[0].startswith('error: '):
    return f'exit code {code} WITHOUT ONE SENTENCE: {said[-200:]!r}'
  return REFUSED if code == exit_codes.USAGE else FAILED if code == exit_codes.ERROR else f'EXIT CODE {code}'


def through_command_line(number: int, seed: int, folder: pathlib.Path) -> Result:
  """Runs generated mistakes as commands: overrides of a config, mistyped flags, damaged work directories, paths that cannot be
  reached, people's own data that is bad."""
  result = Result()
  for i in range(number):
    rng = random.Random(f'{seed} command {i}')
    place = folder / 'input'
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    kind, arguments = rng.choice(_COMMANDS)(rng, place)
    try:
      done = subprocess.run(
          [sys.executable, *arguments], cwd=place, capture_output=True, text=True, timeout=60, errors='replace',
          env={**os.environ, 'PYTHONPATH': str(_ROOT)})
      outcome = _of_code(done.returncode, done.stderr)
    except subprocess.TimeoutExpired:
      outcome = 'HANGS for more than 60 s'
    result.counts[f'{kind} → {outcome}'] += 1
    if outcome not in (REFUSED, FAILED):
      result.findings.append(f'seed {seed}, command {i}, {kind}, {" ".join(arguments)[:200]}: {outcome}')
    if (place / CANARY).exists():
      result.findings.append(f'seed {seed}, command {i}, {kind}: code was executed')
  return result


def _script(name: str) -> str:
  return str(_ROOT / 'launch' / name)


def _override(rng: random.Random, place: pathlib.Path) -> tuple[str, list[str]]:
  tree, what, bad = None, '', False
  while not bad or '\0' in what:  # no command line can hold it
    make = rng.choice((bad_configs.wrong_type, bad_configs.not_finite, bad_configs.negative, bad_configs.unknown_name,
                       bad_configs.unknown_field))
    tree, what, bad = make(rng)
    name, _, value = what.partition('=')
    # The command line reads texts by the type of the field: some of another type in JSON are right there.
    bad = bad and name.partition('.')[0] in ('model', 'moe', 'train', 'optim') and value[:1] not in "'[({"
    bad = bad and value not in ('None', 'True', '3', '2.5', '')
  del tree
  return 'override', [_script('train.py'), f'--config={_ROOT}/configs/quickstart.py', f'--workdir={place}/run', f'--config.{what}']


def _mistyped_flag(rng: random.Random, place: pathlib.Path) -> tuple[str, list[str]]:
  script = rng.choice(('train.py', 'evaluate.py', 'interference.py', 'report.py', 'benchmark.py', 'prepare_data.py', 'convert.py'))
  flag = rng.choice(('--wrokdir=x', '--workdir', 'x', '--config=nowhere.py', '--config=../../x.py:a', '--=', '--config.model.width=3'))
  return 'flag', [_script(script), f'--nothing{rng.randrange(99)}', flag] if rng.random() < .5 else [
      _script(script), flag, f'--workdir={place}/x', f'--nothing{rng.randrange(99)}']


def _damaged_folder(rng: random.Random, place: pathlib.Path) -> tuple[str, list[str]]:
  make = rng.choice((bad_configs.config_case, bad_configs.config_file_case))
  case = make(rng, place)
  while make is bad_configs.config_case and not case.bad:
    case = make(rng, place)
  if make is bad_configs.config_file_case:  # some damage is none: here it must be damage
    (place / 'config.json').write_bytes((place / 'config.json').read_bytes()[:rng.randrange(1, 50)])
  script = rng.choice(('train.py', 'evaluate.py', 'interference.py'))
  config = [f'--config={_ROOT}/configs/quickstart.py'] if script == 'train.py' else []
  return 'damaged work directory', [_script(script), f'--workdir={place}', *config]


def _unreachable(rng: random.Random, place: pathlib.Path) -> tuple[str, list[str]]:
  path = rng.choice(UNREACHABLE)
  train = [_script('train.py'), f'--config={_ROOT}/configs/quickstart.py']
  source = place / 'train.txt'
  source.write_text('one line\n')
  return 'unreachable path', rng.choice((
      # Both are wrong, so that the command ends before it loads what is slow.
      [*train, f'--workdir={path}', f'--config.data.dir={place}/nowhere'], [*train, f'--workdir={place}/run', f'--config.data.dir={path}'],
      [_script('prepare_data.py'), f'--input={path}', '--name=x', f'--data_dir={place}'],
      [_script('prepare_data.py'), f'--input={source}', '--name=x', f'--data_dir={path}']))


def _own_data(rng: random.Random, place: pathlib.Path) -> tuple[str, list[str]]:
  source = place / rng.choice(('data.jsonl', 'data.txt', 'data', 'data.csv'))
  if source.suffix == '.jsonl':  # every row is bad
    names = ('{"image": "gone.png"}', '{', '[]', '{"label": 3}', '\0', '{"captions": "a"}', '{"image": "data.jsonl"}', '[' * 9999)
    source.write_text('\n'.join(rng.choice(names) for _ in range(5)))
  elif source.suffix == '.txt':
    source.write_bytes(rng.choice((b'', b'\n \n', b'\r' * 99)))
  elif not source.suffix:
    (source / rng.choice(('a', 'b/c/d/e'))).mkdir(parents=True)
    (source / 'a.png').write_bytes(rng.randbytes(99))
  more = rng.choice(([], [], ['--max_corrupt_fraction=1'], ['--test_fraction=2'], ['--version=1'], ['--gif=film'], ['--name=../x']))
  return 'own data', [_script('prepare_data.py'), f'--input={source}', '--name=x', f'--data_dir={place}/out', *more]


_COMMANDS = (_override, _mistyped_flag, _damaged_folder, _unreachable, _own_data)
