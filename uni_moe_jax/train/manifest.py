"""Size and digest of every file of a checkpoint, by which damage is detected before it is trained on.

The manifest is written when every array is on disk and before Orbax gives the folder its final name: a checkpoint
exists together with its manifest, or not at all. Orbax completes two small files later, whose content is checked
instead. Where folders cannot be renamed, a checkpoint is written in place, and the later of these files completes it.
Files of a disk are read for their SHA-256. A bucket has the MD5 of each object in its listing: nothing is read.
"""

import errno
import hashlib
import json
from collections.abc import Mapping
from concurrent import futures
from typing import Any

from uni_moe_jax.io import storage

FILE = 'manifest.json'
_METADATA, _COMMITTED = '_CHECKPOINT_METADATA', 'commit_success.txt'
_COMPLETED_LATER = 'commit_timestamp_nsecs'
_OF_THE_DISK = {errno.EIO, errno.EISDIR, errno.ENOTDIR}  # what is there is broken, or not what was saved
_THREADS = 4
_NAMES = {'md5': 'MD5', 'sha256': 'SHA-256'}


def write(
    folder: storage.Path, final: storage.Path, metrics: Mapping[str, float], sums: Mapping[str, int],
    evaluation_data: Mapping[str, str]) -> None:
  """Writes the manifest of a checkpoint in `folder`, which is complete except for its name.

  Args:
    folder: has the checkpoint.
    final: where it will be; `folder` itself, if it is written in place.
    metrics: that were logged with its step.
    sums: of its arrays, see `checkpoint.array_sums`; {} where files are read to verify them.
    evaluation_data: evaluator in training → digest of the data on which it measures metrics.
  """
  files = {k: v for k, v in storage.files_in(folder).items() if k not in (FILE, _METADATA, _COMMITTED)}
  digests = _digests(folder, {name: 'md5' if md5 else 'sha256' for name, (_, md5) in files.items()}, files)
  _write(folder, {
      'files': digests, 'metadata': _metadata(folder), 'in_place': folder == final, 'metrics': dict(metrics),
      'sums': dict(sums), 'evaluation_data': dict(evaluation_data),
      'committed': f'Checkpoint commit was successful to {final}'})


def add_metrics(folder: storage.Path, metrics: Mapping[str, float], evaluation_data: Mapping[str, str]) -> None:
  """Adds metrics of evaluators to those of a saved step, atomically. Raises ValueError if its manifest is damaged."""
  content = _read(folder)
  _write(folder, {
      **content, 'metrics': {**content['metrics'], **metrics}, 'evaluation_data': dict(evaluation_data)})


def damage(folder: storage.Path) -> str:
  """Describes the damage of a checkpoint; '' if it is intact.

  Raises:
    OSError: it cannot be read, for want of permission for example, which says nothing of what is there.
  """
  try:
    files = storage.files_in(folder)
    for name in (FILE, _METADATA, _COMMITTED):
      if name not in files:
        return f'{name} is missing'
    content = _read(folder)
    if _metadata(folder) != content['metadata']:
      return f'{_METADATA} differs from what was saved'
    if (folder / _COMMITTED).read_text() != content['committed']:
      return f'{_COMMITTED} differs from what was saved'
    for name, recorded in content['files'].items():  # a truncated file need not be read
      if name not in files:
        return f'{name} is missing'
      if files[name][0] != recorded['bytes']:
        return f'{name} has {files[name][0]} bytes instead of {recorded["bytes"]}'
    algorithms = {name: 'md5' if 'md5' in recorded else 'sha256' for name, recorded in content['files'].items()}
    for name, digest in _digests(folder, algorithms, files).items():
      if digest != content['files'][name]:
        return f'{name} differs from what was saved (by its {_NAMES[algorithms[name]]})'
  except FileNotFoundError:
    return 'a file is missing'  # which was there a moment ago
  except ValueError as e:
    return str(e)
  except OSError as e:
    if not _is_damage(e, folder):
      raise
    return str(e)
  return ''


def is_unfinished(folder: storage.Path) -> bool:
  """Whether a checkpoint that is written in place is not complete, or its process has ended before it was."""
  committed = folder / _COMMITTED
  try:
    if committed.exists() and committed.read_bytes():
      return False
    return _read(folder)['in_place']
  except FileNotFoundError:
    return True
  except (OSError, ValueError):
    return False


def metrics(folder: storage.Path) -> dict[str, float]:
  """Metrics that were logged with a saved step; {} if its manifest is damaged. Raises OSError as `damage` does."""
  return _recorded(folder, 'metrics')


def evaluation_data(folder: storage.Path) -> dict[str, str]:
  """See `write`; {} for a step that was saved without. Raises OSError as `damage` does."""
  return _recorded(folder, 'evaluation_data')


def fingerprint(folder: storage.Path) -> str:
  """Digest of the files of a saved step; '' if its manifest is damaged. Raises OSError as `damage` does."""
  files = _recorded(folder, 'files')
  return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16] if files else ''


def _recorded(folder: storage.Path, field: str) -> dict[str, Any]:
  try:
    return _read(folder).get(field, {})
  except (FileNotFoundError, ValueError):
    return {}
  except OSError as e:
    if not _is_damage(e, folder):
      raise
    return {}


def array_sums(folder: storage.Path) -> dict[str, int]:
  """The sums of the arrays of a step, by path; {} if it was saved without."""
  return _read(folder)['sums']


def _is_damage(e: OSError, folder: storage.Path) -> bool:
  """Whether an error of reading says something of what is there, and not of who reads it or of the way there."""
  return not storage.is_remote(folder) and e.errno in _OF_THE_DISK


def _write(folder: storage.Path, content: Mapping[str, Any]) -> None:
  storage.write_bytes(folder / FILE, json.dumps({**content, 'sha256': _own_checksum(content)}).encode())


def _read(folder: storage.Path) -> dict[str, Any]:
  """The content of a manifest. Raises ValueError if it is damaged."""
  try:
    content = json.loads(storage.read_bytes(folder / FILE))
    checksum = content.pop('sha256')
  except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
    raise ValueError(f'{FILE} cannot be read') from None
  if checksum != _own_checksum(content):
    raise ValueError(f'{FILE} differs from what was saved')
  return content


def _digests(
    folder: storage.Path, algorithms: Mapping[str, str], files: Mapping[str, tuple[int, str | None]],
) -> dict[str, dict[str, Any]]:
  """Size and digest of files by name; those whose MD5 is wanted and in `files`, a listing, are not read."""
  def digest(name):
    algorithm, (size, md5) = algorithms[name], files[name]
    if algorithm == 'md5' and md5:
      return {'bytes': size, algorithm: md5}
    with (folder / name).open('rb') as file:
      value = hashlib.file_digest(file, algorithm).hexdigest()
      return {'bytes': file.tell(), algorithm: value}

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(algorithms, pool.map(digest, algorithms), strict=True))


def _own_checksum(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _metadata(folder: storage.Path) -> dict[str, Any]:
  """Orbax's metadata except for what it completes later. Raises ValueError if they are damaged."""
  try:
    content = json.loads((folder / _METADATA).read_text())
    return {k: v for k, v in content.items() if k != _COMPLETED_LATER}
  except (ValueError, AttributeError, RecursionError):
    raise ValueError(f'{_METADATA} cannot be read') from None
