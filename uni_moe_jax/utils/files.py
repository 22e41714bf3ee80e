"""Files that a reader never sees half written, and paths that are those of a file system."""

import json
import pathlib
from typing import Any

from uni_moe_jax.utils.errors import UsageError


def write_json(path: pathlib.Path, content: Any, allow_nan: bool = True) -> None:
  """Writes content as JSON, whole or not at all: a process that is killed leaves what was there before.

  Raises:
    ValueError: a number is not finite and allow_nan is False: not every reader knows NaN.
  """
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(content, indent=1, allow_nan=allow_nan))
  temporary.rename(path)


def read_json(path: pathlib.Path, default: Any = None) -> Any:
  """The content of a JSON file; `default` if there is no such file."""
  return json.loads(path.read_text()) if path.exists() else default


def check_local(path: str, name: str) -> None:
  """Refuses an address: joined as a path, 'gs://bucket/x' would be the folder 'gs:' where one stands.

  Raises:
    UsageError: names the flag or field.
  """
  if '://' in path:
    raise UsageError(f'{name}={path!r} is an address, and must be a path; mount the bucket (for example with gcsfuse) or copy what '
                     'is there, and give that folder.')
