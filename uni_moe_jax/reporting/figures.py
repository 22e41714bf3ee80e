"""Figures of the report as inline SVG and HTML: text stays text, and colors follow the light or dark page.

Marks have CSS classes, which `STYLE` maps to the custom properties of the page (--ink, --muted, --line, --accent,
--second). Axis letters: L layers, A condition rows, E experts, T tasks.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from uni_moe_jax.utils.errors import UsageError

STYLE = """
.panel { padding: 6px; }
.panel figcaption { display: flex; gap: 8px; padding: 0 6px; font-size: 11px; line-height: 15px; }
.panel figcaption.detail { justify-content: space-between; height: 15px; color: var(--muted); }
.panel .name { flex: 1; font-weight: 600; }
.panel span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.panel .now { font-weight: 600; color: var(--accent); font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; }
svg text { font: 10px var(--sans); fill: var(--muted); font-variant-numeric: tabular-nums; text-anchor: end; }
svg .step { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg path { stroke: var(--accent); stroke-width: 1.8; fill: none; stroke-linejoin: round; }
svg .raw { stroke-width: 1; opacity: .28; }
svg .dot { fill: var(--accent); }
svg .reference { stroke: var(--second); stroke-width: 1.2; stroke-dasharray: 4 3; }
svg .reference-name { fill: var(--second); }
.bullet { position: relative; display: block; width: 150px; height: 6px; margin: 7px 0; border-radius: 1px;
  background: var(--line); }
.bullet * { position: absolute; top: 0; height: 6px; border-radius: 1px; background: var(--accent); }
.bullet .tick { top: -4px; height: 14px; width: 2px; margin-left: -1px; background: var(--second); }
.map { border-collapse: separate; border-spacing: 1px; font-size: 11px; --hue: var(--accent); }
.map th, .map td { padding: 0; border: 0; vertical-align: middle; text-align: center; font-weight: 400; }
.map th { font-size: inherit; text-align: left; } .map .row { text-align: right; padding: 0 8px; }
.map td { min-width: 15px; height: 15px; background: color-mix(in srgb, var(--hue) var(--share), transparent); }
.map .minus { --hue: var(--second); } .map.signed td { min-width: 43px; height: 43px; }
.map .column { writing-mode: vertical-rl; transform: rotate(180deg); padding: 4px 0; }
.map, .bullet { print-color-adjust: exact; }
"""

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 40, 260, 14, 120, 138  # of the axes of a panel 270 wide, in SVG units
_MAX_POINTS = 240  # drawn per curve: more than pixels that could show them
_LOG_SPAN = 40  # a positive curve that spans more than this factor gets a logarithmic axis
_MAX_COLUMNS = 48  # expert columns in one line of a heat map


def smooth(values: np.ndarray) -> np.ndarray:
  """Returns float [n]: each point averaged over a window that grows with its place in the curve.

  Point i becomes the mean of points 0.9 i - 2 to 1.1 i + 2 (the first ones of as many as there are on both sides):
  nearly constant on a logarithmic axis, so the steep start keeps its shape and the long tail loses its noise.
  """
  index = np.arange(len(values))
  half = np.minimum(index // 10 + 2, index)
  low, high = index - half, np.minimum(index + half, len(values) - 1) + 1
  # A window is made of windows of 1, 2, 4, … points. Differences of one running sum would lose what follows a spike.
  sums, start, of_power = np.zeros(len(values)), low, np.asarray(values, np.float64)
  for power in 2 ** np.arange(int(np.max(high - low, initial=0)).bit_length()):
    is_part = (high - low) & power > 0
    sums[is_part] += of_power[start[is_part]]
    start = start + power * is_part
    of_power = of_power[:-power] + of_power[power:]
  return sums / (high - low)


def nice_ticks(low: float, high: float, most: int = 4) -> list[float]:
  """Returns at most `most` round numbers (1, 2, 2.5 or 5 times a power of ten) in [low, high]."""
  if not high > low:
    return [low]
  power = 10.0 ** math.floor(math.log10((high - low) / most))
  for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20, 25, 50)):
    ticks = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    if len(ticks) <= most:
      return [i * step for i in ticks]


def short_number(value: float) -> str:
  """Returns an axis label: 1500 as 1.5k, 2000000 as 2M, 0.0001 as 1e-4, 0.25 as it is."""
  if 0 < abs(value) < 0.01:
    # Rounded first: 3 · 1e-4 is 0.00030000000000000003, which would become '3.e-4'.
    return np.format_float_scientific(float(f'{value:.2e}'), trim='-', exp_digits=1)
  bound, letter = next((b for b in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')) if abs(value) >= b[0]), (1, ''))
  return f'{value / bound:.4g}{letter}'


def line_panel(name: str, steps: Sequence[float], values: Sequence[float], latest: str, detail: str = '',
               reference: tuple[str, float] | None = None, smoothed: bool = True) -> str:
  """Returns one titled curve over steps as a <figure> element.

  Args:
    name, latest, detail: title, newest value, and a second, quieter line.
    steps: increasing [n], n ≥ 1.
    values: [n]; values that are not finite leave a gap and are counted beside the title.
    reference: name and height of a dashed horizontal line, such as a baseline.
    smoothed: draw the smoothed curve over a faint raw one; False for a few measured points, which get dots instead.
  """
  steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
  finite = np.isfinite(values)
  count = '' if finite.all() else f'<span>{(~finite).sum()} not finite</span>'
  plot = _plot(steps, finite, values[finite], reference, smoothed) if finite.any() else ''
  label = escape(f'{name} {detail}, latest {latest}')
  return (f'<figure class="panel"><figcaption><span class="name">{escape(name)}</span>'
          f'<span class="now">{escape(latest)}</span></figcaption><figcaption class="detail"><span>{escape(detail)}'
          f'</span>{count}</figcaption><svg viewBox="0 0 270 {_HEIGHT}" role="img" aria-label="{label}">{plot}</svg>'
          '</figure>')


def _plot(steps: np.ndarray, finite: np.ndarray, values: np.ndarray, reference: tuple[str, float] | None,
          smoothed: bool) -> str:
  """Axes and marks of a panel. values: the finite ones."""
  heights = values if reference is None else np.append(values, reference[1])
  low, high, scale = heights.min(), heights.max(), np.asarray
  if low > 0 and high / low > _LOG_SPAN:
    scale = np.log10
    y_ticks = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    y_ticks = y_ticks[::math.ceil(len(y_ticks) / 5)]
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
  else:
    if 0 <= low < 0.5 * high:
      low = 0.0  # a curve that comes near zero is read against zero
    if low == high:
      low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    y_ticks = nice_ticks(low, high)
  margin = 0.5 if steps[0] == steps[-1] else 0
  x_of = lambda x: np.interp(x, (steps[0] - margin, steps[-1] + margin), (_LEFT + 2, _RIGHT))
  y_of = lambda y: np.interp(scale(y), scale([low, high]), (_BOTTOM, _TOP))

  def horizontal(css: str, y: float) -> str:
    return f'<line class="{css}" x1="{_LEFT}" x2="{_RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>'

  def path(css: str, y: np.ndarray) -> str:
    x, y = _extremes(steps[finite], y)
    return f'<path class="{css}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x_of(x), y_of(y)))}"/>'

  parts = [horizontal('grid', y) + _text('', _LEFT - 5, y_of(y) + 3.5, short_number(y)) for y in y_ticks]
  # A centered label at the edge would leave the figure.
  parts += [_text('' if x_of(x) > _RIGHT - 12 else 'step', x_of(x), _HEIGHT - 5, short_number(x))
            for x in nice_ticks(steps[0], steps[-1], 5)]
  if reference is not None:
    parts += [horizontal('reference', reference[1]),
              _text('reference-name', _RIGHT, y_of(reference[1]) - 3, reference[0])]
  if smoothed and len(values) > 1:
    return ''.join([*parts, path('raw', values), path('curve', smooth(values))])
  return ''.join([*parts, path('curve', values), *(
      f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in zip(x_of(steps[finite]), y_of(values)))])


def _extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Thins a curve to the lowest and highest point of each bucket, so that no spike is lost."""
  if len(x) <= _MAX_POINTS:
    return x, y
  buckets = np.array_split(np.arange(len(x)), _MAX_POINTS // 2)
  kept = [i for bucket in buckets for i in sorted({bucket[y[bucket].argmin()], bucket[y[bucket].argmax()]})]
  return x[kept], y[kept]


def _text(css: str, x: float, y: float, text: str) -> str:
  return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def bullet(value: float, references: Mapping[str, float]) -> str:
  """Returns a bar to `value` with a tick at each reference, scaled to the largest of them."""
  top = 1.1 * max((x for x in (value, *references.values()) if math.isfinite(x)), default=0)
  if top <= 0 or not math.isfinite(value):
    return ''
  ticks = [f'<i class="tick" style="left: {x / top:.1%}" title="{escape(name)} {x:.4g}"></i>'
           for name, x in references.items() if math.isfinite(x) and x >= 0]
  return f'<span class="bullet"><i class="bar" style="width: {max(value, 0) / top:.1%}"></i>{"".join(ticks)}</span>'


def heat_map(rows: Sequence[str], layers: Sequence[int], coefficients: np.ndarray) -> str:
  """Returns coefficients [L, A, E] in [0, 1] as shaded cells: condition rows down, experts of layers across.

  rows: A names. layers: indices of the L layers.
  """
  coefficients = np.asarray(coefficients, np.float64)
  if coefficients.ndim != 3 or coefficients.shape[:2] != (len(layers), len(rows)):
    raise UsageError(f'coefficients {coefficients.shape} must be [{len(layers)} layers, {len(rows)} rows, experts].')
  experts = coefficients.shape[2]
  per_line = max(1, _MAX_COLUMNS // max(experts, 1))
  lines = []
  for start in range(0, len(layers), per_line):
    line = range(start, min(start + per_line, len(layers)))
    lines.append(''.join(f'<th></th><th colspan="{experts}">layer {layers[i]}</th>' for i in line))
    for a, row in enumerate(rows):
      cells = []
      for i in line:
        cells.append(f'<th class="row">{escape(row) if i == start else ""}</th>')
        # Cells that hold nothing stay faintly visible, so that the grid can be counted.
        cells += [_cell(0.07 + 0.93 * np.clip(share, 0, 1), f'layer {layers[i]}, {row}, expert {e}: {share:.3f}')
                  for e, share in enumerate(coefficients[i, a])]
      lines.append(''.join(cells))
  return _map('map', 'expert coefficients', lines)


def signed_map(
    names: Sequence[str], values: np.ndarray, sure: Sequence[bool], notes: Sequence[Sequence[str]]) -> str:
  """Returns numbers [T, T] between names as cells of two colors, blank at 0 and full from ±1 on; NaN is a dash.

  sure: whether a row has colors: False for numbers without a reliable base. notes: texts under the pointer, by cell.
  """
  values = np.asarray(values, np.float64)
  if values.shape != (len(names), len(names)):
    raise UsageError(f'values {values.shape} must be [{len(names)}, {len(names)}].')
  lines = ['<th></th>' + ''.join(f'<th class="column">{escape(name)}</th>' for name in names)]
  for i, name in enumerate(names):
    lines.append(f'<th class="row">{escape(name)}</th>' + ''.join(
        _cell(0.75 * min(abs(value), 1) * sure[i], note, f'{value:.2f}', 'minus' if value < 0 else 'cell')
        if math.isfinite(value) else _cell(0, note, '–') for value, note in zip(values[i], notes[i], strict=True)))
  return _map('map signed', 'signed matrix', lines)


def _cell(share: float, note: str, text: str = '', css: str = 'cell') -> str:
  share = share if math.isfinite(share) else 0
  return f'<td class="{css}" style="--share: {share:.1%}" title="{escape(note)}">{text}</td>'


def _map(css: str, label: str, lines: Sequence[str]) -> str:
  return f'<table class="{css}" aria-label="{label}"><tr>{"</tr><tr>".join(lines)}</tr></table>'
