"""Figures with units and budgets, as a plain-text table and as JSON."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

from uni_moe_jax.tools.bench.timing import SPREAD, Estimate

NOT_JUDGED, FAILED = 'not judged', 'failed'
REDUCED = 'sizes, rounds and compiler optimizations are reduced (--quick): everything runs, but no budget is judged'


@dataclasses.dataclass(frozen=True)
class Budget:
  """A bound in the unit of the row, and a better one as a stretch goal. at_most: smaller is better."""
  bound: float
  stretch: float | None = None
  at_most: bool = True

  def verdict(self, value: float) -> str:
    """Return 'met', 'met, stretch' or 'missed'."""
    meets = operator.le if self.at_most else operator.ge
    if not meets(value, self.bound):
      return 'missed'
    return 'met, stretch' if self.stretch is not None and meets(value, self.stretch) else 'met'

  def __str__(self) -> str:
    sign = '<=' if self.at_most else '>='
    return f'{sign} {self.bound:g}' + (f' ({self.stretch:g})' if self.stretch is not None else '')


@dataclasses.dataclass(frozen=True)
class Row:
  """One figure, or why there is none."""
  suite: str
  name: str  # of the measurement
  figure: Estimate | None
  unit: str
  budget: Budget | None = None  # in that unit
  note: str = ''  # conditions of the measurement, or the error
  missing: str = ''  # why there is no figure: `FAILED`, 'not installed', …

  def verdict(self, reduced: bool) -> str:
    """Return whether the budget is met; '' without one, and no verdict if other processes disturbed the rounds.

    Without a figure it is the reason.
    """
    if self.figure is None or self.budget is None:
      return self.missing
    return NOT_JUDGED if reduced or not self.figure.judged else self.budget.verdict(self.figure.value)


def render(rows: Sequence[Row], header: dict[str, Any], reduced: bool) -> str:
  """Return the header and the table, with numbered notes below it."""
  lines = [f'{k}: {v}' for k, v in header.items()] + [SPREAD] + ([REDUCED] if reduced else [])
  notes = list(dict.fromkeys(r.note for r in rows if r.note))
  cells = [('suite', 'measurement', 'figure', 'unit', 'spread', 'budget (stretch)', 'verdict', 'note')]
  for r in rows:
    value, spread = ('–', '') if r.figure is None else (number(r.figure.value), _spread(r.figure))
    cells.append((r.suite, r.name, value, r.unit, spread, '' if r.budget is None else str(r.budget),
                  r.verdict(reduced), f'[{notes.index(r.note) + 1}]' if r.note else ''))
  widths = [max(map(len, column)) for column in zip(*cells)]
  aligns = '<<><><<<'
  table = ['  '.join(f'{c:{a}{w}}' for c, a, w in zip(row, aligns, widths)).rstrip() for row in cells]
  rule = '  '.join('-' * w for w in widths)
  return '\n'.join([*lines, '', table[0], rule, *table[1:], *[f'[{i}] {n}' for i, n in enumerate(notes, 1)]])


def _spread(figure: Estimate) -> str:
  spread = 'once' if figure.low is None else f'{number(figure.low)} to {number(figure.high)}'
  if figure.discarded:
    spread += f', {figure.discarded} rounds {"discarded" if figure.judged else "disturbed"}'
  return spread


def number(x: float) -> str:
  """Format with three significant digits and no exponent: 0.00123, 1.23, 123, 12345."""
  return '0' if x == 0 else f'{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}'


def as_json(rows: Sequence[Row], header: dict[str, Any], reduced: bool) -> dict[str, Any]:
  """Return the unrounded figures as plain values."""
  def row(r: Row) -> dict[str, Any]:
    budget = None if r.budget is None else dataclasses.asdict(r.budget)
    figure = {f.name: None for f in dataclasses.fields(Estimate)} if r.figure is None else dataclasses.asdict(r.figure)
    return {'suite': r.suite, 'name': r.name, **figure, 'unit': r.unit, 'budget': budget,
            'verdict': r.verdict(reduced), 'note': r.note}
  return {'header': header, 'spread': SPREAD, 'reduced': reduced, 'rows': [row(r) for r in rows]}
