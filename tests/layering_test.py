"""Who may import whom: parsed from the source, so that nothing is imported to find out."""

import ast
import pathlib
from collections.abc import Sequence

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PACKAGE = 'uni_moe_jax'
_MAX_LINES = 400
_MAX_MAIN_LINES = 80

# Package → the packages that it may import besides itself, and why.
_RULES = {
    'utils': ('', 'helpers are independent of models, data and tasks'),
    'io': ('utils', 'files and addresses are independent of what they contain'),
    'cli': ('utils io', 'what commands share is independent of what they run'),
    'tasks': ('utils', 'a task type is a declaration from which attributes follow'),
    'config': ('utils io cli tasks', 'a config is checked against the tables, before any model or data exists'),
    'parallel': ('utils io cli', 'one table of axis names is independent of modules'),
    'kernels': ('utils parallel', 'an operation is arrays in, arrays out, whatever model uses it'),
    'moe': ('utils tasks parallel kernels', 'routers and experts are parts of a model and independent of it'),
    'model': ('utils tasks config parallel kernels moe',
              'a model is independent of where its batches come from and of what its outputs are used for'),
    'data': ('utils io cli tasks config',
             'records become batches of declared task types, and no model is needed for that'),
    'eval': ('utils io tasks config parallel moe model data',
             'an evaluator is given functions, so that every model is measured the same way'),
    'train': ('utils io cli tasks config parallel kernels moe model data eval',
              'the trainer joins the other packages'),
    'analysis': ('utils io cli tasks config parallel moe model data eval train',
                 'it measures trained models and runs, and nothing that is measured depends on it'),
    'convert': ('utils io cli tasks config parallel moe model',
                'a checkpoint is names and arrays, whoever trained it and on whatever data'),
    'export': ('utils io cli tasks config parallel kernels moe model data eval convert',
               'a finished model is exported without the machinery that trained it'),
    'preflight': ('utils io cli tasks config parallel kernels moe model data eval train',
                  'it compiles the real step and decoder'),
    'reporting': ('utils io tasks config data eval analysis',
                  'it draws what the commands wrote into the work directory and needs no model'),
    'serve': ('utils io cli data export', 'it answers by an exported folder, and needs no code that trained it'),
}
# The folders of data/ are the stages of a record, each of which may import the ones before it.
_DATA_STAGES = ('hashing', 'formats', 'shards', 'prepare', 'embedded', 'text', 'examples', 'batches')
# Packages that name no device, and how devices are named: what depends on one is a choice of kernels/.
_WITHOUT_DEVICES = 'model', 'moe'
_DEVICES = {'cpu', 'gpu', 'tpu', 'cuda', 'platform', 'platform_dependent', 'default_backend', 'on_one_cpu'}
_NOT_IMPORTED = {
    'launch': 'the commands are the root: what two of them share belongs to the package',
    'configs': 'a config is named on the command line and read by path',
    'benchmarks': 'benchmarks measure the package and are not a part of it',
}


def _imports(path: pathlib.Path) -> list[tuple[int, str]]:
  """Return (line, dotted name) of every import in a file, inside functions and by string, too."""
  matches = []
  for node in ast.walk(ast.parse(path.read_text(), str(path))):
    if isinstance(node, ast.Import):
      matches += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = '.' * node.level + (node.module or '')
      matches += [(node.lineno, f'{base}.{alias.name}') for alias in node.names]
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
      function = ast.unparse(node.func).rpartition('.')[2]
      if function in ('import_module', '__import__'):
        matches.append((node.lineno, str(node.args[0].value)))
  return matches


def _devices(path: pathlib.Path) -> list[tuple[int, str]]:
  """Return (line, name) of every device or query for one: a string, a name or an attribute."""
  parts = {ast.Constant: 'value', ast.Name: 'id', ast.Attribute: 'attr'}
  names = [(node.lineno, getattr(node, parts[type(node)])) for node in ast.walk(ast.parse(path.read_text(), str(path)))
           if type(node) in parts]
  return [(line, name) for line, name in names if isinstance(name, str) and name in _DEVICES]


def _package_of(parts: Sequence[str]) -> str:
  """Return the package of a dotted name or path below the package; '' is the package itself."""
  first = parts[0].removesuffix('.py') if parts else ''
  return '' if first == '__init__' else first


def _stage(parts: Sequence[str]) -> int:
  return _DATA_STAGES.index(_package_of(parts))


def violations(root: pathlib.Path) -> list[str]:
  """Return one sentence, 'file:line: what, why', for every violation of the rules below `root`."""
  matches = []
  folders = (_PACKAGE, 'launch', 'configs', 'benchmarks', 'tests')
  for path in sorted(p for folder in folders for p in (root / folder).rglob('*.py')):
    name = path.relative_to(root)
    lines = len(path.read_text().splitlines())
    limit = _MAX_MAIN_LINES - 1 if name.parts[0] == 'launch' else _MAX_LINES
    if lines > limit:
      matches.append(f'{name}: {lines} lines, at most {limit}: split it')
    in_package = name.parts[0] == _PACKAGE
    package = _package_of(name.parts[1:]) if in_package else None
    if package and package not in _RULES:
      matches.append(f'{name}: {package!r} is no known package ({", ".join(_RULES)})')
      continue
    if package in _WITHOUT_DEVICES:
      matches += [f'{name}:{line}: names a device, {device!r}; let kernels/ choose' for line, device in _devices(path)]
    for line, target in _imports(path):
      top, *below = target.split('.')
      if not top:
        matches.append(f'{name}:{line}: relative import {target!r}; write the full name')
      elif top in _NOT_IMPORTED and name.parts[0] not in ('tests', top):
        matches.append(f'{name}:{line}: imports {target}, but {_NOT_IMPORTED[top]}')
      elif in_package and top == _PACKAGE:
        other = _package_of(below)
        if package == other == 'data' and _stage(below[1:]) > _stage(name.parts[2:]):
          matches.append(f'{name}:{line}: imports {target}, a later stage of {" → ".join(_DATA_STAGES)}')
        # `from uni_moe_jax import __version__` and `import uni_moe_jax` name no package.
        if other and not other.startswith('__') and other != package:
          allowed, why = _RULES.get(package, ('', 'importing the package must cost nothing'))
          if other not in allowed.split():
            matches.append(f'{name}:{line}: {package or "__init__"} imports {other}, but {why}')
  return matches


