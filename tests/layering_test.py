"""Who may import whom: parsed from the source, so that nothing is imported to find out."""

import ast
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PACKAGE = 'uni_moe_jax'
_MAX_LINES = 400
_MAX_MAIN_LINES = 80

# room -> (the rooms it may import besides itself, why)
_RULES = {
    'failures': ((), 'what befalls a run can befall every room'),
    'exit_codes': ((), 'numbers that the shell knows, too'),
    'heap': ((), 'the C library knows nothing of models'),
    'attributes': ((), 'the bits of a token follow from plain values; all others read them'),
    'tasks': (('attributes',), 'a task kind is a declaration from which attributes follow'),
    'plan': (('attributes', 'tasks'), 'the static facts of a run are made of kinds and conditions'),
    'config': ((), 'fields and defaults: plain values'),
    'files': ((), 'whole or not at all: what a file holds is not its business'),
    'fields': (('tasks', 'config', 'files'), 'the type of a field is that of its default; some are paths'),
    'resolve': (
        ('attributes', 'tasks', 'plan', 'config', 'fields'),
        'a config is checked against the tables, before any model or data exists',
    ),
    'recipes': (('config',), 'a recipe fills in a config, as a person would'),
    'benchmarks': (('config',), 'a table of tasks fills in a config, as a recipe does'),
    'cli': (
        ('failures', 'exit_codes', 'heap', 'attributes', 'tasks', 'plan', 'config', 'files'),
        'a mistyped command is answered before anything slow is loaded',
    ),
    'distributed': ((), 'processes find each other before anything of the run is loaded'),
    'sharding': ((), 'one table of axis names that knows no module'),
    'losses': ((), 'arrays in, numbers out: a loss knows neither the model nor the task'),
    'moe': (
        ('attributes', 'tasks', 'sharding'),
        'routers and experts are parts of a model and know no model',
    ),
    'model': (
        ('attributes', 'tasks', 'sharding', 'moe'),
        'a model knows neither where its batches come from nor what becomes of its outputs',
    ),
    'data': (
        ('failures', 'attributes', 'tasks', 'plan', 'config'),
        'records become batches of declared kinds, and no model is needed for that',
    ),
    'eval': (
        ('files', 'attributes', 'tasks', 'plan', 'config', 'sharding', 'losses', 'moe', 'model', 'data'),
        'an evaluator is given functions, so that every model is measured alike',
    ),
    'train': (
        ('files', 'failures', 'exit_codes', 'heap', 'attributes', 'tasks', 'plan', 'config', 'resolve', 'distributed', 'sharding',
         'losses', 'model', 'data', 'eval'),
        'the trainer joins the other rooms; experts it knows only through the model',
    ),
    'restarts': (('exit_codes', 'train'), 'it reads from a work directory how far the command that it starts has come'),
    'regimes': (
        ('tasks', 'plan', 'config', 'resolve', 'recipes', 'train'),
        'a regime makes a config from that of a run, which lies in its work directory',
    ),
    'study': (
        ('exit_codes', 'plan', 'config', 'resolve', 'recipes', 'data', 'eval', 'train', 'regimes'),
        'it reads what the commands wrote into work directories, and compares it',
    ),
    'compare': (
        ('files', 'exit_codes', 'eval', 'train', 'study'),
        'it reads what the commands wrote into work directories; how studies run and tabulate it shares with them',
    ),
    'export': (
        ('attributes', 'tasks', 'plan', 'config', 'sharding', 'losses', 'moe', 'model', 'data', 'eval'),
        'a finished model is exported without the machinery that trained it',
    ),
    'preflight': (
        ('attributes', 'tasks', 'plan', 'config', 'resolve', 'sharding', 'losses', 'moe', 'model', 'data', 'eval',
         'train'),
        'it compiles the real training step, so it sees what the trainer sees',
    ),
    'bench': (
        ('attributes', 'tasks', 'plan', 'config', 'resolve', 'recipes', 'sharding', 'losses', 'moe', 'model', 'data',
         'eval', 'train', 'export'),
        'it times the real step, the real decoder and the merged model, and nothing that is timed knows of it',
    ),
    'faults': (
        ('failures', 'exit_codes', 'heap', 'config', 'resolve', 'recipes', 'cli', 'data', 'train', 'restarts'),
        'it breaks what the commands make, and nothing that is broken knows of it',
    ),
    'figures': ((), 'numbers in, pictures out: a figure does not know what its numbers mean'),
    'training_curves': (('figures',), 'reads a file of metrics, whoever wrote it'),
    'report': (
        ('attributes', 'tasks', 'plan', 'config', 'data', 'eval', 'figures', 'training_curves'),
        'it draws what the commands wrote into the workdir and needs no model',
    ),
}
_NOT_IMPORTED = {
    'launch': 'the commands are the root: what two of them share belongs to the package',
    'configs': 'a config is named on the command line and read by path',
}


def _imports(path: pathlib.Path) -> list[tuple[int, str]]:
  """Returns (line, dotted name) of every import in a file, inside functions and by string, too."""
  found = []
  for node in ast.walk(ast.parse(path.read_text(), str(path))):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = '.' * node.level + (node.module or '')
      found += [(node.lineno, f'{base}.{alias.name}') for alias in node.names]
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
      function = ast.unparse(node.func).rpartition('.')[2]
      if function in ('import_module', '__import__'):
        found.append((node.lineno, str(node.args[0].value)))
  return found


def _room(parts: tuple[str, ...]) -> str:
  """Returns the room of a dotted name or path below the package; '' is the package itself."""
  first = parts[0].removesuffix('.py') if parts else ''
  return '' if first == '__init__' else first


