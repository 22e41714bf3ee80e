"""The folder of a run: it belongs to one config, and remembers it with the versions and the data's fingerprint.

A second run of the same command resumes; another config is refused. Nothing slow is imported here, so that a wrong folder is
told at once.
"""

import importlib.metadata
import json
import os
import pathlib
from typing import Any

import ml_collections

from uni_moe_jax import config as config_lib

CONFIG_FILE = 'config.json'
TOKENIZER_STEM = 'tokenizer'
VERSIONED = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow', 'numpy')
# Fields that may differ when a run goes on: how often it talks and saves, where the data lies, how it is laid out.
MAY_CHANGE = ('train.log_every', 'train.save_every', 'train.keep', 'train.max_bad_steps', 'train.interference_every',
              'train.interference_parameters', 'data.dir', 'declared', 'mesh', 'evaluators',
              'tokenizer.merges')  # its content is part of the data's fingerprint


def versions() -> dict[str, str]:
  """Installed versions of the packages that a checkpoint depends on."""
  out = {}
  for name in VERSIONED:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      out[name] = importlib.metadata.version('tensorflow-cpu') if name == 'tensorflow' else 'absent'
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
    writes: bool = True) -> None:
  """Makes a work directory this run's, or checks that it already is.

  Args:
    workdir: folder of the run.
    config: of the run.
    fingerprint: of its data; None, before the data is read: only checks, and makes nothing.
    writes: of several processes, one makes it.

  Raises:
    ValueError: it belongs to a run with another config or other data; names the fields.
  """
  path = pathlib.Path(workdir) / CONFIG_FILE
  new = {'config': _plain(config), 'data': fingerprint}
  if path.exists():
    old = json.loads(path.read_text())
    changed = differences(_plain(_completed(old['config'])), new['config'])
    if fingerprint is not None and old['data'] != fingerprint and not changed:
      changed = ['the data (its fingerprint)']
    if changed:
      more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
      raise ValueError(f'workdir {workdir} belongs to a run with another config ({"; ".join(changed[:3])}{more}); '
                       'give another --workdir, or the config that it was started with.')
    return
  if fingerprint is None or not writes:
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps({**new, 'versions': versions()}, indent=1))
  temporary.rename(path)


def keep_tokenizer(workdir: str | os.PathLike[str], file: pathlib.Path) -> None:
  """Puts a copy of a run's tokenizer into its folder: who starts from the run needs the same ids."""
  path = pathlib.Path(workdir) / (TOKENIZER_STEM + file.suffix)
  if not path.exists():
    temporary = path.with_suffix('.tmp')
    temporary.write_bytes(file.read_bytes())
    temporary.rename(path)


def load_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
  """The config that a work directory was started with; fields that the package has got since then take their defaults.

  Raises:
    FileNotFoundError: nothing was trained there.
  """
  path = pathlib.Path(workdir) / CONFIG_FILE
  if not path.exists():
    raise FileNotFoundError(f'workdir {workdir} holds no run ({CONFIG_FILE} is missing); train first: '
                            f'python launch/train.py --config=configs/quickstart.py --workdir={workdir}')
  return _completed(json.loads(path.read_text())['config'])


def _completed(config: dict[str, Any]) -> ml_collections.ConfigDict:
  return config_lib.completed(ml_collections.ConfigDict(_tuples(config)))


def _tuples(value: Any) -> Any:
  """JSON has no tuples; configs have no lists."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
