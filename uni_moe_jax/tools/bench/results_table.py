"""Rows of figures with units and budgets, as a plain-text table and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from uni_moe_jax.tools.bench.timing import SPREAD, Estimate

NOT_JUDGED = 'not judged'
REDUCED = "sizes, rounds and the compiler's optimisations are reduced (--quick): it runs, but no figure here is one of the budgets'"


@dataclasses.dataclass(frozen=True)
class Budget:
  """A bound in the row's unit, and a better one that would be welcome. at_most: smaller is better."""
  bound: float
  stretch: float | None = None
  at_most: bool = True

  def verdict(self, value: float) -> str:
    """'met', 'met, stretch' or 'missed'."""
    if not self._holds(value, self.bound):
      return 'missed'
    return 'met, stretch' if self.stretch is not None and self._holds(value, self.stretch) else 'met'

  def _holds(self, value: float, bound: float) -> bool:
    return value <= bound if self.at_most else value >= bound

  def __str__(self) -> str:
    sign = '<=' if self.at_most else '>='
    return f'{sign} {self.bound:g}' + (f' ({self.stretch:g})' if self.stretch is not None else '')


@dataclasses.dataclass(frozen=True)
class Row:
  """One figure.

  Attributes:
    subject: of `settings.SUITES`. what: is measured.
    figure: value and quartiles. unit: of them.
    budget: in that unit, or None: information.
    note: what a reader has to know.
  """
  subject: str
  what: str
  figure: Estimate
  unit: str
  budget: Budget | None = None
  note: str = ''

  def verdict(self, reduced: bool) -> str:
    """Whether the budget is met; '' without one."""
    if self.budget is None:
      return ''
    return NOT_JUDGED if reduced else self.budget.verdict(self.figure.value)


def render(rows: Sequence[Row], header: dict[str, Any], reduced: bool) -> str:
  """The header, one line each, and the table; notes stand below it by number."""
  lines = [f'{k}: {v}' for k, v in header.items()] + [SPREAD] + ([REDUCED] if reduced else [])
  notes = list(dict.fromkeys(r.note for r in rows if r.note))
  cells = [('subject', 'what', 'figure', 'unit', 'spread', 'budget (stretch)', 'verdict', 'note')]
  for r in rows:
    f = r.figure
    spread = 'once' if f.low is None else f'{number(f.low)} to {number(f.high)}'
    cells.append((r.subject, r.what, number(f.value), r.unit, spread, '' if r.budget is None else str(r.budget),
                  r.verdict(reduced), f'[{notes.index(r.note) + 1}]' if r.note else ''))
  widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
  right = (2, 4)  # numbers end in one column
  table = ['  '.join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
           for row in cells]
  rule = '  '.join('-' * w for w in widths)
  return '\n'.join([*lines, '', table[0], rule, *table[1:], *[f'[{i}] {n}' for i, n in enumerate(notes, 1)]])


def number(x: float) -> str:
  """Three significant digits and never a power of ten: 0.00123, 1.23, 123, 12345."""
  return '0' if x == 0 else f'{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}'


def as_json(rows: Sequence[Row], header: dict[str, Any], reduced: bool) -> dict[str, Any]:
  """What is written to a file: figures unrounded."""
  def one(r: Row) -> dict[str, Any]:
    budget = None if r.budget is None else dataclasses.asdict(r.budget)
    return {'subject': r.subject, 'what': r.what, **dataclasses.asdict(r.figure), 'unit': r.unit, 'budget': budget,
            'verdict': r.verdict(reduced), 'note': r.note}
  return {'header': header, 'spread': SPREAD, 'reduced': reduced, 'rows': [one(r) for r in rows]}
