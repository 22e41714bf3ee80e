"""The text of a metrics.jsonl as numbers."""

import json

Curves = dict[str, tuple[list[int], list[float]]]  # metric name -> steps, values


def read(text: str) -> tuple[Curves, int]:
  """Every metric's curve in the text of a metrics.jsonl, and how many lines were unreadable.

  After a restart from an older checkpoint a step occurs twice in the file: the later line counts.
  """
  points, bad = {}, 0
  for line in text.splitlines():
    try:
      row = json.loads(line)
      step = int(row.pop('step'))
    except (ValueError, KeyError, TypeError, AttributeError):
      bad += bool(line.strip())
      continue
    for name, value in row.items():
      if isinstance(value, (int, float)):
        points.setdefault(name, {})[step] = float(value)
  return {name: tuple(map(list, zip(*sorted(of_step.items())))) for name, of_step in points.items()}, bad
