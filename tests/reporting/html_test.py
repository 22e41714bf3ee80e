"""The report: what a reader finds on the page, with all files, with some, and with broken ones."""

import base64
import contextlib
import html.parser
import json
import os
import re

import pytest

from tests.helpers import in_process
from uni_moe_jax.analysis import metric_curves
from uni_moe_jax.eval import metrics
from uni_moe_jax.reporting import html as reporting_html

_FILES = ('evaluation.json', 'metrics.jsonl', 'samples.json', 'experts.png', 'run.json')
_DOT = 'iVBORw0KGgo='


@pytest.fixture(name='workdir')
def _workdir(tmp_path):
  """A folder with all files."""
  workdir = tmp_path / 'quick<start'
  workdir.mkdir()
  steps = [{'step': step, 'loss/total': 9 - step, 'loss/caption': 4., 'accuracy/caption': .5, 'learning_rate': 1e-3,
            'eval/mlm/perplexity': 80. - step, 'eval/g/top1': .1 * step} for step in range(1, 6)]
  (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, steps)) + '\n')
  contents = {
      'evaluation.json': [
          metrics.Score.proportion('top1', .4, 2400, .02, {'majority': .14, 'pixels': .63}).row('g', 9),
          metrics.Score('perplexity', 63.2, 90, None, {'unigram': 118.4}).row('mlm', 9)],
      'samples.json': {
          'captions': [{'image': _DOT, 'reference': 'full block', 'prediction': 'Full block'},
                       {'image': _DOT, 'reference': 'arrow', 'prediction': '<script>'}],
          'classification': [], 'videos': [{'frames': [_DOT] * 8, 'reference': 'turn', 'prediction': 'move'}]},
      'run.json': {
          'config': {'model': {'width': 128}, 'tasks': {}}, 'parameters': {'total': 3214592, 'active': 1450240},
          'conditions': ['image 10011000'], 'seed': 0, 'commit': '1f2e3d4',
          'command': 'python launch/train.py --config="a&b"'}}
  for name, content in contents.items():
    (workdir / name).write_text(json.dumps(content))
  (workdir / 'experts.png').write_bytes(base64.b64decode(_DOT))
  return workdir


def _page(workdir):
  path = reporting_html.write_report(workdir)
  assert os.fspath(path) == os.fspath(workdir / 'report.html')
  return (workdir / 'report.html').read_text()


@pytest.fixture(name='page')
def _whole_page(workdir):
  return _page(workdir)


class _Balance(html.parser.HTMLParser):
  """Fails on a tag that is closed in the wrong order."""

  def __init__(self):
    super().__init__()
    self.stack, self.links = [], []

  def handle_starttag(self, tag, attrs):
    self.links += [value for name, value in attrs if name in ('src', 'href')]
    if tag not in ('meta', 'img', 'br'):
      self.stack.append(tag)

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag, tag


def test_a_whole_workdir_leaves_no_section_absent(page):
  assert 'class="absent"' not in page
  for fact in ('step 5', '3,214,592 parameters', 'seed 0', 'commit 1f2e3d4', 'Of 2 metrics, 1 are better', 'a&amp;b',
               '&quot;width&quot;: 128', 'image 10011000'):
    assert fact in page, fact


def test_the_page_is_well_formed_and_needs_no_network(page):
  parser = _Balance()
  parser.feed(page)
  assert not parser.stack
  assert all(link.startswith('data:image/png;base64,') for link in parser.links)
  assert not re.search(r'https?:|url\(|@import|<script|<link', page)
  assert 'prefers-color-scheme: dark' in page


def test_text_from_files_cannot_become_markup(page):
  assert '&lt;script&gt;' in page and 'quick&lt;start' in page


def test_every_baseline_shows_whether_it_is_beaten(page):
  for shown in ('majority 0.140 <span class="better"', 'pixels 0.630 <span class="worse"',
                'unigram 118.4 <span class="better"', '<b>0.400</b> <span class="quiet">± 0.010</span>'):
    assert shown in page, shown


def test_the_first_table_has_at_most_twelve_rows(workdir):
  rows = [metrics.Score('top1', .4, 90).row(f'e{i}', 9) for i in range(14)]
  (workdir / 'evaluation.json').write_text(json.dumps(rows))
  first, rest = re.search('id="evaluation">(.*?)<details>(.*?)</details>', _page(workdir)).groups()
  assert re.findall('<td class="">(e[0-9]+)</td>', first) == [f'e{i}' for i in range(12)]
  assert '>All 14 metrics, including 2 more evaluators<' in rest and '>e13</td>' in rest


