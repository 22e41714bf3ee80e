"""One page that shows what a run did: report.html, from the files in a workdir.

The page needs no network and no other file. A section whose file is missing, half written or of another shape is
replaced by a sentence, because a report is also read when something went wrong.
"""

import base64
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from uni_moe_jax.analysis import expert_usage_file, interference_file, metric_curves
from uni_moe_jax.eval import headline, metrics
from uni_moe_jax.io import storage
from uni_moe_jax.reporting import figures
from uni_moe_jax.utils.errors import MissingFileError, UsageError

_OWN_PANELS = ('loss/total', 'learning_rate', 'grad_norm', 'steps_per_second', 'input_wait_share', 'images_per_second',
               'tokens_per_second', 'mfu')
_GROUP_TITLES = {'run': 'The run', 'loss': 'Loss by task', 'accuracy': 'Accuracy by task',
                 'eval': 'Evaluations during training'}
_VERDICTS = {metrics.BETTER: ('better', '▲'), metrics.LEVEL: ('level', '='), metrics.WORSE: ('worse', '▼')}
_NOTE = '<p class="quiet">{}</p>'

_STYLE = """
:root { color-scheme: light dark;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; --card: #ffffff;
  --paper: #fcfcfa; --ink: #1d2127; --muted: #69707a; --line: #e4e5e2; --accent: #28608f; --second: #b3591d; }
@media (prefers-color-scheme: dark) { :root { --card: #1c2025;
  --paper: #15181c; --ink: #e6e8ea; --muted: #969da6; --line: #30363d; --accent: #7fb2de; --second: #e39a5f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--sans); }
main { max-width: 1180px; margin: 0 auto; padding: 40px 28px 72px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 52px 0 4px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 14px; margin: 26px 0 8px; color: var(--muted); font-weight: 600; }
p { margin: 4px 0 12px; max-width: 76ch; } .quiet { color: var(--muted); }
.absent { color: var(--muted); border-left: 3px solid var(--line); padding: 2px 0 2px 12px; }
code, pre { font: 13px/1.5 var(--mono); overflow-wrap: anywhere; }
pre, figure { background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
pre { padding: 10px 14px; white-space: pre-wrap; margin: 6px 0 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
.wide > table.scores { width: 100%; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; font-size: 12px; color: var(--muted); white-space: nowrap; }
.number { text-align: right; } .number, .mark { white-space: nowrap; }
.baseline { display: inline-block; white-space: nowrap; margin-right: 14px; }
.better { color: var(--accent); font-weight: 600; } .level { color: var(--muted); }
.worse { color: var(--second); font-weight: 600; }
.panels, .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(255px, 1fr)); gap: 14px; }
.cards { grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); }
.cards.videos { grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); }
figure { margin: 0; padding: 12px; font-size: 13px; line-height: 1.4; }
figure img { image-rendering: pixelated; width: 84px; height: 84px; object-fit: contain; display: block;
  margin-bottom: 8px; border: 1px solid var(--line); border-radius: 3px; }
figure img.map { image-rendering: auto; width: auto; height: auto; max-width: 100%; margin: 0; border: 0; }
.strip { display: flex; gap: 3px; } .strip img { flex: 1; min-width: 0; width: auto; height: auto; }
figcaption b { font-weight: 600; } .truth { color: var(--muted); display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 8px 0 14px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); margin: 10px 0; }
@media print { main { padding: 0; } h2 { break-after: avoid; } }
"""


def write_report(workdir: str | os.PathLike[str]) -> storage.Path:
  """Writes report.html from the files in a workdir, or in a bucket, and returns its path.

  Reads metrics.jsonl, evaluation.json, experts.png, samples.json and run.json; a missing or unreadable one is named
  in the page. Reads interference.png and interference_subsets.png where they are.

  Raises:
    MissingFileError: the folder does not exist.
  """
  workdir = storage.path(workdir)
  if not workdir.is_dir():
    raise MissingFileError(f'workdir {os.fspath(workdir)!r} is not a folder; give the folder that training or '
                           'evaluation wrote to.')
  evaluation = _Source(workdir / 'evaluation.json', 'evaluation writes it')
  curves = _Source(workdir / 'metrics.jsonl', 'training writes it', _read_curves)
  samples = _Source(workdir / 'samples.json', 'evaluation writes it')
  experts = _Source(workdir / expert_usage_file.FIGURE, 'only models with experts have one', _read_png)
  run = _Source(workdir / 'run.json', 'training writes it at the start')
  interference = [_Source(workdir / name, 'uni-moe interference writes it', _read_png)
                  for name in interference_file.FIGURES]
  weights = lambda png: _image(png, 'weights of experts, as in experts.json')
  ratios = lambda png: _image(png, 'interference of tasks, as in interference.json')
  references = evaluation.render(_strongest_baselines, otherwise={})
  sections = {
      'Evaluation': evaluation.render(_evaluation),
      'Curves': curves.render(lambda content: _curves(*content, references)),
      'Samples': samples.render(_samples), 'Experts': experts.render(weights),
      **({'Interference': ''.join(x.render(ratios) for x in interference)} if interference[0].exists else {}),
      'Run': run.render(_run)}
  last_step = lambda content: [f'step {max(steps[-1] for steps, _ in content[0].values()):,}']
  facts = curves.render(last_step, otherwise=[]) + run.render(_headline, otherwise=[])
  facts = _NOTE.format(' · '.join(facts)) if facts else ''
  name, verdicts = escape(storage.absolute(workdir).name), evaluation.render(_verdict_line, otherwise='')
  body = ''.join(f'<section id="{title.lower()}"><h2>{title}</h2>{body}</section>' for title, body in sections.items())
  path = workdir / 'report.html'
  storage.write_bytes(path, (
      '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      f'<title>{name} · report</title><style>{_STYLE}{figures.STYLE}</style></head><body><main><header><h1>{name}</h1>'
      f'{facts}{verdicts}</header>{body}</main></body></html>\n').encode())  # at once: a reader never sees half a page
  return path


