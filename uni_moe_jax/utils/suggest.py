"""Nearest valid names for an error message."""

import difflib


def nearest(name: str, choices) -> str:
  """'did you mean a or b? (choices: …)' for an error message."""
  choices = sorted(set(map(str, choices)))
  close = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.5)
  hint = f'did you mean {" or ".join(map(repr, close))}? ' if close else ''
  return f'{hint}choices: {", ".join(choices) or "none"}'
