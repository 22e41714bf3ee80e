"""Files and JSON, written atomically, and checks of paths that are given on the command line."""

import json
import pathlib
from typing import Any

from uni_moe_jax.utils.errors import UsageError


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Write a file atomically: a process that is killed leaves the old file."""
  temporary = path.with_suffix('.tmp')
  temporary.write_bytes(content)
  temporary.rename(path)


def write_json(path: pathlib.Path, content: Any, allow_nan: bool = True) -> None:
  """Write content as JSON, atomically. With allow_nan=False, numbers that are not finite raise ValueError."""
  write_bytes(path, json.dumps(content, indent=1, allow_nan=allow_nan).encode())


def write_output(path: str, content: Any) -> None:
  """Write content as JSON to the file that a flag names, in place: it may be a link, or a device as /dev/stdout is."""
  pathlib.Path(path).write_text(json.dumps(content, indent=1) + '\n')


def read_json(path: pathlib.Path, default: Any = None) -> Any:
  """Return the content of a JSON file; `default` if it does not exist."""
  return json.loads(path.read_text()) if path.exists() else default


def check_local(path: str, name: str) -> None:
  """Raise UsageError if `path`, the value of flag or field `name`, is a URL: 'gs://b/x' would create a folder 'gs:'."""
  if '://' in path:
    raise UsageError(f'{name}={path!r} is a URL, but must be a path; mount the bucket (for example with gcsfuse) or '
                     'copy its files, and give that folder.')


def check_folder_of(path: str, name: str) -> None:
  """Raise UsageError if the folder of a file to write does not exist, before the work whose result it would get."""
  if not pathlib.Path(path).absolute().parent.is_dir():
    raise UsageError(f'{name}={path}: its folder does not exist; create it first.')
