"""Heat maps of the analyses: a matrix as colors, with labels and a text in every cell."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_DARK = 0.65  # from here on, texts are white


def draw(
    axes: Any, values: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None, colormap: str = 'Blues', lowest: float = 0.0) -> None:
  """Draws values [m, n] between `lowest` and 1 on Matplotlib axes. NaN has no color and a grey text."""
  m, n = values.shape
  colors = dict(cmap=colormap, vmin=lowest, vmax=1, edgecolors='lightgrey', linewidth=0.5)
  axes.pcolormesh(np.ma.masked_invalid(values), **colors)
  axes.set(xlim=(0, n), ylim=(m, 0), aspect='equal')
  axes.set_xticks(np.arange(len(column_labels)) + 0.5, column_labels, rotation=35, ha='right', fontsize=8)
  axes.set_yticks(np.arange(len(row_labels)) + 0.5, row_labels, fontsize=8)
  axes.tick_params(length=0)
  for i, row in enumerate(texts or ()):
    for j, text in enumerate(row):
      color = 'grey' if np.isnan(values[i, j]) else 'white' if abs(values[i, j]) > _DARK else 'black'
      axes.text(j + 0.5, i + 0.5, text, ha='center', va='center', fontsize=8, color=color)
