"""Exports of runs that are served: one per checkpoint, in a folder named by the one whose parameters it has."""

import json
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

from uni_moe_jax.utils import signals


def name(step: int, fingerprint: str) -> str:
  """Returns the name of the folder for a checkpoint."""
  return f'{step}-{fingerprint}'


def make(folder: pathlib.Path, command: Sequence[str]) -> pathlib.Path:
  """Returns `folder`, for the newest checkpoint; makes it by `command`, in a process of its own, unless it exists.

  If that checkpoint is damaged, an earlier one is exported, whose folder is returned. Ends this process if it fails.
  """
  if folder.exists():
    return folder
  print(f'Exporting to {folder}', flush=True)
  output = folder.with_name(f'.{folder.name}.{os.getpid()}')
  code = signals.wait(signals.start([*command, f'--output={output}']))
  if code:
    sys.exit(code)
  read = json.loads((output / 'manifest.json').read_text())['provenance']
  folder = folder.with_name(name(read['step'], read['checkpoint (fingerprint)']))
  try:
    output.rename(folder)
  except OSError:
    if not folder.is_dir():  # else another start has made it meanwhile
      raise
    shutil.rmtree(output)
  return folder
