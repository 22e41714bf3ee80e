"""interference.json and its heat maps, which the report shows; nothing here needs JAX."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.analysis import heat_map
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import save_figure, write_json

FILE = 'interference.json'  # of the newest checkpoint
FIGURES = ('interference.png', 'interference_subsets.png')  # of all parameters; of layers × projections
_BOUNDS = ('value', 'low', 'high')
_CELL = 0.95  # inches
_LEGEND = 'row: task whose loss is measured; column: task of the step; below each value: 95 % interval'
_NO_BASE_LEGEND = '° a step on the task itself has no certain effect: its row has no meaning'  # of the mark °


def write(content: Mapping[str, Any], workdir: str | os.PathLike[str], stem: str) -> list[storage.Path]:
  """Writes <stem>.json, <stem>.png (all parameters) and <stem>_subsets.png (layers × projections)."""
  folder = storage.path(workdir)
  storage.make_folder(folder)
  paths = [folder / (stem + end) for end in ('.json', '.png', '_subsets.png')]
  total, *subsets = content['subsets']
  by_key = {(s['layer'], s['projection']): s for s in subsets}
  layers, projections = (dict.fromkeys(keys) for keys in zip(*by_key, strict=True))
  by_layer = [[by_key.get((layer, p)) for p in projections] for layer in layers]
  write_json(paths[0], content)  # first: a figure that cannot be drawn costs no measurement
  for path, grid in zip(paths[1:], ([[total]], by_layer), strict=True):
    draw(path, grid, content['tasks'], f'I(i, j), {content["parameters"]}, {content["checkpoint"]}')
  return paths


def has_base(subset: Mapping[str, Any]) -> list[bool]:
  """Whether Δ of a step on the task itself is certainly above 0, per task; else its row has no base."""
  low = subset['delta']['low']
  return [low[i][i] is not None and low[i][i] > 0 for i in range(len(low))]


def labels(subset: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
  """The tasks, with ° where a row has no base."""
  return [task if ok else f'{task} °' for task, ok in zip(tasks, has_base(subset), strict=True)]


def draw(
    path: storage.Path, grid: Sequence[Sequence[Mapping[str, Any] | None]], tasks: Sequence[str], title: str) -> None:
  """Draws a heat map of I(i, j) per subset; None leaves a gap.

  Blue helps, red hurts, white is 0; colors are saturated at ±1.
  """
  from matplotlib.figure import Figure  # slow to import, and only figures need it
  size = _CELL * len(tasks) + 0.085 * max(map(len, tasks)) + 0.9
  figure = Figure(figsize=(max(len(grid[0]) * size, 6), len(grid) * size + 0.6), layout='constrained')
  figure.suptitle(f'{title}\n{_LEGEND}', fontsize=9)
  subsets = [subset for row in grid for subset in row]
  for axes, subset in zip(figure.subplots(len(grid), len(grid[0]), squeeze=False).flat, subsets, strict=True):
    if subset is None:
      axes.set_axis_off()
      continue
    ratio, indices = subset['ratio_of_means'], range(len(tasks))
    values = np.where(np.array(has_base(subset))[:, None], np.array(ratio['value'], np.float64), np.nan)
    texts = [[_cell(*(ratio[k][i][j] for k in _BOUNDS), i == j) for j in indices] for i in indices]
    heat_map.draw(axes, values, labels(subset, tasks), tasks, texts, colormap='RdBu', lowest=-1)
    axes.set_title(subset['subset'], fontsize=10)
  if not all(all(has_base(s)) for s in subsets if s):
    figure.supxlabel(_NO_BASE_LEGEND, fontsize=9)
  save_figure(figure, path, dpi=110, bbox_inches='tight', pad_inches=0.15)


def _cell(value: float | None, low: float | None, high: float | None, is_own: bool) -> str:
  bounds = '' if is_own or low is None or high is None else f'\n{low:.2f} … {high:.2f}'
  return '–' if value is None else f'{value:.2f}{bounds}'