def _read_json(data: bytes) -> Any:
  if not (content := json.loads(data)):
    raise UsageError('it has no content')
  return content


def _read_png(data: bytes) -> bytes:
  if not data.startswith(b'\x89PNG'):
    raise UsageError('it is no PNG image')
  return data


def _read_curves(data: bytes) -> tuple[metric_curves.Curves, int]:
  curves, bad_lines = metric_curves.read(data.decode())
  if not curves:
    raise UsageError(f'no line contains a metric; unreadable lines: {bad_lines}')
  return curves, bad_lines


class _Source:
  """One file of the workdir: its content, or the sentence that replaces it."""

  def __init__(self, path: storage.Path, origin: str, read: Callable[[bytes], Any] = _read_json):
    self.name, self.content, self.absence, self.exists = path.name, None, '', True
    try:
      self.content = read(path.read_bytes())
    except FileNotFoundError:
      self.absence, self.exists = f'There is no {self.name} in this workdir; {origin}.', False
    except ValueError as error:  # not JSON, not UTF-8
      self.absence = f'{self.name} could not be read ({error}).'

  def render(self, draw: Callable[[Any], Any], otherwise: Any = None) -> Any:
    """Returns draw(content); where that is not possible `otherwise`, or a paragraph saying why."""
    absence = self.absence
    if self.content is not None:
      try:
        return draw(self.content)
      except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        absence = f'{self.name} has unexpected content ({type(error).__name__}: {error}).'
    return f'<p class="absent">{escape(absence)}</p>' if otherwise is None else otherwise


def _table(columns: Mapping[str, str], rows: Iterable[Sequence[str]], css: str = '') -> str:
  """columns: title → CSS class. rows: cells as HTML."""
  head = ''.join(f'<th class="{column}">{title}</th>' for title, column in columns.items())
  body = ''.join(
      '<tr>' + ''.join(f'<td class="{column}">{cell}</td>' for column, cell in zip(columns.values(), row, strict=True))
      + '</tr>' for row in rows)
  return f'<div class="wide"><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _headline(run: Mapping[str, Any]) -> list[str]:
  return [f'{run["parameters"]["total"]:,} parameters', *(
      f'{key} {escape(str(run[key]))[:12]}' for key in ('seed', 'commit') if run.get(key) is not None)]


def _verdict_line(rows: Sequence[Mapping[str, Any]]) -> str:
  sentence = headline.sentence(rows)
  return f'<p>{sentence}</p>' if sentence else ''


def _strongest_baselines(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, float]]:
  """Returns for each 'eval/<evaluator>/<metric>' its strongest baseline, where that is finite."""
  strongest = {f'eval/{row["evaluator"]}/{row["metric"]}': headline.strongest_baseline(row)
               for row in rows if row.get('baselines')}
  return {name: baseline for name, baseline in strongest.items() if math.isfinite(baseline[1])}


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
  css = {'evaluator': '', 'metric': '', 'model': 'number', 'strongest baseline': '', 'verdict': 'mark'}
  lines, hidden = headline.first_lines(rows)
  main = [[*map(escape, line.cells[:-1]), f'<span class="{line.verdict}">{line.cells[-1]}</span>'] for line in lines]
  more = f', including {hidden} more evaluators' if hidden else ''
  return f'{_table(css, main)}<details><summary>All {len(rows)} metrics{more}</summary>{_all_metrics(rows)}</details>'


def _all_metrics(rows: Sequence[Mapping[str, Any]]) -> str:
  margin = f'{metrics.SIGNIFICANT:.0f}'
  columns = {'evaluator': '', 'metric': '', 'value ± s.e.': 'number', 'chance': 'mark', 'baselines': '',
             'examples': 'number', 'step': 'number'}
  return _NOTE.format(
      'A baseline is the score of a simple predictor on the same examples, or on some of them with a wider margin. '
      f'<span class="better">▲</span> the model is better by at least {margin} standard errors, '
      '<span class="level">=</span> closer than that, <span class="worse">▼</span> worse; without a standard error, '
      'any difference counts.'
  ) + _table(columns, map(_score, rows), 'scores')


