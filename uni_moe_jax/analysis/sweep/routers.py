"""The router ablation: what every run measured, checks of the runs, and sections of the report."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.analysis import expert_usage_file, interference_file
from uni_moe_jax.analysis.sweep import markdown
from uni_moe_jax.analysis.sweep.grid import TRAIN, Cell
from uni_moe_jax.train import workdir
from uni_moe_jax.utils import storage
from uni_moe_jax.utils.exit_codes import FINISHED
from uni_moe_jax.utils.files import read_json

_INTERFERENCE = {'init': 'interference_init.json', 'final': interference_file.FILE}
_MAY_DIFFER = ('moe.router', 'seed')


def measure(folder: storage.Path) -> dict[str, Any]:
  """What the run of a work directory measured.

  Returns:
    {'steps', 'seconds_per_step' (median), 'parameters' (see run.json), 'interference': {'init', 'final'}: that of all
    selected parameters as 'subset' and how it was measured, 'experts': see `_expert_summary`}. Unknown values are None.
  """
  metrics = folder / 'metrics.jsonl'
  lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
  rates = [line['steps_per_second'] for line in lines if 'steps_per_second' in line]
  interference = {}
  for checkpoint, file in _INTERFERENCE.items():
    content = interference[checkpoint] = read_json(folder / file)
    if content:
      content['subset'] = content.pop('subsets')[0]
  return {
      'steps': lines[-1]['step'] if lines else 0, 'seconds_per_step': 1 / float(np.median(rates)) if rates else None,
      'parameters': read_json(folder / workdir.RUN_FILE, {}).get('parameters'), 'interference': interference,
      'experts': _expert_summary(read_json(folder / expert_usage_file.FILE))}


def _expert_summary(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """Means of experts.json.

  {'effective': {sublayer: mean over layers and conditions}, 'overlap': mean over pairs of different tasks, 'tasks',
  'task_overlap' [T, T]}.
  """
  if content is None:
    return None
  overlap = np.asarray(content['mean_task_overlap'])
  T = len(overlap)
  effective = expert_usage_file.mean_effective(content).mean(-1).tolist()
  return {
      'effective': dict(zip(content['sublayers'], effective, strict=True)),
      'overlap': float((overlap.sum() - np.trace(overlap)) / (T * (T - 1))) if T > 1 else None,
      'tasks': list(content['tasks']), 'task_overlap': overlap.tolist()}


def find_errors(cells: Sequence[Cell], records: Sequence[Mapping[str, Any]]) -> list[str]:
  """Sentences for runs that differ from the first one in more than their variant and seed."""
  errors, first = [], None
  for cell, record in zip(cells, records, strict=True):
    if not (config := read_json(cell.folder / workdir.CONFIG_FILE)):
      continue
    first = first or (cell, config)
    fields = {field.partition('=')[0] for field in (*first[0].fields, *cell.fields)} | {*_MAY_DIFFER}
    changed = workdir.differences(first[1]['config'], config['config'])
    changed = [d for d in changed if d.partition(':')[0] not in fields]
    changed += ['the data (its fingerprint)'] if first[1]['data'] != config['data'] else []
    if changed:
      errors.append(f'{record["name"]} and {first[0].folder.name} differ in more than their variant: '
                    f'{"; ".join(changed)}.')
    steps = config['config']['train']['steps']
    if FINISHED in record['exit_codes'].get(TRAIN, ()) and record['steps'] != steps:
      errors.append(f'{record["name"]} has {record["steps"]} of {steps} steps.')
  return errors


def draw_figures(cells: Sequence[Mapping[str, Any]], folder: storage.Path, out: storage.Path) -> dict[str, list[str]]:
  """Writes the heat maps of every cell into `out`; returns the names of the files by name of cell."""
  figures: dict[str, list[str]] = {}
  for c in cells:
    names = figures[c['name']] = []
    if measured := {checkpoint: m for checkpoint, m in c['interference'].items() if m}:
      names.append(f'interference_{c["name"]}.png')
      subsets = [{**m['subset'], 'subset': f'{c["name"]}, {checkpoint}'} for checkpoint, m in measured.items()]
      content = next(iter(measured.values()))
      interference_file.draw(out / names[-1], [subsets], content['tasks'], f'I(i, j), {content["parameters"]}')
    usage = folder / c['name'] / expert_usage_file.FILE.replace('.json', '.png')
    if usage.exists():
      names.append(f'experts_{c["name"]}.png')
      storage.write_bytes(out / names[-1], usage.read_bytes())
  return figures


def runs_table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
  """Lines of Markdown: a row per run."""
  def row(c: Mapping[str, Any]) -> tuple[Any, ...]:
    counts = (f'{c["parameters"][k]:,}' if c['parameters'] else None for k in ('total', 'active'))
    return (c['name'], c['steps'], *counts, c['seconds_per_step'], f'{c["seconds"].get(TRAIN, 0):.0f}',
            f'{sum(c["seconds"].values()):.0f}', c['status'])

  columns = ['run', 'steps', 'parameters', 'active parameters', 's / step', 'training s', 'total s', 'status']
  return markdown.table(columns, map(row, cells))


def sections(cells: Sequence[Mapping[str, Any]], figures: Mapping[str, Sequence[str]]) -> list[str]:
  """Lines of Markdown about interference and expert usage. figures: see `draw_figures`."""
  lines = ['', '## Summary of interference', '',
           'Over pairs of different tasks, in rows whose own step has a certain effect: the mean of I(i, j), and the '
           'share of pairs below 0, with 95 % bootstrap intervals over batches.', '', *markdown.table(
               ['run', 'mean at init', 'below 0 at init', 'final mean', 'final below 0'],
               [(c['name'], *(_interval(m, key) for m in c['interference'].values()
                              for key in ('mean_of_pairs', 'negative_share'))) for c in cells])]
  if with_experts := [c for c in cells if c['experts']]:
    sublayers = list(dict.fromkeys(s for c in with_experts for s in c['experts']['effective']))
    lines += ['', '## Summary of expert usage', '',
              'Means: the effective number of experts of a condition, and the overlap of two different tasks (1: the '
              'same usage).', '', *markdown.table(
                  ['run', *(f'{s} experts' for s in sublayers), 'overlap'],
                  [(c['name'], *map(c['experts']['effective'].get, sublayers), c['experts']['overlap'])
                   for c in with_experts])]
  lines += ['', '## Interference and expert usage', '',
            "I(i, j): how much a short step on the column's task lowers the loss of the row's task, relative to a step "
            f"on the row's own task. {interference_file.NO_BASE_LEGEND}."]
  for c in cells:
    for m in filter(None, c['interference'].values()):
      labels = interference_file.labels(m['subset'], m['tasks'])
      rows = zip(labels, m['subset']['ratio_of_means']['value'], strict=True)
      lines += ['', f'{c["name"]} at {m["checkpoint"]}:', '', *markdown.table(
          ['', *m['tasks']], [(label, *row) for label, row in rows])]
    for name in figures[c['name']]:
      lines += ['', f'![{name.partition("_")[0]}, {c["name"]}]({name})']
  return lines


def _interval(measured: Mapping[str, Any] | None, key: str) -> str | None:
  if measured is None or measured['subset'][key]['value'] is None:
    return None
  return '{value:.2f} ({low:.2f} … {high:.2f})'.format(**measured['subset'][key])