def violations(root: pathlib.Path) -> list[str]:
  """Returns one sentence, 'file:line: what, why', for every breach of the rules below `root`."""
  found = []
  folders = (_PACKAGE, 'launch', 'configs', 'tests')
  for path in sorted(path for folder in folders for path in (root / folder).rglob('*.py')):
    name = path.relative_to(root)
    lines = len(path.read_text().splitlines())
    limit = _MAX_MAIN_LINES - 1 if name.parts[0] == 'launch' else _MAX_LINES
    if lines > limit:
      found.append(f'{name}: {lines} lines, at most {limit}: which room is missing?')
    in_package = name.parts[0] == _PACKAGE
    room = _room(name.parts[1:]) if in_package else None
    if room and room not in _RULES:
      found.append(f'{name}: {room!r} is no known room ({", ".join(_RULES)})')
      continue
    for line, target in _imports(path):
      top, *below = target.split('.')
      if not top:
        found.append(f'{name}:{line}: relative import {target!r}; write the full name')
      elif top in _NOT_IMPORTED and name.parts[0] != 'tests':
        found.append(f'{name}:{line}: imports {target}, but {_NOT_IMPORTED[top]}')
      elif in_package and top == _PACKAGE:
        other = _room(tuple(below))
        # `from uni_moe_jax import __version__` and `import uni_moe_jax` name no room.
        if other and not other.startswith('__') and other != room:
          allowed, why = _RULES.get(room, ((), 'importing the package must cost nothing'))
          if other not in allowed:
            found.append(f'{name}:{line}: {room or "__init__"} imports {other}, but {why}')
  return found


def test_the_repository_keeps_its_rules():
  found = violations(_ROOT)
  assert not found, '\n'.join(found)


def test_the_rules_allow_no_circle():
  order = list(_RULES)
  for room, (allowed, _) in _RULES.items():
    assert all(order.index(other) < order.index(room) for other in allowed), room


@pytest.mark.parametrize('file, source, message', [
    ('uni_moe_jax/data/bad.py', 'from uni_moe_jax.model import masks', 'data imports model'),
    ('uni_moe_jax/data/bad.py', 'from uni_moe_jax import model', 'data imports model'),
    ('uni_moe_jax/data/bad.py', 'import uni_moe_jax.model.masks as m', 'data imports model'),
    ('uni_moe_jax/data/bad.py', 'def f():\n  import uni_moe_jax.train', ':2: data imports train'),
    ('uni_moe_jax/data/bad.py', "l.import_module('uni_moe_jax.model')", 'data imports model'),
    ('uni_moe_jax/eval/bad.py', 'from uni_moe_jax.train import loop', 'eval imports train'),
    ('uni_moe_jax/moe/bad.py', 'from uni_moe_jax.model import block', 'moe imports model'),
    ('uni_moe_jax/model/bad.py', 'from uni_moe_jax.data import texts', 'model imports data'),
    ('uni_moe_jax/export/bad.py', 'from uni_moe_jax.train import step', 'export imports train'),
    ('uni_moe_jax/train/bad.py', 'from uni_moe_jax.bench import timing', 'train imports bench'),
    ('uni_moe_jax/export/bad.py', 'from uni_moe_jax.bench import timing', 'export imports bench'),
    ('uni_moe_jax/tasks.py', 'from uni_moe_jax import config', 'tasks imports config'),
    ('uni_moe_jax/config.py', 'from uni_moe_jax import resolve', 'config imports resolve'),
    ('uni_moe_jax/attributes.py', 'from uni_moe_jax import tasks', 'attributes imports tasks'),
    ('uni_moe_jax/losses.py', 'from uni_moe_jax import sharding', 'losses imports sharding'),
    ('uni_moe_jax/__init__.py', 'from uni_moe_jax import tasks', '__init__ imports tasks'),
    ('uni_moe_jax/train/bad.py', 'from launch import train', 'imports launch.train'),
    ('launch/bad.py', 'from configs import quickstart', 'imports configs.quickstart'),
    ('uni_moe_jax/train/bad.py', 'from . import step', "relative import '..step'"),
    ('uni_moe_jax/data/bad.py', 'from ..model import masks', "relative import '..model.masks'"),
    ('uni_moe_jax/utils.py', '', "'utils' is no known room"),
    ('uni_moe_jax/data/long.py', '\n' * 401, '401 lines, at most 400'),
    ('launch/long.py', '\n' * 80, '80 lines, at most 79'),
])
def test_a_planted_breach_is_found(tmp_path, file, source, message):
  (tmp_path / file).parent.mkdir(parents=True)
  (tmp_path / file).write_text(source)
  [found] = violations(tmp_path)
  assert message in found


@pytest.mark.parametrize('file, source', [
    ('uni_moe_jax/model/good.py', 'from uni_moe_jax.moe import a\nimport uni_moe_jax.model.b'),
    ('uni_moe_jax/train/good.py', 'import uni_moe_jax\nfrom uni_moe_jax import __version__, data'),
    ('uni_moe_jax/eval/good.py', 'import jax\nfrom sklearn import model_selection'),
    ('uni_moe_jax/data/good.py', '\n' * 400),
    ('launch/good.py', 'from uni_moe_jax.train import loop' + '\n' * 79),
    ('tests/launch/good_test.py', 'from launch import train'),
])
def test_what_the_rules_allow_is_not_found(tmp_path, file, source):
  (tmp_path / file).parent.mkdir(parents=True)
  (tmp_path / file).write_text(source)
  assert not violations(tmp_path)
