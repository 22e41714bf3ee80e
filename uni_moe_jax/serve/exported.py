"""Exports of runs that are served: one per checkpoint and config, in a folder named by what it was made of."""

import contextlib
import hashlib
import json
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence

from uni_moe_jax import __version__
from uni_moe_jax.export import loader
from uni_moe_jax.utils import signals

_ABANDONED = 24 * 3600.0  # seconds after which the folder of an export that was killed is removed


def name(step: int, fingerprint: str, config: str, made_by: tuple[str, int] = (__version__, loader.FORMAT)) -> str:
  """Returns the name of the folder for a checkpoint, its step and digest, and the config of its run.

  made_by: version of the package, format of the folder.
  """
  made_of = json.dumps([fingerprint, config, *made_by])
  return f'{step}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}'


def make(
    parent: pathlib.Path, checkpoints: Iterable[tuple[int, str]], config: str, command: Sequence[str]) -> pathlib.Path:
  """Returns the folder in `parent` of the first of these checkpoints that has one; without any, makes it.

  Ends this process if that fails.

  Args:
    parent: has the exports of a run.
    checkpoints: step and digest of each that the export may read.
    config: of the run.
    command: exports one of them, in a process of its own.
  """
  folder = parent
  for step, fingerprint in checkpoints:
    folder = parent / name(step, fingerprint, config)
    if folder.exists():
      return folder
  print(f'Exporting to {folder}', flush=True)
  parent.mkdir(exist_ok=True)
  _remove_abandoned(parent)
  with tempfile.TemporaryDirectory(prefix='.', dir=parent) as temporary:
    output = pathlib.Path(temporary, 'export')
    if code := signals.wait(signals.start([*command, f'--output={output}'])):
      sys.exit(code)
    read = json.loads((output / 'manifest.json').read_text())['provenance']  # its run may have trained on
    folder = parent / name(read['step'], read['checkpoint (fingerprint)'], config)
    try:
      output.rename(folder)
    except OSError:
      if not folder.is_dir():  # else another start has made it meanwhile
        raise
  return folder


def _remove_abandoned(parent: pathlib.Path) -> None:
  for temporary in parent.glob('.*'):
    with contextlib.suppress(FileNotFoundError):  # another start removes it
      if time.time() - temporary.stat().st_mtime > _ABANDONED:
        shutil.rmtree(temporary, ignore_errors=True)
