"""Paired rounds: what is compared runs in turn, because the speed of a shared machine drifts.

A figure is a median over rounds; a ratio is the median of the rounds' own ratios, with their quartiles.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from uni_moe_jax.train.loop import commit


def paired(calls: Mapping[str, Callable[[], Any]], rounds: int, *,
           before: Mapping[str, Callable[[], Any]] | None = None) -> dict[str, np.ndarray]:
  """Seconds [rounds] of every call, until its result is computed.

  Each call runs once before the rounds, to compile. The order rotates by one per round, so that no call always follows
  the same other. before: untimed preparation of some calls.
  """
  names, seconds = list(calls), {name: [] for name in calls}
  for i in range(rounds + 1):
    first = i % len(names)
    for name in names[first:] + names[:first]:
      if before and name in before:
        jax.block_until_ready(before[name]())
      start = time.perf_counter()
      jax.block_until_ready(calls[name]())
      seconds[name].append(time.perf_counter() - start)
  return {name: np.array(x[1:]) for name, x in seconds.items()}


def arguments(description: str) -> argparse.Namespace:
  """The arguments of every benchmark."""
  parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--quick', action='store_true', help='small sizes and few rounds: does everything run?')
  parser.add_argument('--rounds', type=int, default=0, help='rounds of each comparison; default: 11, or 3 with --quick')
  parser.add_argument('--config', default='quickstart', help='whose tasks and data are measured, where any are')
  parser.add_argument('--output', help='JSON file to write')
  return parser.parse_args()


class Report:
  """Prints the lines of a benchmark as they are measured, and writes them to --output."""

  def __init__(self, options: argparse.Namespace):
    self._output, self._rounds, self.lines = options.output, options.rounds or (3 if options.quick else 11), []
    self._facts = {'command': ' '.join(sys.argv), 'commit': commit(), 'jax': jax.__version__,
                   'device': jax.devices()[0].device_kind, 'quick': options.quick}
    print(self._facts, flush=True)

  def compare(self, title: str, calls: Mapping[str, Callable[[], Any]], *, work: float | Mapping[str, float] = 0,
              unit: str = '', per_call: int = 1, before: Mapping[str, Callable[[], Any]] | None = None) -> None:
    """Measure calls in turn and print each, with its time relative to the first one.

    work: of a call (of each), in `unit` times seconds: prints a rate; without it, milliseconds. per_call: how often a
    call repeats what is timed.
    """
    seconds = paired(calls, self._rounds, before=before)
    reference = next(iter(seconds.values()))
    for name, x in seconds.items():
      amount = work.get(name, 0) if isinstance(work, Mapping) else work
      value, of = (amount / float(np.median(x)), unit) if amount else (1e3 * float(np.median(x)) / per_call, 'ms')
      low, ratio, high = (float(q) for q in np.percentile(x / reference, (25, 50, 75)))
      self.add(f'{title}: {name}', value, of, ratio=ratio, low=low, high=high)

  def add(self, name: str, value: float | None, unit: str, **facts: Any) -> None:
    """Print a figure; None: there is none, and the facts say why."""
    self.lines.append({'name': name, 'value': value, 'unit': unit, **facts})
    shown = {k: f'{x:.3f}' if isinstance(x, float) else x for k, x in facts.items()}
    number = '–' if value is None else f'{value:,.4g}'
    print(f'{name:60s} {number:>10} {unit}  ' + ', '.join(f'{k} {x}' for k, x in shown.items()), flush=True)

  def write(self) -> None:
    """Write what was measured to --output."""
    if self._output:
      pathlib.Path(self._output).write_text(json.dumps({**self._facts, 'lines': self.lines}, indent=1))
