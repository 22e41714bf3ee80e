"""Figures of a router sweep, drawn from results.json alone."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.analysis import expert_usage_file, interference_file
from uni_moe_jax.analysis.sweep import router_report, routers
from uni_moe_jax.analysis.sweep.variants import VARIANTS
from uni_moe_jax.eval import headline, metrics
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import save_figure
from uni_moe_jax.tasks.router_names import DENSE

SCORES, CURVES, INTERFERENCE = 'scores.png', 'curves.png', 'interference.png'
_COLUMNS, _DPI = 4, 110


def draw(results: Mapping[str, Any], out: storage.Path) -> dict[str, str]:
  """Writes all figures into `out`; returns {name of the file: what it shows}. Heat maps are of each first seed."""
  cells, captions = results['cells'], {}
  variants = list(dict.fromkeys(c['variant'] for c in cells))
  if results['account']['tasks']:
    _draw_scores(out / SCORES, results, variants)
    captions[SCORES] = 'scores of all variants with 95 % intervals' + (
        f' (of seeds alone: {x})' if (x := router_report.without_error(router_report.main_scores(results))) else '')
  if any(c['curves'] for c in cells):
    _draw_curves(out / CURVES, cells, variants)
    captions[CURVES] = 'training losses, means over seeds'
  if len(routers.checkpoints(cells)) > 1:
    _draw_interference(out / INTERFERENCE, cells, variants)
    captions[INTERFERENCE] = 'interference of different tasks over training, means over seeds'
  for variant in variants:
    of_variant = [c for c in cells if c['variant'] == variant]
    ends = lambda c: [m for k in (routers.INIT, routers.FINAL) if (m := c['interference'][k])]
    if c := next(filter(ends, of_variant), None):
      name, measured = f'interference_{variant}.png', ends(c)
      subsets = [{**m['subset'], 'subset': f'{c["name"]}, {m["checkpoint"]}'} for m in measured]
      content = measured[0]
      interference_file.draw(out / name, [subsets], content['tasks'], f'I(i, j), {content["parameters"]}')
      captions[name] = f'interference before and after training, {c["name"]}'
    if c := next((c for c in of_variant if c['experts']), None):
      expert_usage_file.draw(out / f'experts_{variant}.png', c['experts'])
      captions[f'experts_{variant}.png'] = f'experts by condition, {c["name"]}'
  return captions


def _colors(variants: Sequence[str]) -> dict[str, Any]:
  """Of each variant the same color in every sweep."""
  from matplotlib import colormaps
  others = [v for v in dict.fromkeys([*VARIANTS, *variants]) if v != DENSE]
  colors = [*colormaps['tab10'].colors, *colormaps['tab20'].colors[1::2]]
  return {DENSE: 'black', **dict(zip(others, itertools.cycle(colors)))}


def _panels(number: int, width: float, height: float) -> tuple[Any, list[Any]]:
  """A figure with `number` panels of width and height in inches."""
  from matplotlib.figure import Figure  # slow to import, and only figures need it
  columns = min(_COLUMNS, number)
  rows = math.ceil(number / columns)
  figure = Figure(figsize=(width * columns, height * rows + 0.5), layout='constrained')
  panels = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes in panels[number:]:
    axes.set_axis_off()
  for axes in panels[:number]:
    axes.tick_params(labelsize=7, length=2)
    axes.spines[['top', 'right']].set_visible(False)
  return figure, panels[:number]


def _draw_scores(path: storage.Path, results: Mapping[str, Any], variants: Sequence[str]) -> None:
  """A panel per evaluator: a bar per variant with its interval, and a dashed line for the strongest baseline."""
  by_key = {(s['evaluator'], s['metric'], s['variant']): s for s in results['scores']}
  tasks, colors = results['account']['tasks'], _colors(variants)
  figure, panels = _panels(len(tasks), 3.0, 0.17 * len(variants) + 0.75)
  for number, (task, axes) in enumerate(zip(tasks, panels, strict=True)):
    scores = {v: s for v in variants if (s := by_key.get((task['evaluator'], task['metric'], v)))}
    rows, values = [variants.index(v) for v in scores], [s['mean'] for s in scores.values()]
    axes.barh(rows, values, xerr=[s['interval'] or 0 for s in scores.values()], color=[colors[v] for v in scores],
              alpha=0.75, height=0.7, error_kw=dict(elinewidth=1, capsize=2))
    axes.set_yticks(range(len(variants)), variants if number % _COLUMNS == 0 else [''] * len(variants))
    axes.set_ylim(len(variants) - 0.4, -0.6)
    first = next(iter(scores.values()))
    if first['baselines']:
      name, value = headline.strongest_baseline(first)
      axes.axvline(value, color='grey', linestyle='--', linewidth=1)
      axes.set_xlabel(f'-- {name} {metrics.format_number(value)}', fontsize=7, color='dimgrey')
    axes.set_xlim(left=0)  # last: the axis does not grow after it
    lower = '' if first['higher_is_better'] else ' (lower is better)'
    axes.set_title(f'{task["evaluator"]}\n{task["metric"]}{lower}', fontsize=8)
  save_figure(figure, path, dpi=_DPI)


def _draw_curves(path: storage.Path, cells: Sequence[Mapping[str, Any]], variants: Sequence[str]) -> None:
  """A panel per task: the loss of every variant over steps, or over minutes if runs differ in their steps."""
  tasks, colors = list(dict.fromkeys(task for c in cells for task in c['curves'])), _colors(variants)
  by_time = len({c['steps'] for c in cells if c['curves']}) > 1
  figure, panels = _panels(len(tasks), 3.0, 2.2)
  for task, axes in zip(tasks, panels, strict=True):
    lowest = []
    for variant in variants:
      runs = [c for c in cells if c['variant'] == variant and task in c['curves']]
      length = min((len(c['curves'][task][0]) for c in runs), default=0)
      if not length:
        continue
      scale = np.median([c['seconds_per_step'] or np.nan for c in runs]) / 60 if by_time else 1
      steps, losses = np.mean([np.array(c['curves'][task])[:, :length] for c in runs], 0)
      axes.plot(steps * scale, losses, color=colors[variant], linewidth=1.1, label=variant)
      lowest += [losses.min(), np.quantile(losses, 0.9)]
    axes.set_ylim(min(lowest) * 0.95, max(lowest) * 1.05)  # without the first steps, which would flatten the rest
    axes.set_title(task, fontsize=8)
    axes.set_xlabel('minutes' if by_time else 'step', fontsize=7)
  _add_legend(figure, panels)
  save_figure(figure, path, dpi=_DPI)


def _draw_interference(path: storage.Path, cells: Sequence[Mapping[str, Any]], variants: Sequence[str]) -> None:
  """Two panels over checkpoints: the mean of pairs of tasks, and the share below 0, with their intervals."""
  checkpoints, colors = routers.checkpoints(cells), _colors(variants)
  figure, panels = _panels(2, 5.0, 3.2)
  for key, title, axes in zip(('mean_of_pairs', 'negative_share'), ('mean of pairs', 'share of pairs below 0'), panels,
                              strict=True):
    for number, variant in enumerate(variants):
      if means := routers.mean_interference(cells, variant):
        bounds = [m[key] for m in means.values()]
        value, low, high = (np.array([b[k] for b in bounds]) for k in ('value', 'low', 'high'))
        x = np.array([checkpoints.index(c) for c in means]) + 0.5 * (number / len(variants) - 0.5)  # side by side
        axes.errorbar(x, value, np.maximum([value - low, high - value], 0), color=colors[variant], linewidth=1.1,
                      elinewidth=0.8, capsize=2, label=variant)
    axes.axhline(0, color='grey', linewidth=0.6)
    axes.set_xticks(range(len(checkpoints)), checkpoints)
    axes.set_title(title, fontsize=8)
  _add_legend(figure, panels)
  save_figure(figure, path, dpi=_DPI)


def _add_legend(figure: Any, panels: Sequence[Any]) -> None:
  """One entry per variant, below all panels."""
  handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
  figure.legend(handles.values(), handles, loc='outside lower center', ncols=min(6, len(handles)), fontsize=8,
                frameon=False)
