"""The folder of a run: it belongs to one config, and remembers it with the versions and the data's fingerprint.

A second run of the same command resumes; another config is refused. Nothing slow is imported here, so that a wrong folder is
told at once.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import sys
from typing import Any

import ml_collections

from uni_moe_jax import __version__
from uni_moe_jax.config.schema import PATHS
from uni_moe_jax.data.pipeline import class_names
from uni_moe_jax.utils.errors import MissingFileError, UsageError
from uni_moe_jax.utils.files import write_json

CONFIG_FILE = 'config.json'
RUN_FILE = 'run.json'
CONVERSION_FILE = 'conversion.json'  # of a converted checkpoint: what went where
LOCK_FILE = '.lock'
CHECKPOINTS = 'checkpoints'  # the folder in which each has one, named by its step
DAMAGED = 'damaged'  # the folder into which those go that are found to be damaged
TOKENIZER_STEM = 'tokenizer'
# What computes, and what reads data; `av` is an extra.
VERSIONED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow', 'numpy', 'tensorflow-datasets', 'array_record', 'av')
_PACKAGE = 'uni_moe_jax'  # the key of the version that wrote the work directory
_ABSENT = 'absent'
# Fields that may differ when a run goes on: how often it talks and saves, where the data lies, how it is laid out.
MAY_CHANGE = ('train.log_every', 'train.checkpoint_every', 'train.max_to_keep', 'train.best_metric', 'train.max_nonfinite_steps', 'train.hang_timeout',
              'train.interference_every', 'train.interference_parameters', 'data.dir', 'data.max_corrupt_fraction', 'preflight', 'mesh',
              'evaluators', 'tokenizer.merges_path')  # its content is part of the data's fingerprint


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
  """Steps of which a work directory has a checkpoint, in order; the directory need not exist, and nothing is verified."""
  return sorted(int(p.name) for p in (pathlib.Path(workdir) / CHECKPOINTS).glob('*') if p.name.isdecimal() and p.is_dir())


def saved_step(workdir: str | os.PathLike[str]) -> int | None:
  """The newest of them."""
  return max(saved_steps(workdir), default=None)


def versions() -> dict[str, str]:
  """Installed versions of the packages that a checkpoint depends on."""
  out = {}
  for name in VERSIONED:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      out[name] = importlib.metadata.version('tensorflow-cpu') if name == 'tensorflow' else _ABSENT
  return out


def _plain(value: Any) -> Any:
  """JSON's view of config values: tuples become lists."""
  return json.loads(json.dumps(value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value))


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  return {k: v for key, sub in tree.items() for k, v in _flat(sub, f'{prefix}.{key}' if prefix else key).items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """'field: old → new' for every field that differs and may not."""
  a, b = _flat(old), _flat(new)
  out = []
  for name in sorted({*a, *b}):
    if a.get(name, 'absent') != b.get(name, 'absent') and not name.startswith(MAY_CHANGE):
      out.append(f'{name}: {a.get(name, "absent")!r} → {b.get(name, "absent")!r}')
  return out


def claim_workdir(
    workdir: str | os.PathLike[str], config: ml_collections.ConfigDict, fingerprint: str | None = None,
    writes: bool = True, inputs: str | None = None) -> None:
  """Makes a work directory this run's, or checks that it already is.

  Args:
    workdir: folder of the run.
    config: of the run.
    fingerprint: of its data; None, before the data is read: only checks, and makes nothing.
    writes: of several processes, one makes it.
    inputs: of its data and of the files beside them, see `Data.inputs_fingerprint`; runs of earlier versions have not written it down.

  Raises:
    UsageError: it belongs to a run with another config or other data; names the fields.
  """
  path = pathlib.Path(workdir) / CONFIG_FILE
  new = {'config': _plain(config), 'data': fingerprint, 'inputs': inputs}
  if path.exists():
    old = _read(path)
    changed = differences(old['config'], new['config'])
    if fingerprint is not None and old['data'] != fingerprint and not changed:
      changed = ['the data (its fingerprint)']
    if inputs is not None and old.get('inputs') not in (None, inputs) and not changed:
      changed = ["the content of the tokenizer's file, or of a file of class names"]
    if changed:
      more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
      raise UsageError(f'workdir {workdir} belongs to a run with another config ({"; ".join(changed[:3])}{more}); '
                       'give another --workdir, or the config that it was started with.')
    return
  if fingerprint is None or not writes:
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, {_PACKAGE: __version__, **new, 'versions': versions()})


def check_versions(workdir: str | os.PathLike[str], accept: bool = False) -> None:
  """Checks that a run goes on with the packages that it began with; says so where only the last numbers differ.

  Args:
    workdir: folder of the run; a new one has nothing to check.
    accept: write down the installed versions instead, from which on the run goes on with them.

  Raises:
    UsageError: a package of another release (its first two numbers differ): the rest of the run would not be what it began as.
  """
  path = pathlib.Path(workdir) / CONFIG_FILE
  if not path.exists():
    return
  content, here = _read(path), versions()
  began = content.get('versions', {})
  changed = {name: (began[name], here[name]) for name in VERSIONED
             if name in began and began[name] != here[name] and _ABSENT not in (began[name], here[name])}
  if not changed:
    return
  if accept:
    write_json(path, {**content, 'versions': here, 'earlier_versions': [*content.get('earlier_versions', []), began]})
    return
  said = ', '.join(f'{name}: {old} → {new}' for name, (old, new) in changed.items())
  breaking = {name: old for name, (old, new) in changed.items() if old.split('.')[:2] != new.split('.')[:2]}
  if breaking:
    wanted = ' '.join(f"'{name}=={old}'" for name, old in breaking.items())
    raise UsageError(f'workdir {workdir} was begun with other versions ({said}), with which its numbers and its data order may '
                     f'be others. Install them (pip install {wanted}), start a new run from its parameters '
                     f"(config.train.init='{workdir}'), or go on all the same: launch/train.py --accept_versions.")
  print(f'note: workdir {workdir} was begun with other versions ({said}); its numbers may differ in their last digits.',
        file=sys.stderr, flush=True)