def test_the_repository_keeps_its_rules():
  assert not violations(_ROOT)


def test_the_rules_allow_no_cycle():
  order = list(_RULES)
  for package, (allowed, _) in _RULES.items():
    assert all(order.index(other) < order.index(package) for other in allowed.split()), package


@pytest.mark.parametrize('file, source, message', [
    ('uni_moe_jax/data/bad.py', 'from uni_moe_jax.model import masks', 'data imports model'),
    ('uni_moe_jax/data/bad.py', 'from uni_moe_jax import model', 'data imports model'),
    ('uni_moe_jax/data/bad.py', 'import uni_moe_jax.model.masks as m', 'data imports model'),
    ('uni_moe_jax/data/bad.py', 'def f():\n  import uni_moe_jax.train', ':2: data imports train'),
    ('uni_moe_jax/data/bad.py', "l.import_module('uni_moe_jax.model')", 'data imports model'),
    ('uni_moe_jax/eval/bad.py', 'from uni_moe_jax.train import loop', 'eval imports train'),
    ('uni_moe_jax/moe/bad.py', 'from uni_moe_jax.model import block', 'moe imports model'),
    ('uni_moe_jax/model/bad.py', 'from uni_moe_jax.data import texts', 'model imports data'),
    ('uni_moe_jax/model/bad.py', "x = 'tpu'", "names a device, 'tpu'"),
    ('uni_moe_jax/moe/bad.py', 'jax.default_backend()', "names a device, 'default_backend'"),
    ('uni_moe_jax/export/bad.py', 'from uni_moe_jax.train import step', 'export imports train'),
    ('uni_moe_jax/train/bad.py', 'from benchmarks import paired', 'imports benchmarks.paired'),
    ('uni_moe_jax/train/bad.py', 'from uni_moe_jax.analysis import interference', 'train imports analysis'),
    ('launch/bad.py', 'import benchmarks', 'imports benchmarks'),
    ('uni_moe_jax/tasks/task_types.py', 'from uni_moe_jax import config', 'tasks imports config'),
    ('uni_moe_jax/config/schema.py', 'from uni_moe_jax.train import run', 'config imports train'),
    ('uni_moe_jax/cli/boundary.py', 'from uni_moe_jax import tasks', 'cli imports tasks'),
    ('uni_moe_jax/parallel/sharding.py', 'from uni_moe_jax import model', 'parallel imports model'),
    ('uni_moe_jax/__init__.py', 'from uni_moe_jax import tasks', '__init__ imports tasks'),
    ('uni_moe_jax/train/bad.py', 'from launch import train', 'imports launch.train'),
    ('launch/bad.py', 'from configs import quickstart', 'imports configs.quickstart'),
    ('uni_moe_jax/train/bad.py', 'from . import step', "relative import '..step'"),
    ('uni_moe_jax/data/bad.py', 'from ..model import masks', "relative import '..model.masks'"),
    ('uni_moe_jax/helpers.py', '', "'helpers' is no known package"),
    ('uni_moe_jax/data/shards/bad.py', 'from uni_moe_jax.data.prepare import write', 'a later stage'),
    ('uni_moe_jax/data/long.py', '\n' * 401, '401 lines, at most 400'),
    ('launch/long.py', '\n' * 80, '80 lines, at most 79'),
])
def test_a_violation_is_found(tmp_path, file, source, message):
  (tmp_path / file).parent.mkdir(parents=True)
  (tmp_path / file).write_text(source)
  [matches] = violations(tmp_path)
  assert message in matches


@pytest.mark.parametrize('file, source', [
    ('uni_moe_jax/model/good.py', 'from uni_moe_jax.moe import a\nimport uni_moe_jax.model.b'),
    ('uni_moe_jax/train/good.py', 'import uni_moe_jax\nfrom uni_moe_jax import __version__, data'),
    ('uni_moe_jax/eval/good.py', 'import jax\nfrom sklearn import model_selection'),
    ('uni_moe_jax/data/good.py', '\n' * 400),
    ('uni_moe_jax/data/text/good.py', 'from uni_moe_jax.data import hashing\nfrom uni_moe_jax.data.shards import a'),
    ('launch/good.py', 'from uni_moe_jax.train import loop' + '\n' * 79),
    ('tests/launch/good_test.py', 'from launch import train'),
    ('benchmarks/good.py', 'from benchmarks import paired\nfrom uni_moe_jax import serve'),
])
def test_what_the_rules_allow_is_not_found(tmp_path, file, source):
  (tmp_path / file).parent.mkdir(parents=True)
  (tmp_path / file).write_text(source)
  assert not violations(tmp_path)
