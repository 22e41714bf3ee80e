"""Files that a reader never sees half written."""

import json
import pathlib
from typing import Any


def write_json(path: pathlib.Path, content: Any, allow_nan: bool = True) -> None:
  """Writes content as JSON, whole or not at all: a process that is killed leaves what was there before.

  Raises:
    ValueError: a number is not finite and allow_nan is False: not every reader knows NaN.
  """
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(content, indent=1, allow_nan=allow_nan))
  temporary.rename(path)
