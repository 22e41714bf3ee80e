"""What came of a comparison: one folder with results.json, results.md and pictures, made from the routers' work directories.

A run that failed is reported with what it left. Nothing in the folder names a machine: it can be kept as it is.
"""

import json
import os
import pathlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.analysis import compare_stages, expert_usage_file, interference_file, study_cells
from uni_moe_jax.analysis import study_results as study_results
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.exit_codes import FINISHED

FOLDER, RESULTS, TABLE = 'results', 'results.json', 'results.md'
_BEFORE = 'interference_init.json'
_MEASURED = {'before': _BEFORE, 'after': interference_file.FILE}
_ROUTER = 'moe.router'  # the one field in which runs may differ


def collect(folder: str | os.PathLike[str], routers: Sequence[str], config: str, command: str) -> dict[str, Any]:
  """Reads what every router left.

  Args:
    folder: of the comparison. config: path of the config file. command: that was typed.

  Returns:
    {'command', 'config', 'python', 'cores', 'runs': see `_run`, 'scores': see `study.results.summary`, 'breaches': sentences
    for what failed, and for runs that differ in more than their router}.
  """
  runs = [_run(pathlib.Path(folder) / router, router) for router in routers]
  rows = [{'task': '', 'router': r['router'], 'seed': r['seed'], **row} for r in runs for row in r['evaluation']]
  return {'command': command, 'config': config, 'python': platform.python_version(), 'cores': os.cpu_count(), 'runs': runs,
          'scores': study_results.summary(rows, 'router'), 'breaches': _breaches(pathlib.Path(folder), runs)}


def _read(path: pathlib.Path, otherwise: Any) -> Any:
  return json.loads(path.read_text()) if path.exists() else otherwise


def _run(where: pathlib.Path, router: str) -> dict[str, Any]:
  """{'router', 'status', 'steps', 'seconds_per_step' (median), 'seconds' {stage: of all tries}, 'tries' {stage: codes},
  'parameters', 'seed', 'commit', 'evaluation' (rows), 'interference' {'before', 'after'}, 'experts'}; None is unknown."""
  log, facts = compare_stages.log_of(where.parent, where.name), _read(where / workdir.RUN_FILE, {})
  tries: dict[str, list[int]] = {}
  seconds: dict[str, float] = {}
  for t in log:
    tries.setdefault(t['stage'], []).append(t['code'])
    seconds[t['stage']] = round(seconds.get(t['stage'], 0) + t['seconds'], 1)
  failed = [f'{stage} failed with exit code {codes[-1]}' for stage, codes in tries.items() if FINISHED not in codes]
  metrics = where / 'metrics.jsonl'
  lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
  rates = [line['steps_per_second'] for line in lines if 'steps_per_second' in line]
  return {
      'router': router, 'status': '; '.join(failed) or ('finished' if log else 'not started'),
      'steps': lines[-1]['step'] if lines else 0, 'seconds_per_step': 1 / float(np.median(rates)) if rates else None,
      'seconds': seconds, 'tries': tries, 'parameters': facts.get('parameters'), 'seed': facts.get('seed'),
      'commit': facts.get('commit'), 'evaluation': _read(where / study_cells.EVALUATION, []),
      'interference': {when: _interference(_read(where / file, None)) for when, file in _MEASURED.items()},
      'experts': _experts(_read(where / expert_usage_file.FILE, None))}


