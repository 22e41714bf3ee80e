"""What is read first of an evaluation: for each evaluator its main metric beside the strongest baseline, and a verdict.

All metrics stay in evaluation.json and in the report.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uni_moe_jax.eval import metrics

MAX_ROWS = 12
# The main metric of each type of evaluator whose first metric is another one.
_MAIN = ('word F1', 'perplexity')
_ARROWS = {metrics.BETTER: '▲', metrics.LEVEL: '=', metrics.WORSE: '▼'}
_COLUMNS = ('evaluator', 'metric', 'model', 'strongest baseline', '')


@dataclasses.dataclass(frozen=True)
class Line:
  """The main metric of an evaluator. baseline: (name, value) of the strongest one; None where there is none."""
  row: Mapping[str, Any]
  baseline: tuple[str, float] | None

  @property
  def verdict(self) -> str:
    """'better', 'level' or 'worse'; '' without a baseline."""
    if not self.baseline:
      return ''
    name, value = self.baseline
    return metrics.verdict(self.row, value, name)

  @property
  def cells(self) -> tuple[str, ...]:
    """Evaluator, metric, model, baseline, verdict."""
    name, value = self.baseline or ('', None)
    direction = '' if self.row['higher_is_better'] else ' (lower is better)'
    return (self.row['evaluator'], self.row['metric'] + direction, metrics.format_number(self.row['value']),
            f'{metrics.format_number(value)} {name}'.strip(), f'{_ARROWS.get(self.verdict, "")} {self.verdict}'.strip())


def strongest_baseline(row: Mapping[str, Any]) -> tuple[str, float] | None:
  """(name, value) of the strongest baseline of a row of evaluation.json; chance counts as one where no other is."""
  chance = {} if row.get('chance') is None else {'chance': row['chance']}
  best = max if row['higher_is_better'] else min
  return best((row.get('baselines') or chance).items(), key=lambda item: item[1], default=None)


def lines(rows: Iterable[Mapping[str, Any]]) -> list[Line]:
  """One line for each evaluator, in the order of the rows of evaluation.json."""
  groups = collections.defaultdict(list)
  for row in rows:
    groups[row['evaluator']].append(row)
  main = [next((row for row in group if row['metric'] in _MAIN), group[0]) for group in groups.values()]
  return [Line(row, strongest_baseline(row)) for row in main]


def first_lines(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Line], int]:
  """(at most `MAX_ROWS` lines, in order; number of lines left out).

  Of evaluators with one name before a comma, such as the splits of a task, the later ones are left out first.
  """
  evaluated = lines(rows)
  names = [line.row['evaluator'].partition(',')[0] for line in evaluated]
  by_rank = sorted(range(len(names)), key=lambda i: names[:i].count(names[i]))
  return [evaluated[i] for i in sorted(by_rank[:MAX_ROWS])], max(0, len(evaluated) - MAX_ROWS)


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
  """How many metrics are better than, level with and worse than their strongest baseline; '' if none has one."""
  verdicts = [Line(row, baseline).verdict for row in rows if (baseline := strongest_baseline(row))]
  if not verdicts:
    return ''
  better, level, worse = (verdicts.count(x) for x in (metrics.BETTER, metrics.LEVEL, metrics.WORSE))
  return (f'Of {len(verdicts)} metrics, {better} are better than their strongest baseline, {level} level with it (less '
          f'than {metrics.SIGNIFICANT:.0f} standard errors away) and {worse} worse.')


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The headline as aligned plain text: the lines, then the sentence."""
  evaluated, hidden = first_lines(rows)
  if not evaluated:
    return 'no evaluation rows'
  cells = [_COLUMNS, *(line.cells for line in evaluated)]
  widths = [max(map(len, column)) for column in zip(*cells)]
  text = ['  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(row, '<<><<', widths)).rstrip()
          for row in cells]
  text.insert(1, '  '.join('-' * width for width in widths))
  more = [f'… and {hidden} more in evaluation.json'] if hidden else []
  return '\n'.join([*text, *more, sentence(rows)]).rstrip()