def _score(row: Mapping[str, Any]) -> list[str]:
  """Cells of one row of evaluation.json."""
  error, chance, baselines = row.get('standard_error'), row.get('chance'), row.get('baselines', {})
  higher = row['higher_is_better']
  return [
      escape(row['evaluator']),
      escape(row['metric']) + ('' if higher else '<br><span class="quiet">lower is better</span>'),
      f'<b>{metrics.format_number(row["value"])}</b>' + (
          '' if error is None else f' <span class="quiet">± {metrics.format_error(error)}</span>'),
      '—' if chance is None else _judged(row, chance),
      ''.join(f'<span class="baseline">{escape(name)} {_judged(row, reference, name)}</span>'
              for name, reference in baselines.items()) or '—',
      f'{row["count"]:,}', '—' if row.get('step') is None else f'{row["step"]:,}']


def _judged(row: Mapping[str, Any], reference: float, baseline: str = '') -> str:
  css, mark = _VERDICTS[metrics.verdict(row, reference, baseline)]
  return f'{metrics.format_number(reference)} <span class="{css}" title="{css}">{mark}</span>'


def _curves(curves: metric_curves.Curves, bad_lines: int, references: Mapping[str, tuple[str, float]]) -> str:
  def panel(name: str, group: str) -> str:
    steps, values = curves[name]
    title, _, detail = name.removeprefix(f'{group}/').partition('/' if group == 'eval' else '\n')
    return figures.line_panel(title, steps, values, metrics.format_number(values[-1]), detail, references.get(name),
                              dots=group == 'eval')

  parts = [_NOTE.format('By step. The bold line is a local mean of the faint one. Dashed: the strongest baseline.')]
  if bad_lines:
    parts.append(f'<p class="absent">Unreadable lines skipped in metrics.jsonl: {bad_lines}.</p>')
  groups = {group: [] for group in _GROUP_TITLES}
  groups['run'] += [name for name in _OWN_PANELS if name in curves]
  for name in sorted(set(curves) - set(_OWN_PANELS)):
    groups.setdefault(name.split('/')[0] if '/' in name else 'run', []).append(name)
  for group in filter(groups.get, groups):
    heading = _GROUP_TITLES.get(group, group.replace('_', ' ').capitalize())
    panels = ''.join(panel(name, group) for name in groups[group])
    parts.append(f'<h3>{escape(heading)}</h3><div class="panels">{panels}</div>')
  return ''.join(parts)


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  parts = [f'<h3>{escape(evaluator.capitalize())} · {sum(map(_is_exact, cards))} of {len(cards)} exact</h3>'
           f'<div class="cards{" videos" if "frames" in cards[0] else ""}">{"".join(map(_card, cards))}</div>'
           for evaluator, cards in samples.items() if cards]
  if not parts:
    raise UsageError('no samples')
  return ''.join(parts)


def _is_exact(card: Mapping[str, Any]) -> bool:
  return metrics.exact_match([card['prediction']], [card['reference']]) == 1


def _card(card: Mapping[str, Any]) -> str:
  frames = card['frames'] if 'frames' in card else [card['image']]
  images = ''.join(f'<img alt="" src="data:image/png;base64,{re.sub("[^A-Za-z0-9+/=]", "", x)}">' for x in frames)
  if len(frames) > 1:
    images = f'<div class="strip">{images}</div>'
  answer = escape(card['prediction']) or '(nothing)'
  reference = card['reference'] if isinstance(card['reference'], str) else ' | '.join(card['reference'])
  verdict = ('<span class="better" title="exact">✓</span>' if _is_exact(card) else
             f'<span class="truth">truth: {escape(reference)}</span>')
  return f'<figure>{images}<figcaption><b>{answer}</b> {verdict}</figcaption></figure>'


def _image(png: bytes, alt: str) -> str:
  source = f'data:image/png;base64,{base64.b64encode(png).decode()}'
  return f'<figure><img class="map" alt="{alt}" src="{source}"></figure>'


def _run(run: Mapping[str, Any]) -> str:
  first = {key: run[key] for key in ('seed', 'commit') if run.get(key) is not None}
  if earlier := run.get('earlier_commits'):
    first['earlier commits'] = ', '.join(earlier)
  counts = {f'parameters, {key.replace("_", " ")}': f'{value:,}' if isinstance(value, int) else value
            for key, value in (run.get('parameters') or {}).items()}
  others = {key: value for key, value in run.items()
            if key not in ('config', 'parameters', 'conditions', 'seed', 'commit', 'earlier_commits', 'command')}
  facts = [*first.items(), *counts.items(), *(('condition', c) for c in run.get('conditions') or ()), *others.items()]
  listed = ''.join(f'<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>' for key, value in facts)
  command = f'<h3>Command</h3><pre>{escape(str(run["command"]))}</pre>' if run.get('command') else ''
  config = escape(json.dumps(run.get('config') or {}, indent=1, ensure_ascii=False))
  return f'<dl>{listed}</dl>{command}<details><summary>Config</summary><pre>{config}</pre></details>'
