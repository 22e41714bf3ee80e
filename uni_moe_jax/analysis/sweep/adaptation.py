"""The adaptation study: what each fine-tuning recipe trained, and checks of what it promises."""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from uni_moe_jax.analysis.sweep import account, markdown, router_report
from uni_moe_jax.analysis.sweep.grid import TRAIN, ZERO_SHOT
from uni_moe_jax.analysis.sweep.runner import is_finished
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches import sources
from uni_moe_jax.data.examples import examples, file_dataset_examples
from uni_moe_jax.data.shards import mirror
from uni_moe_jax.data.shards.file_dataset import FileDataset
from uni_moe_jax.io import storage
from uni_moe_jax.tasks.router_names import DENSE
from uni_moe_jax.train import optimizer, warm_start, workdir
from uni_moe_jax.train.checkpoint import Checkpoints

_OF_RECIPE = ('optim.', 'train.')  # fields that no run passes on
PROMPTS, MAX_PROMPT_SHARE = 'prompts', 0.02  # prompt tuning trains less than this share of the parameters


def measure(folder: storage.Path, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What a cell trained, starting from its run. log: see `runner.read_log`.

  Returns:
    {'training': None if the cell has not trained, else {'steps', 'examples' (distinct ones), 'drawn' (steps · batch
    size), 'parameters', 'trained' (of them), 'share', 'identical': whether every frozen parameter is bit-identical to
    that of the run, 'moved': whether a trained one is not}}.
  """
  if not is_finished(log, TRAIN):
    return {'training': None}
  config = workdir.load_config(folder)
  with Checkpoints(folder, max_to_keep=None) as checkpoints:
    params, steps = checkpoints.restore_params(), checkpoints.latest()
  frozen = optimizer.frozen_paths(optimizer.param_groups(config, params))
  changes = warm_start.compare_params(_run_params(config.train.init), params, frozen)
  task = make_plan(config).tasks[0]
  records = sources.load(task.source, mirror.open_folder(config.data), task.split)
  example_ids = file_dataset_examples.example_ids if isinstance(records, FileDataset) else examples.example_ids
  return {'training': {
      'steps': steps, 'examples': len(example_ids(records, task, config.seed)), 'drawn': steps * task.batch_size,
      **changes, 'share': changes['trained'] / changes['parameters']}}


@functools.lru_cache(maxsize=8)
def _run_params(run: str) -> Any:
  with Checkpoints(run, max_to_keep=None) as checkpoints:
    return checkpoints.restore_params()


def find_errors(cells: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """Sentences for what a recipe promises and a cell breaks, and for cells of it that cannot be compared.

  cells: of `results.collect`; configs: contents of config.json, {} where it is missing; both of the same cells.
  """
  errors = _differences(cells, configs)
  for cell, training in ((cell, cell['training']) for cell in cells if cell['training']):
    if not training['identical']:
      errors.append(f'{cell["name"]}: a frozen parameter differs from that of the trained run.')
    if not training['moved']:
      errors.append(f'{cell["name"]}: nothing was trained.')
    if cell['variant'] == PROMPTS and training['share'] >= MAX_PROMPT_SHARE:
      errors.append(f'{cell["name"]}: {training["share"]:.2%} of the parameters train; prompt tuning trains less than '
                    f'{MAX_PROMPT_SHARE:.0%}.')
  return errors


def _differences(cells: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """Sentences for cells that differ from the first one of their task and recipe in more than seed and run.

  Runs of another group may have another model and other data; what a recipe sets is the same for all.
  """
  errors, first = [], {}
  for cell, config in zip(cells, configs, strict=True):
    if not config:
      continue
    for run in (None, cell['run']):  # of all runs, then of the group
      other, of_other = first.setdefault((cell['task'], cell['variant'], run), (cell, config))
      changed = [d for d in workdir.differences(of_other['config'], config['config'])
                 if d.partition(':')[0] not in ('seed', 'train.init') and (run is not None or d.startswith(_OF_RECIPE))]
      changed += ['the data (its fingerprint)'] if run is not None and of_other['data'] != config['data'] else []
      if changed:
        errors.append(f'{cell["name"]} and {other["name"]} differ in more than their seed: {"; ".join(changed)}.')
        break
  return errors


def compare(cells: Sequence[Mapping[str, Any]], examples: Sequence[account.Examples]) -> dict[str, Any]:
  """{recipe: `account.compare` of groups of runs with dense}; {} unless dense runs and others are adapted."""
  if not {DENSE} < {c['run'] for c in cells}:
    return {}
  by_recipe = collections.defaultdict(list)
  for cell, of_cell in zip(cells, examples, strict=True):
    unknown = {'seconds_per_step': None, 'parameters': None, 'final_loss': None}
    by_recipe[cell['variant']].append(({**cell, **unknown, 'variant': cell['run']}, of_cell))
  return {recipe: account.compare(*zip(*pairs)) for recipe, pairs in by_recipe.items()}


def sections(results: Mapping[str, Any]) -> list[str]:
  """The page after its heading."""
  lines = ['## Runs', '', *runs_table(results['cells']), '']
  for recipe, compared in results['accounts'].items():
    lines += [f'## {recipe}: against dense', '', *router_report.paired(compared), '']
  return lines


def label(row: Mapping[str, Any]) -> str:
  """The column of a cell or score: its recipe, and which runs it adapts if there are several."""
  return f'{row["variant"]}, {row["run"]}' if row['run'] else row['variant']


def runs_table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
  """Lines of Markdown: what every recipe trained for every task, in how many seeds that have trained."""
  groups = collections.defaultdict(list)
  for c in cells:
    groups[c['task'], label(c)].append(c)

  def row(cells: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    if cells[0]['variant'] == ZERO_SHOT:
      return len(cells), 0, 0, 0, 0, '0.00%', 'all'
    trained = [c['training'] for c in cells if c['training']]
    if not trained:
      return 0, *[None] * 6
    t, identical = trained[0], all(t['identical'] for t in trained)
    frozen = '—' if t['trained'] == t['parameters'] else 'identical' if identical else 'CHANGED'
    return len(trained), t['steps'], t['examples'], t['drawn'], f'{t["trained"]:,}', f'{t["share"]:.2%}', frozen

  return markdown.table(
      ['task', 'recipe', 'seeds', 'steps', 'examples', 'drawn', 'trained', 'share', 'frozen parameters'],
      [(task, recipe, *row(of_group)) for (task, recipe), of_group in groups.items()])
