"""One page that shows what a run did: report.html, from the files in a workdir.

The page needs no network and no other file. A section whose file is missing, half written or of another shape is
replaced by a sentence, because a report is also read when something went wrong.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from uni_moe_jax.analysis import expert_usage_file, interference_file
from uni_moe_jax.eval import metrics
from uni_moe_jax.reporting import curves as reporting_curves
from uni_moe_jax.reporting import figures
from uni_moe_jax.utils.errors import MissingFileError, UsageError

_OWN_PANELS = ('loss/total', 'learning_rate', 'grad_norm', 'steps_per_second')
_GROUP_TITLES = {'run': 'The run', 'loss': 'Loss by task', 'accuracy': 'Accuracy by task',
                 'eval': 'Evaluations along the way',
                 'interference': 'Interference along the way: Δ of a step on the second task for the loss of the first'}
_VERDICTS = {metrics.BETTER: ('better', '▲'), metrics.LEVEL: ('level', '='),
             metrics.WORSE: ('worse', '▼')}

_STYLE = """
:root { color-scheme: light dark; --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; --mono: ui-monospace, SFMono-Regular, Menlo,
  Consolas, "DejaVu Sans Mono", monospace;
  --paper: #fcfcfa; --card: #ffffff; --ink: #1d2127; --muted: #69707a; --line: #e4e5e2;
  --accent: #28608f; --second: #b3591d; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1c2025; --ink: #e6e8ea;
  --muted: #969da6; --line: #30363d; --accent: #7fb2de; --second: #e39a5f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--sans); }
main { max-width: 1180px; margin: 0 auto; padding: 40px 28px 72px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 52px 0 4px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 14px; margin: 26px 0 8px; color: var(--muted); font-weight: 600; }
p { margin: 4px 0 12px; max-width: 76ch; } .quiet { color: var(--muted); }
.absent { color: var(--muted); border-left: 3px solid var(--line); padding: 2px 0 2px 12px; }
code, pre { font: 13px/1.5 var(--mono); overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 14px; white-space: pre-wrap; margin: 6px 0 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
.wide > table.scores { width: 100%; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; font-size: 12px; color: var(--muted); white-space: nowrap; }
.number { text-align: right; } .number, .mark { white-space: nowrap; }
td svg { vertical-align: middle; }
.baseline { display: inline-block; white-space: nowrap; margin-right: 14px; }
.better { color: var(--accent); font-weight: 600; } .level { color: var(--muted); }
.worse { color: var(--second); font-weight: 600; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(255px, 1fr)); gap: 14px; }
.panels svg { width: 100%; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 14px; }
.cards.videos { grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); }
@media (max-width: 520px) { .cards.videos { grid-template-columns: 1fr; } }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 12px; font-size: 13px; line-height: 1.4; }
figure img { image-rendering: pixelated; width: 84px; height: 84px; object-fit: contain;
  display: block; margin-bottom: 8px; border: 1px solid var(--line); border-radius: 3px; }
