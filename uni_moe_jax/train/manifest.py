"""What the folder of a checkpoint must hold: size and SHA-256 of every file. Damage is found before it is trained on.

The manifest is written when every array is on disk, and before Orbax gives the folder its name: a checkpoint is there with its
manifest, or not at all. Orbax completes two small files later; what they say is checked instead of their sums.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from concurrent import futures
from typing import Any

from uni_moe_jax.utils.errors import UsageError

FILE = 'manifest.json'
MARK = {'manifest': FILE}  # in Orbax's metadata of every checkpoint that has a manifest
_METADATA, _COMMITTED = '_CHECKPOINT_METADATA', 'commit_success.txt'
_COMPLETED_LATER = 'commit_timestamp_nsecs'
_THREADS = 4


def write(folder: pathlib.Path, final: pathlib.Path, metrics: Mapping[str, float]) -> None:
  """Writes the manifest of a checkpoint that is complete but for its name.

  Args:
    folder: where it lies now. final: where it will lie.
    metrics: what the log said when it was saved.
  """
  names = [name for name in _files(folder) if name not in (FILE, _METADATA, _COMMITTED)]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    sums = dict(zip(names, pool.map(lambda name: _sum(folder / name), names)))
  content = {'files': sums, 'metadata': _metadata(folder), 'committed': f'Checkpoint commit was successful to {final}',
             'metrics': dict(metrics)}
  temporary = folder / f'{FILE}.tmp'
  temporary.write_text(json.dumps({**content, 'sha256': _own_sum(content)}))
  temporary.rename(folder / FILE)


def damage(folder: pathlib.Path) -> str:
  """What is wrong with a checkpoint, '' if it is whole.

  One of an earlier version, which wrote no manifests, counts as whole: see `is_sealed`.
  """
  if not (folder / FILE).exists() and not is_sealed(folder):
    return ''
  try:
    content = _read(folder)
    if _metadata(folder) != content['metadata']:
      return f'{_METADATA} says something else than was saved'
    if (folder / _COMMITTED).read_text() != content['committed']:
      return f'{_COMMITTED} says something else than was saved'
    names = list(content['files'])
    # Sizes first: a file that is cut off need not be read.
    for name in names:
      size = (folder / name).stat().st_size
      if size != content['files'][name]['bytes']:
        return f'{name} has {size} bytes instead of {content["files"][name]["bytes"]}'
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      for name, found in zip(names, pool.map(lambda name: _sum(folder / name), names)):
        if found != content['files'][name]:
          return f'{name} does not hold what was saved (its SHA-256 differs)'
  except FileNotFoundError as e:
    return f'{os.path.relpath(e.filename, folder)} is missing'
  except (OSError, ValueError) as e:
    return str(e)
  return ''


def is_sealed(folder: pathlib.Path) -> bool:
  """Whether a checkpoint was written with a manifest: what Orbax's metadata say, and True where they say nothing."""
  try:
    return _metadata(folder).get('custom_metadata', MARK) == MARK
  except (OSError, ValueError):
    return True


def metrics(folder: pathlib.Path) -> dict[str, float]:
  """What the log said when a checkpoint was saved; nothing where that cannot be read."""
  try:
    return _read(folder)['metrics']
  except (OSError, ValueError):
    return {}


def _read(folder: pathlib.Path) -> dict[str, Any]:
  """The content of a manifest. Raises UsageError for one that is damaged."""
  try:
    content = json.loads((folder / FILE).read_text())
    said = content.pop('sha256')
  except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
    raise UsageError(f'{FILE} cannot be read') from None
  if said != _own_sum(content):
    raise UsageError(f'{FILE} does not hold what was saved')
  return content


def _files(folder: pathlib.Path) -> list[str]:
  return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def _sum(path: pathlib.Path) -> dict[str, Any]:
  with path.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'bytes': file.tell(), 'sha256': digest}


def _own_sum(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _metadata(folder: pathlib.Path) -> dict[str, Any]:
  """Orbax's metadata of a checkpoint, but for what it completes later. Raises UsageError where they are damaged."""
  try:
    content = json.loads((folder / _METADATA).read_text())
    return {k: v for k, v in content.items() if k != _COMPLETED_LATER}
  except (ValueError, AttributeError, RecursionError):
    raise UsageError(f'{_METADATA} cannot be read') from None