def test_there_is_a_panel_per_metric_with_its_strongest_baseline_as_a_dashed_line(page):
  panels = re.findall('<figure class="panel">.*?</figure>', page)
  assert len(panels) == 6
  for title, baseline in (('mlm', 'unigram'), ('g', 'pixels')):
    [panel] = [panel for panel in panels if f'>{title}<' in panel]
    assert 'class="reference"' in panel and f'>{baseline}<' in panel
  assert page.count('class="reference"') == 2


def test_samples_count_exact_matches_as_the_metric_does(page):
  assert 'Captions · 1 of 2 exact' in page and 'Videos · 0 of 1 exact' in page
  assert page.count('<img') == 2 + 8 + 1


def test_a_sample_equal_to_one_of_several_references_is_exact_and_another_one_shows_them_all(workdir):
  cards = [{'image': _DOT, 'reference': ['full block', 'a <box>'], 'prediction': text} for text in ('A <box>', 'box')]
  (workdir / 'samples.json').write_text(json.dumps({'captions': cards}))
  page = _page(workdir)
  assert 'Captions · 1 of 2 exact' in page and page.count('title="exact"') == 1
  assert page.count('truth: full block | a &lt;box&gt;<') == 1


@pytest.mark.parametrize('name', _FILES)
def test_a_missing_file_is_reported_and_costs_only_its_section(workdir, name):
  (workdir / name).unlink()
  page = _page(workdir)
  assert page.count('class="absent"') == 1
  assert f'There is no {name} in this workdir' in page


def test_an_infinite_baseline_is_no_line_of_a_curve(workdir):
  rows = json.loads((workdir / 'evaluation.json').read_text())
  row = next(row for row in rows if row['metric'] == 'perplexity')
  lines = []
  for baseline in (90., float('inf')):
    row['baselines'] = {'unigram': baseline}
    (workdir / 'evaluation.json').write_text(json.dumps(rows))
    page = _page(workdir)
    assert 'class="absent"' not in page
    lines.append(page.count('class="reference"'))
  assert lines[0] == lines[1] + 1


@pytest.mark.parametrize('content', ['', '{"half": ', 'null', '[1]', '{"x": {"y": 3}}'])
@pytest.mark.parametrize('name', _FILES)
def test_a_broken_file_is_reported_and_costs_only_its_section(workdir, name, content):
  (workdir / name).write_text(content)
  page = _page(workdir)
  if (name, content) == ('run.json', '{"x": {"y": 3}}'):
    return  # any object is a run's facts
  assert page.count('class="absent"') == 1
  assert re.search(f'{name} (could not be read|has unexpected content)', page)


def test_a_line_cut_off_by_a_kill_is_counted_and_a_repeated_step_counts_once(workdir):
  with open(workdir / 'metrics.jsonl', 'a') as lines:
    # A restart from step 3 writes 4 and 5 again, and is killed inside a line.
    lines.write('{"step": 4, "loss/total": 40.0}\n{"step": 5, "loss/total": 50.0}\n{"step": 6, ')
  content, bad = metric_curves.read((workdir / 'metrics.jsonl').read_text())
  assert content['loss/total'] == ([1, 2, 3, 4, 5], [8., 7., 6., 40., 50.])
  assert bad == 1
  assert 'Unreadable lines skipped in metrics.jsonl: 1' in _page(workdir)


def test_losses_that_are_not_finite_do_not_break_the_page(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss/total": NaN}\n{"step": 2, "loss/total": Infinity}\n')
  assert '2 not finite' in _page(tmp_path)


def test_the_page_of_the_current_folder_has_its_name(workdir):
  with contextlib.chdir(workdir):
    reporting_html.write_report('.')
  assert '<h1>quick&lt;start</h1>' in (workdir / 'report.html').read_text()


def _launch(*arguments):
  return in_process.python('launch/report.py', *arguments)


def test_the_path_is_printed(tmp_path):
  done = _launch(f'--workdir={tmp_path}')
  assert (done.returncode, done.stdout) == (0, f'{tmp_path}/report.html\n'), done.stderr


def test_a_mistake_is_one_sentence_and_exit_code_2():
  done = _launch('--workdir=/no/such')
  assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, '', 1)
  assert "'/no/such' is not a folder" in done.stderr