.strip { display: flex; gap: 3px; } .strip img { flex: 1; min-width: 0; width: auto; height: auto; }
figcaption b { font-weight: 600; } .truth { color: var(--muted); display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 8px 0 14px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); margin: 10px 0; }
@media print { main { padding: 0; } h2 { break-after: avoid; } }
"""


def write_report(workdir: str | os.PathLike[str]) -> epath.Path:
  """Writes report.html from the files in a workdir and returns its path.

  Reads metrics.jsonl, evaluation.json, experts.json, samples.json and run.json; a missing or
  unreadable one is named in the page. Reads interference.json where it is.

  Args:
    workdir: local or remote (gs://) folder of a run.

  Raises:
    MissingFileError: the folder does not exist.
  """
  workdir = epath.Path(workdir)
  if not workdir.is_dir():
    raise MissingFileError(f'workdir {os.fspath(workdir)!r} is not a folder: give the one that '
                            'training or evaluation wrote to.')
  evaluation = _Source(workdir / 'evaluation.json', _read_json, 'written by an evaluation')
  curves = _Source(workdir / 'metrics.jsonl', reporting_curves.read, 'written by training')
  samples = _Source(workdir / 'samples.json', _read_json, 'written by an evaluation')
  experts = _Source(workdir / expert_usage_file.FILE, _read_json, 'written for models that have experts')
  run = _Source(workdir / 'run.json', _read_json, 'written when training starts')
  interference = _Source(workdir / interference_file.FILE, _read_json, 'written by a measurement')
  measured = (workdir / interference_file.FILE).exists()
  references = evaluation.render(_strongest_baselines, otherwise={})
  body = [
      f'<header><h1>{html.escape(workdir.name)}</h1>{_headline(run, curves, evaluation)}</header>',
      _section('Evaluation', evaluation.render(_evaluation)),
      _section('Curves', curves.render(lambda content: _curves(*content, references))),
      _section('Samples', samples.render(_samples)),
      _section('Experts', experts.render(_experts)),
      *([_section('Interference', interference.render(_interference))] if measured else []),
      _section('Run', run.render(_run)),
  ]
  page = (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
          f'<meta name="viewport" content="width=device-width, initial-scale=1">'
          f'<title>{html.escape(workdir.name)} · report</title>'
          f'<style>{_STYLE}{figures.STYLE}</style></head><body><main>{"".join(body)}</main></body>'
          '</html>\n')
  path, partial = workdir / 'report.html', workdir / 'report.html.partial'
  partial.write_text(page, encoding='utf-8')
  partial.replace(path)  # a reader never sees half a page
  return path


class _Source:
  """One file of the workdir: its content, or the sentence that replaces it."""

  def __init__(self, path: epath.Path, read: Callable[[str], Any], origin: str):
    self.name, self.content, self.absence = path.name, None, ''
    try:
      self.content = read(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
      self.absence = f'There is no {self.name} in this workdir; it is {origin}.'
    except ValueError as error:  # not JSON, not UTF-8
      self.absence = f'{self.name} could not be read ({error}).'

  def render(self, draw: Callable[[Any], Any], otherwise: Any = None) -> Any:
    """Returns draw(content); where that is not possible `otherwise`, or a paragraph saying why."""
    absence = self.absence
    if self.content is not None:
      try:
        return draw(self.content)
      except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        absence = (f'{self.name} does not hold what this page expects '
                   f'({type(error).__name__}: {error}).')
    return f'<p class="absent">{html.escape(absence)}</p>' if otherwise is None else otherwise


def _read_json(text: str) -> Any:
  content = json.loads(text)
  if not content:
    raise UsageError('it is empty')
  return content


def _headline(run: _Source, curves: _Source, evaluation: _Source) -> str:
  facts = []
  if curves.content is not None:
    last = max(steps[-1] for steps, _ in curves.content[0].values())
    facts.append(f'step {last:,}')
  if isinstance(run.content, dict):
    parameters = run.content.get('parameters')
    if isinstance(parameters, dict) and isinstance(parameters.get('total'), int):
      facts.append(f'{parameters["total"]:,} parameters')
    facts += [f'{key} {html.escape(str(run.content[key]))[:12]}' for key in ('seed', 'commit')
              if run.content.get(key) is not None]
  line = f'<p class="quiet">{" · ".join(facts)}</p>' if facts else ''
  return line + evaluation.render(_verdict_line, otherwise='')


def _verdict_line(rows: Sequence[Mapping[str, Any]]) -> str:
  compared = [row for row in rows if row.get('baselines')]
  if not compared:
    return ''
  won = sum(all(metrics.verdict(row, value) == metrics.BETTER for value in row['baselines'].values())
            for row in compared)
  return (f'<p>{won} of {len(compared)} metrics that have baselines are better than all of '
          'them.</p>')


def _strongest_baselines(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, float]]:
  """Returns for each 'eval/<evaluator>/<metric>' its strongest baseline."""
  best = {}
  for row in rows:
    if row.get('baselines'):
      hardest = max if metrics.higher_is_better(row) else min
      best[f'eval/{row["evaluator"]}/{row["metric"]}'] = hardest(
          row['baselines'].items(), key=lambda item: item[1])
  return best


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
  lines = []
  for row in rows:
    error, chance, baselines = row.get('standard_error'), row.get('chance'), row.get('baselines', {})
    # A blind guess at something that is better low (perplexity) would flatten the bar.
    with_chance = chance is not None and metrics.higher_is_better(row)
    references = {'chance': chance, **baselines} if with_chance else baselines
    note = '' if metrics.higher_is_better(row) else '<br><span class="quiet">lower is better</span>'
    value = f'<b>{metrics.format_number(row["value"])}</b>' + (
        '' if error is None else f' <span class="quiet">± {metrics.format_error(error)}</span>')
    cells = [
        ('', html.escape(row['evaluator'])), ('', html.escape(row['metric']) + note),
        ('number', value), ('', figures.bullet(row['value'], references)),
        ('mark', '—' if chance is None else _judged(row, chance)),
        ('', ''.join(f'<span class="baseline">{html.escape(name)} {_judged(row, reference)}</span>'
                     for name, reference in baselines.items()) or '—'),
        ('number', f'{row["count"]:,}'),
        ('number', '—' if row.get('step') is None else f'{row["step"]:,}')]
    lines.append('<tr>' + ''.join(f'<td class="{css}">{cell}</td>' for css, cell in cells)
                 + '</tr>')
  head = ''.join(f'<th class="{css}">{title}</th>' for css, title in (
      ('', 'evaluator'), ('', 'metric'), ('number', 'value ± s.e.'), ('', ''), ('', 'chance'),
      ('', 'baselines'), ('number', 'examples'), ('number', 'step')))
  margin = f'{metrics.SIGNIFICANT:.0f}'
  return (
      '<p class="quiet">A baseline is the score of a simple predictor on the same examples. '
      f'<span class="better">▲</span> the model is better by at least {margin} standard errors, '
      f'<span class="level">=</span> closer than that, <span class="worse">▼</span> worse; without '
      'a standard error, any difference counts. Each bar has its own scale; ticks are chance and '
      'baselines.</p><div class="wide"><table class="scores"><thead><tr>'
      f'{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>')


def _judged(row: Mapping[str, Any], reference: float) -> str:
  css, mark = _VERDICTS[metrics.verdict(row, reference)]
  return f'{metrics.format_number(reference)} <span class="{css}" title="{css}">{mark}</span>'


def _curves(curves: reporting_curves.Curves, bad_lines: int, references: Mapping[str, tuple[str, float]]) -> str:
  groups = {}
  for name in sorted(curves, key=lambda name: (_OWN_PANELS.index(name) if name in _OWN_PANELS
                                               else len(_OWN_PANELS), name)):
    group = name.split('/')[0] if '/' in name and name not in _OWN_PANELS else 'run'
    groups.setdefault(group, []).append(name)
  order = [group for group in _GROUP_TITLES if group in groups]
  parts = ['<p class="quiet">Against steps. The strong line averages a window that grows with the '
           'step; the faint one is every point. Dashed: the strongest baseline.</p>']
  if bad_lines:
    parts.append('<p class="absent">Unreadable lines of metrics.jsonl that were skipped: '
                 f'{bad_lines}.</p>')
  for group in order + sorted(set(groups) - set(order)):
    panels = []
    for name in groups[group]:
      steps, values = curves[name]
      title, _, detail = (name if group == 'run' else name.removeprefix(f'{group}/')
                          ).partition('/' if group == 'eval' else '\n')
      panels.append(figures.line_panel(
          title, steps, values, metrics.format_number(values[-1]), detail, references.get(name),
          smoothed=group != 'eval'))
    heading = _GROUP_TITLES.get(group, group.replace('_', ' ').capitalize())
    parts.append(f'<h3>{html.escape(heading)}</h3><div class="panels">{"".join(panels)}</div>')
  return ''.join(parts)


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  parts = []
  for evaluator, cards in samples.items():
    if not cards:
      continue
    exact = sum(map(_is_exact, cards))
    moving = 'frames' in cards[0]
    parts.append(f'<h3>{html.escape(evaluator.capitalize())} · {exact} of {len(cards)} exact</h3>'
                 f'<div class="cards{" videos" if moving else ""}">'
                 f'{"".join(_card(card) for card in cards)}</div>')
  if not parts:
    raise UsageError('no samples')
  return ''.join(parts)


def _is_exact(card: Mapping[str, Any]) -> bool:
  return metrics.exact_match([card['prediction']], [card['reference']]) == 1


def _card(card: Mapping[str, Any]) -> str:
  frames = card['frames'] if 'frames' in card else [card['image']]
  images = ''.join(f'<img alt="" src="data:image/png;base64,{re.sub("[^A-Za-z0-9+/=]", "", x)}">'
                     for x in frames)
  if len(frames) > 1:
    images = f'<div class="strip">{images}</div>'
  answer = html.escape(card['prediction']) or '(nothing)'
  verdict = ('<span class="better" title="exact">✓</span>' if _is_exact(card) else
             f'<span class="truth">truth: {html.escape(card["reference"])}</span>')
  return f'<figure>{images}<figcaption><b>{answer}</b> {verdict}</figcaption></figure>'


def _experts(experts: Mapping[str, Any]) -> str:
  coefficients = np.asarray(experts['coefficients'], np.float64)  # [L, router, A, E]
  if coefficients.ndim != 4 or coefficients.shape[1] != len(experts['sublayers']):
    raise UsageError(f'coefficients {coefficients.shape} must be [layer, router, condition, expert]')
  parts = ['<p class="quiet">How much each condition uses each expert of a layer (no noise, exact routing); columns '
           'are experts, a fuller color is a larger share. Hover for numbers.</p>']
  for index, router in enumerate(experts['sublayers']):
    figure = figures.heat_map(expert_usage_file.labels(experts), experts['layers'], coefficients[:, index])
    parts.append(f'<h3>{html.escape(router)} router</h3><div class="wide">{figure}</div>')
  return ''.join([*parts, _condition_table(experts), _task_overlap(experts)])


def _condition_table(experts: Mapping[str, Any]) -> str:
  """Per condition: the tasks that have it, and its effective number of experts by router."""
  effective = expert_usage_file.mean_effective(experts)
  head = ''.join(f'<th class="number">{html.escape(router)}</th>' for router in experts['sublayers'])
  lines = [f'<tr><td>{html.escape(condition)}</td><td>{html.escape(expert_usage_file.users(experts, a)) or "—"}</td>'
           + ''.join(f'<td class="number">{of_router[a]:.2f}</td>' for of_router in effective) + '</tr>'
           for a, condition in enumerate(experts['conditions'])]
  return (f'<h3>Effective number of experts at {html.escape(experts["checkpoint"])}, mean over layers (1 to '
          f'{int(experts["num_experts"])})</h3><div class="wide"><table><thead><tr><th>condition</th><th>of</th>{head}'
          f'</tr></thead><tbody>{"".join(lines)}</tbody></table></div>')


def _task_overlap(experts: Mapping[str, Any]) -> str:
  names, values = list(experts['tasks']), np.asarray(experts['mean_task_overlap'], np.float64)
  by_layer = np.asarray(experts['task_overlap'], np.float64).mean(1)  # [L, T, T]

  def note(i: int, j: int) -> str:
    overlaps = (f'layer {layer}: {overlap[i, j]:.2f}' for layer, overlap in zip(experts['layers'], by_layer))
    return f'{names[i]} and {names[j]}; {", ".join(overlaps)}'

  notes = [[note(i, j) for j in range(len(names))] for i in range(len(names))]
  return ('<h3>Overlap of two tasks: 1 for the same usage, 0 without a common expert</h3>'
          f'<div class="wide">{figures.signed_map(names, values, [True] * len(names), notes)}</div>')


def _interference(content: Mapping[str, Any]) -> str:
  tasks = content['tasks']
  parts = [
      f'<p class="quiet">I(i, j) at {html.escape(content["checkpoint"])}, over '
      f'<code>{html.escape(content["parameters"])}</code>, {int(content["num_batches"])} batches per task: what a '
      'short step on the task of the column takes from the loss of the task of the row, relative to a step on the '
      'row’s own task. Below 0 it hurts. Hover for 95 % intervals and for the mean of ratios. '
      f'{interference_file.NO_BASE_LEGEND}.</p>']
  for subset in content['subsets']:
    sure, ratio = interference_file.has_base(subset), subset['ratio_of_means']
    names = [name if ok else f'{name} °' for name, ok in zip(tasks, sure, strict=True)]
    notes = [[interference_file.note(subset, tasks, i, j) for j in range(len(tasks))] for i in range(len(tasks))]
    short = interference_file.summary(subset)
    parts.append(f'<h3>{html.escape(subset["subset"])}{short and f": {short}"}</h3><div class="wide">'
                 f'{figures.signed_map(names, np.array(ratio["value"], np.float64), sure, notes)}</div>')
  return ''.join(parts)


def _run(run: Mapping[str, Any]) -> str:
  facts = [(key, str(run[key])) for key in ('seed', 'commit') if run.get(key) is not None]
  for key, value in (run.get('parameters') or {}).items():
    facts.append((f'parameters, {key.replace("_", " ")}',
                  f'{value:,}' if isinstance(value, int) else str(value)))
  facts += [('condition', str(row)) for row in run.get('conditions') or ()]
  facts += [(key, str(value)) for key, value in run.items()
            if key not in ('config', 'parameters', 'conditions', 'seed', 'commit', 'command')]
  listed = ''.join(f'<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>'
                   for key, value in facts)
  command = (f'<h3>Command</h3><pre>{html.escape(str(run["command"]))}</pre>'
             if run.get('command') else '')
  config = ''.join(f'<tr><td><code>{html.escape(key)}</code></td><td><code>{html.escape(value)}'
                   '</code></td></tr>' for key, value in _flatten(run.get('config') or {}))
  details = (f'<details><summary>Config</summary><div class="wide"><table>{config}</table></div>'
             '</details>' if config else '')
  return f'<dl>{listed}</dl>{command}{details}'


def _flatten(config: Mapping[str, Any], prefix: str = '') -> list[tuple[str, str]]:
  flat = []
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      flat += _flatten(value, f'{prefix}{key}.')
    else:
      flat.append((f'{prefix}{key}', json.dumps(value, ensure_ascii=False)))
  return flat


def _section(title: str, body: str) -> str:
  return f'<section id="{title.lower()}"><h2>{title}</h2>{body}</section>'