def lock(workdir: str | os.PathLike[str], until: contextlib.ExitStack) -> bool:
  """Takes a work directory for this process; False where another one has it. Who dies gives it back.

  Two trainers in one directory would delete each other's checkpoints. Where the file system has no locks, that is said, and nothing
  is locked.

  Args:
    workdir: folder of the run.
    until: when it is closed, the directory is given back.
  """
  file = until.enter_context(open(pathlib.Path(workdir) / LOCK_FILE, 'a'))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as e:
    print(f'note: {workdir} cannot be locked ({e.strerror}); see to it that no other process trains there.',
          file=sys.stderr, flush=True)
  return True


def copy_tokenizer(workdir: str | os.PathLike[str], file: pathlib.Path, writes: bool = True) -> None:
  """Puts a copy of a run's tokenizer into its folder: who starts from the run needs the same ids.

  Args:
    workdir: folder of the run.
    file: of its tokenizer.
    writes: of several processes, one makes the copy.

  Raises:
    UsageError: the folder has another one, with which its parameters would mean other words.
  """
  path = pathlib.Path(workdir) / (TOKENIZER_STEM + file.suffix)
  if path.exists():
    # Published merges may be packed in another way; what they say is part of the data's fingerprint.
    if file.suffix == '.model' and path.read_bytes() != file.read_bytes():
      raise UsageError(f'workdir {workdir} was trained with another tokenizer than {file}, though with the same text: another '
                       f'version of sentencepiece makes another one. Copy {path} over it, or give another --workdir.')
  elif writes:
    temporary = path.with_suffix('.tmp')
    temporary.write_bytes(file.read_bytes())
    temporary.rename(path)


def provenance(workdir: str | os.PathLike[str], step: int) -> dict[str, Any]:
  """Where a run's parameters come from: what an export tells about them, as JSON. Of files and folders only their name is told."""
  stored, trained, converted = (json.loads(file.read_text()) if file.exists() else {} for file in (
      pathlib.Path(workdir) / name for name in (CONFIG_FILE, RUN_FILE, CONVERSION_FILE)))
  config = stored['config']
  for section, field in PATHS:
    if field in config.get(section, {}):
      config[section][field] = pathlib.Path(config[section][field]).name
  for target_set in config['target_sets'].values():
    values = target_set['entries']
    if isinstance(values, str) and values.startswith(class_names.FILE_PREFIX):
      target_set['entries'] = class_names.FILE_PREFIX + pathlib.Path(values.removeprefix(class_names.FILE_PREFIX)).name
  init = config['train'].get('init')
  origin = {'started from': init} if init else {}
  if converted:
    origin['converted from'] = f'{pathlib.Path(converted["checkpoint"]).name} (sha256 {converted.get("sha256", "unknown")})'
  return {'name': pathlib.Path(workdir).resolve().name, **origin, 'step': step, 'seed': config['seed'],
          'trained by commit': trained.get('commit', 'unknown'), 'data (fingerprint)': stored['data'],
          'versions in training': stored['versions'], 'config': config}


def load_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
  """The config that a work directory was started with.

  Raises:
    MissingFileError: nothing was trained there.
  """
  path = pathlib.Path(workdir) / CONFIG_FILE
  if not path.exists():
    raise MissingFileError(f'workdir {workdir} holds no run ({CONFIG_FILE} is missing); train first: '
                            f'python launch/train.py --config=configs/quickstart.py --workdir={workdir}')
  return ml_collections.ConfigDict(_tuples(_read(path)['config']))


def _read(path: pathlib.Path) -> dict[str, Any]:
  """What a work directory remembers. Raises UsageError where the file is damaged."""
  try:
    content = json.loads(path.read_text())
    if not (isinstance(content, dict) and isinstance(content.get('config'), dict)):
      raise UsageError('it lacks the config')
    began = content.get('versions', {})
    if not (isinstance(began, dict) and all(isinstance(v, str) for v in began.values()) and
            isinstance(content.get('earlier_versions', []), list)):
      raise UsageError('its versions are no texts by package')
  except (ValueError, RecursionError) as e:
    raise UsageError(f'{path} is damaged ({e}); copy back one that is whole, or give another --workdir.') from None
  if content.get(_PACKAGE, '').split('.')[:2] != __version__.split('.')[:2]:
    raise UsageError(f'{path.parent} was written by uni_moe_jax {content.get(_PACKAGE) or "0.1"}, and this is {__version__}, which cannot '
                     'read its config: give another --workdir, or install the version that wrote it.')
  return {'data': None, **content}


def _tuples(value: Any) -> Any:
  """JSON has no tuples; configs have no lists."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