def _interference(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """The matrix over all parameters that were asked about, with what it was asked with."""
  return content and {**{k: v for k, v in content.items() if k != 'parts'}, 'part': content['parts'][0]}


def _experts(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """{'effective' {part: mean over layers and rows}, 'overlap' (mean of different tasks), 'tasks', 'task_overlap' [T, T]}."""
  if content is None:
    return None
  overlap = np.asarray(content['mean_task_overlap'])
  T = len(overlap)
  effective = expert_usage_file.mean_effective(content).mean(-1).tolist()
  return {
      'effective': dict(zip(content['routers'], effective, strict=True)),
      'overlap': float((overlap.sum() - np.trace(overlap)) / (T * (T - 1))) if T > 1 else None,
      'tasks': list(content['tasks']), 'task_overlap': overlap.tolist()}


def _breaches(folder: pathlib.Path, runs: Sequence[Mapping[str, Any]]) -> list[str]:
  found = [f'{r["router"]}: {r["status"]}.' for r in runs if r['status'] != 'finished']
  first, *others = [r for r in runs if (folder / r['router'] / workdir.CONFIG_FILE).exists()] or [None]
  for r in others:
    one, other = (_read(folder / x['router'] / workdir.CONFIG_FILE, None) for x in (first, r))
    changed = [d for d in workdir.differences(one['config'], other['config']) if not d.startswith(f'{_ROUTER}:')]
    changed += ['the data (its fingerprint)'] if one['data'] != other['data'] else []
    changed += [f'steps: {first["steps"]} → {r["steps"]}'] if first['steps'] != r['steps'] else []
    if changed:
      found.append(f'{r["router"]} and {first["router"]} differ in more than their router: {"; ".join(changed)}.')
  return found


def write(found: Mapping[str, Any], folder: str | os.PathLike[str]) -> str:
  """Writes results.json, results.md and pictures into the folder `results` of a comparison; returns the text."""
  out = pathlib.Path(folder) / FOLDER
  out.mkdir(parents=True, exist_ok=True)
  pictures = {}
  for r in found['runs']:
    measured = [{**m['part'], 'part': f'{r["router"]}, {when}'} for when, m in r['interference'].items() if m]
    if measured:
      one = next(m for m in r['interference'].values() if m)
      pictures[r['router'], 'interference'] = name = f'interference_{r["router"]}.png'
      interference_file.draw(out / name, [measured], one['tasks'], f'I(i, j), {one["parameters"]}')
    if (picture := pathlib.Path(folder) / r['router'] / expert_usage_file.FILE.replace('.json', '.png')).exists():
      pictures[r['router'], 'experts'] = name = f'experts_{r["router"]}.png'
      shutil.copy(picture, out / name)
  text = table(found, pictures)
  (out / RESULTS).write_text(json.dumps(found, indent=1, allow_nan=False))
  (out / TABLE).write_text(text + '\n')
  return text


def table(found: Mapping[str, Any], pictures: Mapping[tuple[str, str], str]) -> str:
  """Markdown; pictures: {(router, 'interference' | 'experts'): file}."""
  runs = found['runs']
  commits = list(dict.fromkeys(str(r['commit'])[:12] for r in runs if r['commit']))
  seeds = list(dict.fromkeys(str(r['seed']) for r in runs if r['seed'] is not None))
  lines = ['# Routers compared', '',
           f'`{found["command"]}`; config `{found["config"]}`, seed {", ".join(seeds) or "unknown"}, commit '
           f'{", ".join(commits) or "unknown"}, Python {found["python"]}, {found["cores"]} cores.', '', '## Runs', '',
           '| router | steps | parameters | used per token | s / step | training s | everything s | status |',
           '| --- ' * 8 + '|']
  for r in runs:
    counts = [f'{r["parameters"][k]:,}' if r['parameters'] else '' for k in ('total', 'active')]
    lines.append(
        f'| {r["router"]} | {r["steps"]} | {counts[0]} | {counts[1]} | {_number(r["seconds_per_step"])} | '
        f'{r["seconds"].get(compare_stages.TRAIN, 0):.0f} | {sum(r["seconds"].values()):.0f} | {r["status"]} |')
  lines += ['', *(f'* {b}' for b in found['breaches']), *([''] if found['breaches'] else []), '## Evaluation', '',
            *study_results.scores_table(found['scores'], [r['router'] for r in runs], 'router'), '',
            'One seed: ± 95 % of the test examples alone, nothing of how runs differ from each other.', '',
            '## Interference, in short', '',
            'Over pairs of different tasks, in rows whose own step has a sure effect: the mean of I(i, j), and the share of '
            'pairs below 0, with 95 % bootstrap intervals over batches.', '',
            '| router | mean before | below 0 before | mean after | below 0 after |', '| --- ' * 5 + '|']
  for r in runs:
    cells = [_bounds(m, key) for m in r['interference'].values() for key in ('between', 'negative')]
    lines.append(f'| {r["router"]} | {" | ".join(cells)} |')
  if any(r['experts'] for r in runs):
    parts = list(dict.fromkeys(p for r in runs if r['experts'] for p in r['experts']['effective']))
    lines += ['', '## Use of experts, in short', '',
              'Effective number of experts of a row, and overlap of two different tasks (1: the same use), means.', '',
              f'| router | {" | ".join(f"{p} experts" for p in parts)} | overlap |', '| --- ' * (2 + len(parts)) + '|']
    lines += [f'| {r["router"]} | {" | ".join(_number(r["experts"]["effective"].get(p)) for p in parts)} | '
              f'{_number(r["experts"]["overlap"])} |' for r in runs if r['experts']]
  lines += ['', '## Interference', '',
            'I(i, j): what a short step on the task of the column takes from the loss of the task of the row, relative to a '
            'step on the row\'s own task. ° a step on the task itself has no sure effect: its row says nothing.']
  for r in runs:
    for when, m in r['interference'].items():
      if m:
        lines += ['', f'{r["router"]}, {when} ({m["checkpoint"]}):', '', *_matrix(m)]
    for what in ('interference', 'experts'):
      if (r['router'], what) in pictures:
        lines += ['', f'![{what}, {r["router"]}]({pictures[r["router"], what]})']
  return '\n'.join(lines)


def _matrix(measured: Mapping[str, Any]) -> list[str]:
  tasks, part = measured['tasks'], measured['part']
  lines = [f'| | {" | ".join(tasks)} |', '| --- ' * (1 + len(tasks)) + '|']
  for task, row, sure in zip(tasks, part['ratio_of_means']['value'], interference_file.has_base(part), strict=True):
    lines.append(f'| {task}{"" if sure else " °"} | {" | ".join(_number(v, 2) for v in row)} |')
  return lines


def _bounds(measured: Mapping[str, Any] | None, key: str) -> str:
  if measured is None or measured['part'][key]['value'] is None:
    return ''
  return '{value:.2f} ({low:.2f} … {high:.2f})'.format(**measured['part'][key])


def _number(value: float | None, digits: int = 2) -> str:
  return '' if value is None else f'{value:.{digits}f}'
