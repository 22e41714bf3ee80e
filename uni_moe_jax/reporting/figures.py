"""Curves of the report as inline SVG: text stays text, and colors follow the light or dark page.

Marks have CSS classes, which `STYLE` maps to the custom properties of the page (--muted, --line, --accent, --second).
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

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
"""

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 40, 260, 14, 120, 138  # of the axes of a panel 270 wide, in SVG units
_BUCKET, _MAX_BUCKETS = 5, 120  # points of a bucket at least; buckets of a curve, at 10 of which it gets their means
_LOG_SPAN = 40  # a positive curve that spans more than this factor gets a logarithmic axis


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
               reference: tuple[str, float] | None = None, dots: bool = False) -> str:
  """Returns one titled curve over steps as a <figure> element.

  Args:
    name, latest, detail: title, newest value, and a second, quieter line.
    steps: increasing [n], n ≥ 1.
    values: [n]; values that are not finite leave a gap and are counted beside the title.
    reference: name and height of a dashed horizontal line, such as a baseline.
    dots: draw a dot at every point, for a few measured ones; else 50 points or more are a faint curve under one of
      their local means.
  """
  steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
  finite = np.isfinite(values)
  count = '' if finite.all() else f'<span>{(~finite).sum()} not finite</span>'
  plot = _plot(steps[finite], values[finite], reference, dots) if finite.any() else ''
  label = escape(f'{name} {detail}, latest {latest}')
  return (f'<figure class="panel"><figcaption><span class="name">{escape(name)}</span>'
          f'<span class="now">{escape(latest)}</span></figcaption><figcaption class="detail"><span>{escape(detail)}'
          f'</span>{count}</figcaption><svg viewBox="0 0 270 {_HEIGHT}" role="img" aria-label="{label}">{plot}</svg>'
          '</figure>')


def _plot(steps: np.ndarray, values: np.ndarray, reference: tuple[str, float] | None, dots: bool) -> str:
  """Axes and marks of a panel."""
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

  def path(css: str, x: np.ndarray, y: np.ndarray) -> str:
    return f'<path class="{css}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x_of(x), y_of(y)))}"/>'

  parts = [horizontal('grid', y) + _text('', _LEFT - 5, y_of(y) + 3.5, short_number(y)) for y in y_ticks]
  # A centered label at the edge would leave the figure.
  parts += [_text('' if x_of(x) > _RIGHT - 12 else 'step', x_of(x), _HEIGHT - 5, short_number(x))
            for x in nice_ticks(steps[0], steps[-1], 5)]
  if reference is not None:
    parts += [horizontal('reference', reference[1]),
              _text('reference-name', _RIGHT, y_of(reference[1]) - 3, reference[0])]
  if dots:
    parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in zip(x_of(steps), y_of(values))]
  elif (number := min(len(values) // _BUCKET, _MAX_BUCKETS)) >= 10:
    buckets = np.array_split(np.arange(len(values)), number)
    extremes = [i for b in buckets for i in sorted((b[values[b].argmin()], b[values[b].argmax()]))]  # no spike is lost
    means = ([x[b].mean() for b in buckets] for x in (steps, values))
    return ''.join([*parts, path('raw', steps[extremes], values[extremes]), path('curve', *means)])
  return ''.join([*parts, path('curve', steps, values)])


def _text(css: str, x: float, y: float, text: str) -> str:
  return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
