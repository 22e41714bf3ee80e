"""experts.json and its figure, which the report shows; nothing here needs JAX."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from uni_moe_jax.analysis import heat_map
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import save_figure, write_json

FILE, FIGURE = 'experts.json', 'experts.png'  # of the newest checkpoint
_CELL, _TASK_CELL, _LETTER = 0.21, 0.42, 0.07  # inches
_MAX_SPANS = 4  # in the label of a condition


def write(content: dict[str, Any], workdir: str | os.PathLike[str], stem: str) -> list[storage.Path]:
  """Writes <stem>.json and <stem>.png; returns their paths.

  Raises:
    ValueError: a number is not finite.
  """
  folder = storage.path(workdir)
  storage.make_folder(folder)
  paths = [folder / (stem + end) for end in ('.json', '.png')]
  write_json(paths[0], content, allow_nan=False)  # first: a figure that cannot be drawn costs no measurement
  draw(paths[1], content)
  return paths


def labels(content: Mapping[str, Any]) -> list[str]:
  """Names of conditions, with their spans unless the name contains one: '10011000 (visual)'."""
  names = []
  for i, condition in enumerate(content['conditions']):
    spans = list(dict.fromkeys(
        span for by_span in content['tasks'].values() for span, index in by_span.items() if index == i))
    listed = ', '.join(spans[:_MAX_SPANS]) + (', …' if len(spans) > _MAX_SPANS else '')
    names.append(f'{condition} ({listed})' if spans and not any(span in condition for span in spans) else condition)
  return names


def draw(path: storage.Path, content: Mapping[str, Any]) -> None:
  """Draws coefficients as a grid of heat maps, router by layer; below, the overlap of tasks."""
  from matplotlib.figure import Figure  # slow to import, and only figures need it
  shares, effective = (np.asarray(content[k], np.float64) for k in ('coefficients', 'effective_experts'))
  L, R, A, E = shares.shape
  names, tasks = labels(content), list(content['tasks'])
  heights = [R * (A * _CELL + 0.6) + 0.6, _TASK_CELL * len(tasks) + _LETTER * max(map(len, tasks)) + 0.8]
  width = _LETTER * max(map(len, names)) + L * (E * _CELL + 0.5)
  figure = Figure(figsize=(max(width, 6), sum(heights)), layout='constrained')
  top, bottom = figure.subfigures(2, 1, height_ratios=heights)
  batches = f', {content["num_batches"]} batches' if content['num_batches'] else ''
  top.suptitle(f'{content["router"]} router, {content["checkpoint"]}{batches}: share of every expert (columns; white '
               '0, dark 1)\nin a condition (rows), and the effective number of experts', fontsize=9)
  for (r, i), axes in np.ndenumerate(top.subplots(R, L, squeeze=False)):
    heat_map.draw(axes, shares[i, r], names if i == 0 else [], [])
    axes.set_title(f'layer {content["layers"][i]} {content["sublayers"][r]}', fontsize=8)
    for a in range(A):
      axes.text(E + 0.2, a + 0.5, f'{effective[i, r, a]:.1f}', fontsize=7, va='center', color='dimgrey')
  overlap = np.asarray(content['mean_task_overlap'], np.float64)
  axes = bottom.subplots()
  heat_map.draw(axes, overlap, tasks, tasks, [[f'{value:.2f}' for value in row] for row in overlap])
  axes.set_title('overlap of two tasks, mean over layers and routers\n(1: the same experts, 0: no common one)',
                 fontsize=9)
  save_figure(figure, path, dpi=110, bbox_inches='tight', pad_inches=0.15)
