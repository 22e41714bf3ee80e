"""Curves of a run: metrics.jsonl as numbers, and as one figure."""

import math
import os
from collections.abc import Sequence

from uni_moe_jax.analysis import metric_curves
from uni_moe_jax.analysis.metric_curves import Curves
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import save_figure
from uni_moe_jax.reporting import figures
from uni_moe_jax.utils.errors import UsageError

_COLUMNS, _PANEL = 4, (3.0, 2.1)  # panels in a row; inches


def read(text: str) -> tuple[Curves, int]:
  """As `metric_curves.read`, but raises UsageError if no line contains a metric."""
  curves, bad = metric_curves.read(text)
  if not curves:
    raise UsageError(f'no line contains a metric; unreadable lines: {bad}')
  return curves, bad


def draw(path: str | os.PathLike[str], curves: Curves, groups: Sequence[str], title: str) -> None:
  """Draws every curve of some groups, such as 'loss', a panel each: every point faint, smoothed strong.

  Raises:
    UsageError: no curve belongs to one of the groups.
  """
  from matplotlib import figure  # slow to import, and only figures need it
  names = [name for group in groups for name in sorted(curves) if name.startswith(f'{group}/')]
  if not names:
    wanted = ' or '.join(f'{group}/…' for group in groups)
    raise UsageError(f'no curve is named {wanted}; the run has {", ".join(sorted(curves))}.')
  rows = math.ceil(len(names) / _COLUMNS)
  sheet = figure.Figure(figsize=(_PANEL[0] * _COLUMNS, _PANEL[1] * rows + 0.4), layout='constrained')
  sheet.suptitle(title, fontsize=9)
  panels = sheet.subplots(rows, _COLUMNS, squeeze=False).flat
  for name, axes in zip(names, panels):  # names first: panels without a curve are hidden below
    steps, values = curves[name]
    axes.plot(steps, values, color='#9db8cc', linewidth=0.6)
    axes.plot(steps, figures.smooth(values), color='#28608f', linewidth=1.5)
    axes.set_title(f'{name}  {values[-1]:.3g}', fontsize=8, loc='left')
    axes.tick_params(labelsize=7, length=2)
    axes.spines[['top', 'right']].set_visible(False)
  for axes in list(panels):
    axes.set_axis_off()
  save_figure(sheet, storage.path(path), dpi=110)
