"""experts.json and its picture. Knows numbers and names only: the report reads it too, and needs no jax."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from uni_moe_jax.utils.files import write_json

FILE = 'experts.json'  # of the newest checkpoint; the report shows it
_CELL, _LETTER = 0.21, 0.07  # inches
_MATRIX_CELL = 0.42
_MOST_SPANS = 4  # named beside a row


def write(content: dict[str, Any], workdir: str | os.PathLike[str], stem: str) -> list[pathlib.Path]:
  """Writes <stem>.json and <stem>.png; returns their paths."""
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f'{stem}{end}' for end in ('.json', '.png')]
  _draw(paths[1], content)
  write_json(paths[0], content, allow_nan=False)
  return paths


def labels(content: Mapping[str, Any]) -> list[str]:
  """Names of rows, with what uses them where the name does not say it: '10011000 (visual)'."""
  found = []
  for i, row in enumerate(content['rows']):
    spans = list(dict.fromkeys(span for of in content.get('tasks', {}).values() for span, place in of.items() if place == i))
    said = ', '.join(spans[:_MOST_SPANS]) + (', …' if len(spans) > _MOST_SPANS else '')
    found.append(f'{row} ({said})' if spans and not any(span in row for span in spans) else row)
  return found


def users(content: Mapping[str, Any], row: int) -> str:
  """Which tasks use a row, and what of them: 'a: visual; b: words, queries'."""
  found = {task: [span for span, place in of.items() if place == row] for task, of in content.get('tasks', {}).items()}
  return '; '.join(f'{task}: {", ".join(spans)}' for task, spans in found.items() if spans)


def mean_effective(content: Mapping[str, Any]) -> np.ndarray:
  """[R, A]: effective number of experts, the mean over layers."""
  return np.asarray(content['effective_experts'], np.float64).mean(0)


def _draw(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Coefficients as shades: routers down, layers across, effective numbers of experts behind; below, how tasks overlap."""
  from matplotlib import figure  # slow, and only pictures need it
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  shares, effective = (np.asarray(content[k], np.float64) for k in ('coefficients', 'effective_experts'))
  L, R, A, E = shares.shape
  names, tasks = labels(content), list(content['tasks'])
  left, top, gap = _LETTER * max(map(len, names)) + 0.2, 0.75, 0.55
  width, height = E * _CELL, A * _CELL
  side, margin = _MATRIX_CELL * len(tasks), _LETTER * max(map(len, tasks)) + 0.15
  across = max(left + L * (width + gap), margin + side + margin, 6)
  down = top + R * (height + 0.55) + side + margin + 0.55
  sheet = figure.Figure(figsize=(across, down))
  FigureCanvasAgg(sheet)
  place = lambda x, y, w, h: sheet.add_axes((x / across, 1 - (y + h) / down, w / across, h / down))
  measured = f', {content["batches"]} batches' if content['batches'] else ''
  title = (f'{content["router"]} router, {content["checkpoint"]}{measured}: what a row takes of every expert\n(columns; white 0, '
           'dark 1; rows sum to 1), and how many experts that is in effect')
  sheet.text(0.1 / across, 1 - 0.1 / down, title, fontsize=9, va='top')
  for r, router in enumerate(content['routers']):
    for i, layer in enumerate(content['layers']):
      axes = place(left + i * (width + gap), top + r * (height + 0.55), width, height)
      axes.pcolormesh(shares[i, r], cmap='Blues', vmin=0, vmax=1, edgecolors='lightgrey', linewidth=0.5)
      axes.set(ylim=(A, 0), xticks=[], title=f'layer {layer} {router}')
      axes.title.set_fontsize(8)
      axes.set_yticks(np.arange(A) + 0.5, names if i == 0 else [''] * A, fontsize=8)
      axes.tick_params(length=0)
      for a in range(A):
        axes.text(E + 0.2, a + 0.5, f'{effective[i, r, a]:.1f}', fontsize=7, va='center', color='dimgrey')
  overlap = np.asarray(content['mean_task_overlap'], np.float64)
  axes = place(margin, down - margin - side, side, side)
  axes.pcolormesh(overlap, cmap='Blues', vmin=0, vmax=1, edgecolors='white', linewidth=0.5)
  axes.set(xlim=(0, len(tasks)), ylim=(len(tasks), 0))
  axes.set_title('overlap of two tasks, mean over layers and routers\n(1: the same experts, 0: none in common)', fontsize=9,
                 loc='left')
  axes.set_xticks(np.arange(len(tasks)) + 0.5, tasks, rotation=35, ha='right', fontsize=8)
  axes.set_yticks(np.arange(len(tasks)) + 0.5, tasks, fontsize=8)
  axes.tick_params(length=0)
  for i, row in enumerate(overlap):
    for j, value in enumerate(row):
      colour = 'white' if value > 0.6 else 'black'
      axes.text(j + 0.5, i + 0.5, f'{value:.2f}', ha='center', va='center', fontsize=8, color=colour)
  sheet.savefig(path, dpi=110, bbox_inches='tight', pad_inches=0.15)
