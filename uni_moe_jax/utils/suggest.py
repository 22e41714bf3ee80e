"""The nearest valid names, for error messages."""

import difflib
from collections.abc import Iterable


def nearest(name: str, choices: Iterable) -> str:
  """Return 'did you mean a or b? choices: …'."""
  choices = sorted(set(map(str, choices)))
  close = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.5)
  hint = f'did you mean {" or ".join(map(repr, close))}? ' if close else ''
  return f'{hint}choices: {", ".join(choices) or "none"}'
