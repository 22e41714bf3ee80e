"""Markdown tables of the results."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
  """Lines of Markdown; None is an empty cell, a float has two digits, and a | in a name divides no cell."""
  lines = (columns, ['---'] * len(columns), *rows)
  return [f'| {" | ".join(map(_cell, line))} |' for line in lines]


def _cell(value: Any) -> str:
  return '' if value is None else f'{value:.2f}' if isinstance(value, float) else str(value).replace('|', r'\|')
