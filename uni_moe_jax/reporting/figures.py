"""Small figures as inline SVG, in the colors of the page that contains them.

Drawn by hand rather than by a plotting library, so that text stays text, one file works without a
network, and light and dark need no second figure: every mark only names a CSS class, and
`STYLE` maps the classes to the page's custom properties (--ink, --muted, --line, --accent,
--second).

Axis letters: L layers, A condition rows, E experts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from uni_moe_jax.utils.errors import UsageError

STYLE = """
svg text { font: 10px var(--sans); fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .name { font-size: 11px; font-weight: 600; fill: var(--ink); }
svg .now { font-size: 11px; fill: var(--accent); font-weight: 600; }
svg .row { font-size: 11px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .raw { stroke: var(--accent); stroke-width: 1; opacity: .28; fill: none; }
svg .curve { stroke: var(--accent); stroke-width: 1.8; fill: none; stroke-linejoin: round; }
svg .dot { fill: var(--accent); }
svg .reference { stroke: var(--second); stroke-width: 1.2; stroke-dasharray: 4 3; }
svg .reference-name { fill: var(--second); }
svg .track { fill: var(--line); }
svg .bar { fill: var(--accent); }
svg .tick { fill: var(--second); }
svg .cell { fill: var(--accent); }
svg .minus { fill: var(--second); }
svg .inside { fill: var(--ink); }
"""

_WIDTH, _HEIGHT = 270, 164  # of a line panel, in SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 30, 20
_MOST_POINTS = 240  # drawn per curve: more than pixels that could show them
_LOG_SPAN = 40  # a positive curve that spans more than this factor gets a logarithmic axis
_MOST_COLUMNS = 48  # expert columns in one line of a heat map


def smooth(values: np.ndarray) -> np.ndarray:
  """Returns float [n]: each point averaged over a window that grows with its place in the curve.

  Point i becomes the mean of points 0.9 i - 2 to 1.1 i + 2 (the first ones of as many as there are
  on both sides): nearly constant on a logarithmic axis, so the steep start keeps its shape and
  the long tail loses its noise.
  """
  values = np.asarray(values, np.float64)
  index = np.arange(len(values))
  half = np.minimum(index // 10 + 2, index)
  low, high = index - half, np.minimum(index + half, len(values) - 1) + 1
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[high] - sums[low]) / (high - low)


def nice_ticks(low: float, high: float, most: int = 4) -> list[float]:
  """Returns at most `most` round numbers (1, 2, 2.5 or 5 times a power of ten) in [low, high]."""
  if not high > low:
    return [low]
  power = 10.0 ** math.floor(math.log10((high - low) / most))

  def between(step: float) -> range:
    return range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)

  step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20, 25, 50)
              if len(between(power * factor)) <= most)
  return [i * step for i in between(step)]


def short_number(value: float) -> str:
  """Returns an axis label: 1500 as 1.5k, 2000000 as 2M, 0.0001 as 1e-4, 0.25 as it is."""
  size = abs(value)
  for bound, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if size >= bound:
      return f'{value / bound:.4g}{letter}'
  if size >= 1e-2 or value == 0:
    return f'{value:.4g}'
  mantissa, exponent = f'{value:.2e}'.split('e')
  return f'{float(mantissa):g}e{int(exponent)}'


def line_panel(name: str, steps: Sequence[float], values: Sequence[float], latest: str,
               detail: str = '', reference: tuple[str, float] | None = None, smoothed: bool = True
               ) -> str:
  """Returns one titled curve over steps as an <svg> element.

  Args:
    name: title of the panel.
    steps: increasing [n], n ≥ 1.
    values: [n]; values that are not finite leave a gap and are counted beside the title.
    latest: text of the newest value, at the top right.
    detail: a second, quieter line under the title.
    reference: name and height of a dashed horizontal line, such as a baseline.
    smoothed: draw the smoothed curve over a faint raw one; False for a few measured points,
      which get dots instead.
  """
  steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
  finite = np.isfinite(values)
  parts = [_text(6, 13, _fit(name, latest), 'name'),
           _text(_WIDTH - _RIGHT, 13, latest, 'now', 'end'), _text(6, 26, detail, '')]
  if not finite.all():
    parts.append(_text(_WIDTH - _RIGHT, 26, f'{(~finite).sum()} not finite', '', 'end'))
  if finite.any():
    heights = values[finite] if reference is None else np.append(values[finite], reference[1])
    y_of, y_ticks = _vertical_axis(heights)
    x_of = _horizontal_axis(steps)
    parts += _axes(x_of, nice_ticks(steps[0], steps[-1], 5), y_of, y_ticks)
    if reference is not None:
      parts.append(_horizontal('reference', y_of(reference[1])))
      parts.append(_text(_WIDTH - _RIGHT, y_of(reference[1]) - 3, reference[0], 'reference-name',
                         'end'))
    points = np.stack([steps[finite], values[finite]], axis=1)
    if smoothed and len(points) > 1:
      parts.append(_path('raw', _extremes(points), x_of, y_of))
      even = _evenly(np.stack([points[:, 0], smooth(points[:, 1])], axis=1))
      parts.append(_path('curve', even, x_of, y_of))
    else:
      parts.append(_path('curve', points, x_of, y_of))
      parts += [f'<circle class="dot" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.4"/>'
                for x, y in points]
  return _svg(_WIDTH, _HEIGHT, parts, f'{name} {detail}, latest {latest}')


def bullet(value: float, references: Mapping[str, float], width: int = 150) -> str:
  """Returns a bar to `value` with a tick at each reference, scaled to the largest of them."""
  heights = [x for x in (value, *references.values()) if math.isfinite(x)]
  top = 1.1 * max(heights, default=0)
  if top <= 0 or not math.isfinite(value):
    return ''
  parts = [f'<rect class="track" x="0" y="5" width="{width}" height="6" rx="1"/>',
           f'<rect class="bar" x="0" y="5" width="{max(value, 0) / top * width:.1f}" height="6" '
           'rx="1"/>']
  parts += [f'<rect class="tick" x="{x / top * width - 1:.1f}" y="1" width="2" height="14">'
            f'<title>{html.escape(name)} {x:.4g}</title></rect>'
            for name, x in references.items() if math.isfinite(x) and x >= 0]
  return _svg(width, 16, parts, 'value as a bar, references as ticks', fixed=True)


def heat_map(rows: Sequence[str], layers: Sequence[int], coefficients: np.ndarray) -> str:
  """Returns coefficients in [0, 1] as shaded cells: condition rows down, experts of layers across.

  Args:
    rows: A names.
    layers: L indices of the layers that have experts.
    coefficients: float [L, A, E].
  """
  coefficients = np.asarray(coefficients, np.float64)
  if coefficients.ndim != 3 or coefficients.shape[:2] != (len(layers), len(rows)):
    raise UsageError(f'coefficients {coefficients.shape} must be [{len(layers)} layers, '
                     f'{len(rows)} rows, experts].')
  experts, cell, gap = coefficients.shape[2], 16, 10
  per_line = max(1, _MOST_COLUMNS // max(experts, 1))
  left = 12 + 6.4 * max(len(row) for row in rows)
  line_height = 30 + cell * len(rows)
  parts = []
  for i, layer in enumerate(layers):
    column, line = i % per_line, i // per_line
    x0, y0 = left + column * (experts * cell + gap), line * line_height + 16
    parts.append(_text(x0, y0 - 5, f'layer {layer}', ''))
    if column == 0:
      parts += [_text(left - 8, y0 + a * cell + 11.5, row, 'row', 'end')
                for a, row in enumerate(rows)]
    for a, row in enumerate(rows):
      parts += [f'<rect class="cell" x="{x0 + e * cell:.1f}" y="{y0 + a * cell:.1f}" '
                f'width="{cell - 1}" height="{cell - 1}" fill-opacity="{_shade(share):.3f}">'
                f'<title>layer {layer}, {html.escape(row)}, expert {e}: {share:.3f}</title></rect>'
                for e, share in enumerate(coefficients[i, a])]
  width = left + min(per_line, len(layers)) * (experts * cell + gap)
  lines = -(-len(layers) // per_line)
  return _svg(math.ceil(width), lines * line_height, parts, 'expert coefficients', fixed=True)


def signed_map(
    names: Sequence[str], values: np.ndarray, sure: Sequence[bool], notes: Sequence[Sequence[str]]) -> str:
  """Returns numbers between names as cells of two colors, blank at 0 and full from ±1 on.

  Args:
    names: T names, of both rows and columns.
    values: float [T, T]; what is not finite is a dash.
    sure: [T], whether a row has colors: False for numbers without a reliable base.
    notes: [T, T], text shown when the pointer is over a cell.
  """
  values = np.asarray(values, np.float64)
  if values.shape != (len(names),) * 2:
    raise UsageError(f'values {values.shape} must be [{len(names)}, {len(names)}].')
  cell, letter = 44, 6.4
  left, top = 12 + letter * max(map(len, names)), 14 + 0.6 * letter * max(map(len, names))
  parts = []
  for i, name in enumerate(names):
    y, x = top + i * cell, left + i * cell + cell / 2
    parts.append(_text(left - 8, y + cell / 2 + 4, name, 'row', 'end'))
    parts.append(f'<text class="row" transform="translate({x:.1f} {top - 6:.1f}) rotate(-35)">{html.escape(name)}'
                 '</text>')
    for j, value in enumerate(values[i]):
      known = math.isfinite(value)
      css = 'minus' if known and value < 0 else 'cell'
      shade = 0.75 * min(abs(value), 1.0) if known and sure[i] else 0.0
      parts.append(f'<rect class="{css}" x="{left + j * cell:.1f}" y="{y:.1f}" width="{cell - 1}" height="{cell - 1}" '
                   f'fill-opacity="{shade:.3f}"><title>{html.escape(notes[i][j])}</title></rect>')
      number = f'{value:.2f}' if known else '–'
      parts.append(_text(left + (j + 0.5) * cell, y + cell / 2 + 4, number, 'inside', 'middle'))
  side = len(names) * cell
  width, height = left + side + letter * len(names[-1]), top + side + 4
  return _svg(math.ceil(width), math.ceil(height), parts, 'signed matrix', fixed=True)


def _shade(share: float) -> float:
  # Cells that hold nothing stay faintly visible, so that the grid can be counted.
  return 0.07 + 0.93 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def _vertical_axis(heights: np.ndarray):
  low, high = float(heights.min()), float(heights.max())
  if low > 0 and high / low > _LOG_SPAN:
    ticks = [10.0 ** p for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = ticks[::-(-len(ticks) // 5)]
    inner = _scale(math.log10(min(low, ticks[0])), math.log10(max(high, ticks[-1])),
                   _HEIGHT - _BOTTOM, _TOP + 8)
    return (lambda y: inner(math.log10(y))), ticks
  if 0 <= low < 0.5 * high:
    low = 0.0  # a curve that comes near zero is read against zero
  if low == high:
    low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
  return _scale(low, high, _HEIGHT - _BOTTOM, _TOP + 8), nice_ticks(low, high)


def _horizontal_axis(steps: np.ndarray):
  low, high = float(steps[0]), float(steps[-1])
  if low == high:
    low, high = low - 0.5, high + 0.5
  return _scale(low, high, _LEFT + 2, _WIDTH - _RIGHT)


def _scale(low: float, high: float, start: float, end: float):
  return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(x_of, x_ticks: list[float], y_of, y_ticks: list[float]) -> list[str]:
  parts = []
  for y in y_ticks:
    parts.append(_horizontal('grid', y_of(y)))
    parts.append(_text(_LEFT - 5, y_of(y) + 3.5, short_number(y), '', 'end'))
  for x in x_ticks:
    # A centered label at the edge would leave the figure.
    side = 'end' if x_of(x) > _WIDTH - _RIGHT - 12 else 'middle'
    parts.append(_text(x_of(x), _HEIGHT - 5, short_number(x), '', side))
  return parts


def _evenly(points: np.ndarray) -> np.ndarray:
  if len(points) <= _MOST_POINTS:
    return points
  return points[np.linspace(0, len(points) - 1, _MOST_POINTS).round().astype(int)]


def _extremes(points: np.ndarray) -> np.ndarray:
  """Thins [n, 2] to the lowest and highest point of each bucket, so that no spike is lost."""
  if len(points) <= _MOST_POINTS:
    return points
  kept = []
  for bucket in np.array_split(np.arange(len(points)), _MOST_POINTS // 2):
    kept += sorted({bucket[points[bucket, 1].argmin()], bucket[points[bucket, 1].argmax()]})
  return points[kept]


def _path(css: str, points: np.ndarray, x_of, y_of) -> str:
  return f'<path class="{css}" d="M' + 'L'.join(
      f'{x_of(x):.1f} {y_of(y):.1f}' for x, y in points) + '"/>'


def _horizontal(css: str, y: float) -> str:
  return f'<line class="{css}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _fit(name: str, latest: str) -> str:
  most = int((_WIDTH - _RIGHT - 14) / 6.3) - len(latest)  # bold 11 px letters are about 6.3 wide
  return name if len(name) <= most else name[:most - 1] + '…'


def _text(x: float, y: float, text: str, css: str, anchor: str = 'start') -> str:
  return (f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
          f'{html.escape(text)}</text>')


def _svg(width: int, height: int, parts: list[str], label: str, fixed: bool = False) -> str:
  size = f' width="{width}" height="{height}"' if fixed else ''
  return (f'<svg viewBox="0 0 {width} {height}"{size} role="img" '
          f'aria-label="{html.escape(label)}">' + ''.join(parts) + '</svg>')
