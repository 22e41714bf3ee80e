"""Size and SHA-256 of every file of a checkpoint, by which damage is detected before it is trained on.

The manifest is written when every array is on disk and before Orbax gives the folder its final name: a checkpoint
exists together with its manifest, or not at all. Orbax completes two small files later, whose content is checked
instead. Where folders cannot be renamed, a checkpoint is written in place, and the later of these files completes it.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from concurrent import futures
from typing import Any

from uni_moe_jax.utils.storage import write_bytes

FILE = 'manifest.json'
_METADATA, _COMMITTED = '_CHECKPOINT_METADATA', 'commit_success.txt'
_COMPLETED_LATER = 'commit_timestamp_nsecs'
_THREADS = 4


def write(folder: pathlib.Path, final: pathlib.Path, metrics: Mapping[str, float]) -> None:
  """Writes the manifest of a checkpoint in `folder`, which is complete except for its name, with its metrics.

  final: where it will be; `folder` itself, if it is written in place.
  """
  files = sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())
  sums = _checksums(folder, [name for name in files if name not in (FILE, _METADATA, _COMMITTED)])
  content = {'files': sums, 'metadata': _metadata(folder), 'committed': f'Checkpoint commit was successful to {final}',
             'in_place': folder == final, 'metrics': dict(metrics)}
  write_bytes(folder / FILE, json.dumps({**content, 'sha256': _own_checksum(content)}).encode())


def damage(folder: pathlib.Path) -> str:
  """Describes the damage of a checkpoint; '' if it is intact."""
  try:
    content = _read(folder)
    if _metadata(folder) != content['metadata']:
      return f'{_METADATA} differs from what was saved'
    if (folder / _COMMITTED).read_text() != content['committed']:
      return f'{_COMMITTED} differs from what was saved'
    for name, recorded in content['files'].items():  # a truncated file need not be read
      if (size := (folder / name).stat().st_size) != recorded['bytes']:
        return f'{name} has {size} bytes instead of {recorded["bytes"]}'
    for name, checksum in _checksums(folder, content['files']).items():
      if checksum != content['files'][name]:
        return f'{name} differs from what was saved (by its SHA-256)'
  except FileNotFoundError as e:
    return f'{os.path.relpath(e.filename, folder)} is missing'
  except (OSError, ValueError) as e:
    return str(e)
  return ''


def is_unfinished(folder: pathlib.Path) -> bool:
  """Whether a checkpoint that is written in place is not complete, or its process has ended before it was."""
  committed = folder / _COMMITTED
  try:
    if committed.exists() and committed.stat().st_size:
      return False
    return _read(folder)['in_place']
  except FileNotFoundError:
    return True
  except (OSError, ValueError):
    return False


def metrics(folder: pathlib.Path) -> dict[str, float]:
  """Metrics that were logged with a saved step; {} if they cannot be read."""
  try:
    return _read(folder)['metrics']
  except (OSError, ValueError):
    return {}


def _read(folder: pathlib.Path) -> dict[str, Any]:
  """The content of a manifest. Raises ValueError if it is damaged."""
  try:
    content = json.loads((folder / FILE).read_text())
    checksum = content.pop('sha256')
  except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
    raise ValueError(f'{FILE} cannot be read') from None
  if checksum != _own_checksum(content):
    raise ValueError(f'{FILE} differs from what was saved')
  return content


def _checksums(folder: pathlib.Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
  """Size and SHA-256 of files by name."""
  def checksum(name):
    with (folder / name).open('rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
      return {'bytes': file.tell(), 'sha256': digest}

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(checksum, names), strict=True))


def _own_checksum(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _metadata(folder: pathlib.Path) -> dict[str, Any]:
  """Orbax's metadata except for what it completes later. Raises ValueError if they are damaged."""
  try:
    content = json.loads((folder / _METADATA).read_text())
    return {k: v for k, v in content.items() if k != _COMPLETED_LATER}
  except (ValueError, AttributeError, RecursionError):
    raise ValueError(f'{_METADATA} cannot be read') from None
