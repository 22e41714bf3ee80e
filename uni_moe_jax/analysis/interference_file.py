"""interference.json and its heat maps. Knows numbers and names only: the report reads it too, and needs no jax."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.utils.files import write_json

FILE = 'interference.json'  # of the newest checkpoint; the report shows it
_CELL = 0.95  # inches
_RATIO, _BASE = 'ratio_of_means', 'delta'


def write(content: dict, workdir: str | os.PathLike[str], stem: str) -> list[pathlib.Path]:
  """Writes <stem>.json, <stem>.png (all parameters) and <stem>_parts.png (layers down, projections across)."""
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f'{stem}{end}' for end in ('.json', '.png', '_parts.png')]
  whole, *parts = content['parts']
  tasks, title = content['tasks'], f'I(i, j), {content["parameters"]}, {content["checkpoint"]}'
  draw(paths[1], [[whole]], tasks, title)
  rows = list(dict.fromkeys(p['layer'] for p in parts))
  columns = list(dict.fromkeys(p['projection'] for p in parts))
  grid = [[next((p for p in parts if (p['layer'], p['projection']) == (r, c)), None) for c in columns] for r in rows]
  draw(paths[2], grid, tasks, title)
  write_json(paths[0], content)
  return paths


def has_base(part: Mapping[str, Any]) -> list[bool]:
  """Whether a step on the task itself lowers its loss beyond doubt: else its row of ratios says nothing."""
  return [part[_BASE]['low'][i][i] is not None and part[_BASE]['low'][i][i] > 0 for i in range(len(part[_BASE]['low']))]


def in_short(part: Mapping[str, Any]) -> str:
  """What holds for all pairs of different tasks together, in words; '' of files that do not say."""
  mean, share = (part.get(measure, {}) for measure in ('between', 'negative'))
  if mean.get('value') is None:
    return ''
  return (f'mean of different tasks {mean["value"]:.3f} ({mean["low"]:.3f} … {mean["high"]:.3f}), '
          f'below 0: {share["value"]:.0%} ({share["low"]:.0%} … {share["high"]:.0%})')


def note(part: Mapping[str, Any], tasks: Sequence[str], i: int, j: int) -> str:
  """One pair of tasks in words: both ratios with their intervals."""
  said = [f'a step on {tasks[j]} for the loss of {tasks[i]}']
  for measure, name in ((_RATIO, 'ratio of means'), ('mean_of_ratios', 'mean of ratios')):
    value, low, high = (part[measure][k][i][j] for k in ('value', 'low', 'high'))
    said.append(f'{name} unknown' if None in (value, low, high) else f'{name} {value:.3f} ({low:.3f} … {high:.3f})')
  return '; '.join(said)


def draw(path: pathlib.Path, grid: Sequence[Sequence[Mapping[str, Any] | None]], tasks: Sequence[str], title: str) -> None:
  """Ratios of means as numbers on colours: blue helps, red hurts, white is 0, saturated at ±1. A part is headed by its name."""
  from matplotlib import figure  # slow, and only pictures need it
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  T, label = len(tasks), 0.085 * max(map(len, tasks))
  side, margin = _CELL * T, 0.9
  width, height = len(grid[0]) * (side + label + margin), len(grid) * (side + label + margin) + 0.6
  sheet = figure.Figure(figsize=(max(width, 6), height), layout='constrained')
  FigureCanvasAgg(sheet)
  legend = 'row: task whose loss is looked at; column: task that is stepped on; below: 95 % interval'
  sheet.suptitle(f'{title}\n{legend}', fontsize=9)
  for axes, part in zip(sheet.subplots(len(grid), len(grid[0]), squeeze=False).flat, [p for row in grid for p in row]):
    if part is None:
      axes.set_axis_off()
      continue
    matrix, sure = part[_RATIO], has_base(part)
    values = np.array(matrix['value'], np.float64)
    shown = np.where(np.array(sure)[:, None], values, np.nan)  # what says nothing has no colour
    axes.imshow(np.ma.masked_invalid(shown), cmap='RdBu', vmin=-1, vmax=1)
    axes.set_title(part['part'], fontsize=10)
    axes.set_xticks(range(T), tasks, rotation=35, ha='right', fontsize=9)
    axes.set_yticks(range(T), [name if ok else f'{name} °' for name, ok in zip(tasks, sure)], fontsize=9)
    axes.tick_params(length=0)
    for i in range(T):
      for j in range(T):
        dark = abs(values[i, j]) > 0.65 and sure[i]
        colour = 'white' if dark else 'black' if sure[i] else 'grey'
        axes.text(j, i, _cell(matrix, i, j), ha='center', va='center', fontsize=8, color=colour)
  if not all(all(has_base(p)) for row in grid for p in row if p):
    sheet.supxlabel('° a step on the task itself has no sure effect: its row says nothing', fontsize=9)
  sheet.savefig(path, dpi=110, bbox_inches='tight', pad_inches=0.15)


def _cell(matrix: Mapping[str, Any], i: int, j: int) -> str:
  value, low, high = (matrix[k][i][j] for k in ('value', 'low', 'high'))
  if value is None:
    return '–'
  bounds = '' if i == j or low is None or high is None else f'\n{low:.2f} … {high:.2f}'
  return f'{value:.2f}{bounds}'
