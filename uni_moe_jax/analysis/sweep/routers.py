"""The router sweep: what every run measured, checks of the runs, and the steps that take equal time."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uni_moe_jax.analysis import expert_usage_file, interference_file, metric_curves
from uni_moe_jax.analysis.sweep.grid import TRAIN, Cell
from uni_moe_jax.analysis.sweep.runner import is_finished
from uni_moe_jax.eval import suite
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import read_json
from uni_moe_jax.tasks.router_names import DENSE
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.exit_codes import FINISHED

INIT, FINAL = 'init', 'final'  # checkpoints whose interference is measured, besides 'step N'
_EXPERTS = ('router', 'checkpoint', 'num_batches', 'layers', 'sublayers', 'conditions', 'tasks', 'coefficients',
            'effective_experts', 'mean_task_overlap')  # of experts.json
_MAY_DIFFER = ('moe.router', 'seed')
_MAX_POINTS = 40  # of a learning curve
_LAST = 8  # the last eighth of a run gives its final loss


def measure(folder: storage.Path, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What the run of a work directory measured. log: see `runner.read_log`.

  Returns:
    {'steps', 'seconds_per_step' (median), 'parameters' (see run.json), 'curves': see `_curves`, 'final_loss': mean of
    the weighted sum of all losses over the last eighth of the run, 'interference': {'init', 'step N', …, 'final'}: that
    of all selected parameters as 'subset' and how it was measured, 'experts': what figures show of experts.json,
    'merged': content of merged.json, None for a difference that is not finite}. Unknown values are None. A run that has
    not trained to its end has neither curves nor a final loss, which are averaged over seeds.
  """
  file = folder / 'metrics.jsonl'
  metrics, _ = metric_curves.read(file.read_text() if file.exists() else '')
  (_, rates), (_, losses) = (metrics.get(name, ([], [])) for name in ('steps_per_second', 'loss/total'))
  is_trained = is_finished(log, TRAIN)
  interference = {}
  for checkpoint, file in _interference_files(folder).items():
    content = interference[checkpoint] = read_json(folder / file)
    if content:
      content['subset'] = content.pop('subsets')[0]
  experts, merged = read_json(folder / expert_usage_file.FILE), read_json(folder / suite.MERGED_FILE)
  if merged and not np.isfinite(merged['largest_difference']):
    merged['largest_difference'] = None
  return {
      'steps': max((steps[-1] for steps, _ in metrics.values()), default=0),
      'seconds_per_step': 1 / float(np.median(rates)) if rates else None,
      'parameters': read_json(folder / workdir.RUN_FILE, {}).get('parameters'),
      'curves': _curves(metrics) if is_trained else {},
      'final_loss': float(np.mean(losses[-max(1, len(losses) // _LAST):])) if losses and is_trained else None,
      'interference': interference, 'experts': experts and {k: experts[k] for k in _EXPERTS},
      'merged': merged}


def _interference_files(folder: storage.Path) -> dict[str, str]:
  """{checkpoint: name of its file}, whether it exists or not, in the order of training."""
  stem = interference_file.FILE.removesuffix('.json')
  steps = sorted(int(p.stem.rpartition('_')[2]) for p in folder.glob(f'{stem}_step_*.json'))
  return {INIT: f'{stem}_{INIT}.json', **{f'step {n}': f'{stem}_step_{n}.json' for n in steps},
          FINAL: interference_file.FILE}


def _curves(metrics: metric_curves.Curves) -> dict[str, list[list[float]]]:
  """{task: [steps, losses]}: means over equal parts of the run."""
  curves = {}
  for name, curve in metrics.items():
    if name.startswith('loss/') and name != 'loss/total':
      parts = np.array_split(np.array(curve), min(_MAX_POINTS, len(curve[0])), axis=1)
      curves[name.removeprefix('loss/')] = np.array([part.mean(1) for part in parts]).T.round(4).tolist()
  return curves


def checkpoints(cells: Sequence[Mapping[str, Any]]) -> list[str]:
  """Those at which interference was measured, in the order of training. cells: of `results.collect`."""
  names = {name for c in cells for name, measured in c['interference'].items() if measured}
  return sorted(names, key=lambda name: (name == FINAL, name != INIT, len(name), name))


def mean_interference(cells: Sequence[Mapping[str, Any]], variant: str) -> dict[str, dict[str, dict[str, float]]]:
  """{checkpoint: {'mean_of_pairs' and 'negative_share': {'value', 'low', 'high'}}}: means over the seeds of a variant.

  cells: of `results.collect`. Checkpoints without any pair in a row with a base are left out.
  """
  means = {}
  for checkpoint in checkpoints(cells):
    measured = [m['subset'] for c in cells if c['variant'] == variant and (m := c['interference'].get(checkpoint))]
    if measured := [m for m in measured if m['mean_of_pairs']['value'] is not None]:
      means[checkpoint] = {key: {bound: float(np.mean([m[key][bound] for m in measured])) for bound in measured[0][key]}
                           for key in ('mean_of_pairs', 'negative_share')}
  return means


def find_errors(
    cells: Sequence[Cell], records: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """Sentences for runs that differ from the first one in more than their variant and seed.

  records: of `results.collect`; configs: contents of config.json, {} where it is missing; both of the same cells.
  """
  errors, first = [], None
  for cell, record, config in zip(cells, records, configs, strict=True):
    if not config:
      continue
    first = first or (cell, record)
    fields = {field.partition('=')[0] for field in (*first[0].fields, *cell.fields)} | {*_MAY_DIFFER}
    changed = [d for d in record['changed'] if d.partition(':')[0] not in fields]
    changed += ['the data (its fingerprint)'] if first[1]['data'] != record['data'] else []
    if changed:
      errors.append(f'{record["name"]} and {first[1]["name"]} differ in more than their variant: '
                    f'{"; ".join(changed)}.')
    steps = config['config']['train']['steps']
    if FINISHED in record['exit_codes'].get(TRAIN, ()) and record['steps'] != steps:
      errors.append(f'{record["name"]} has {record["steps"]} of {steps} steps.')
    if (merged := record['merged']) and merged['largest_difference'] is None:
      errors.append(f'{record["name"]}: {merged["metric"]} is not finite with merged experts, or without.')
  return errors + evaluation_errors(cells)


def evaluation_errors(cells: Sequence[Cell]) -> list[str]:
  """Sentences for runs whose evaluators had other fields or data than those of the first one: configs may hide it."""
  made_by = [(cell.folder.name, x) for cell in cells if (x := suite.protocols(cell.folder))]
  compared = [(name, workdir.differences({'evaluator': made_by[0][1]}, {'evaluator': x})) for name, x in made_by]
  return [f'{name} and {made_by[0][0]} have scores of other evaluators or data: {"; ".join(changed)}.'
          for name, changed in compared if changed]


def equal_time_steps(cells: Sequence[Mapping[str, Any]]) -> str | None:
  """The value of --steps with which all variants train as long as dense; None if a variant or dense has no time.

  cells: of `results.collect`. Seconds per step are medians over the runs of a variant.
  """
  steps, seconds = collections.Counter(), collections.defaultdict(list)
  for c in cells:
    if c['seconds_per_step']:
      steps[c['variant']] = max(steps[c['variant']], c['steps'])  # a run that failed has fewer
      seconds[c['variant']].append(c['seconds_per_step'])
  if DENSE not in seconds:
    return None
  budget = steps[DENSE] * np.median(seconds[DENSE])
  numbers = {variant: max(1, round(budget / np.median(x))) for variant, x in seconds.items()}
  return ','.join([str(numbers.pop(DENSE)), *(f'{variant}={n}' for variant, n in numbers.items())])
