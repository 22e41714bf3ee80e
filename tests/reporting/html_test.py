"""The report: what a reader finds on the page, with all files, with some, and with broken ones."""

import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest, parameterized

from uni_moe_jax.eval import metrics
from uni_moe_jax.reporting import curves
from uni_moe_jax.reporting import html as reporting_html

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FILES = ('evaluation.json', 'metrics.jsonl', 'samples.json', 'experts.json', 'run.json')
_DOT = 'iVBORw0KGgo='


def _write_all(workdir):
  workdir = pathlib.Path(workdir)
  rows = [
      metrics.Score.proportion('top1', .4, 2400, .02, {'majority': .14, 'pixels': .63}).row('g', 9),
      metrics.Score('perplexity', 63.2, 90, None, {'unigram': 118.4}, None, False).row('mlm', 9)]
  (workdir / 'evaluation.json').write_text(json.dumps(rows))
  steps = [{'step': step, 'loss/total': 9 - step, 'loss/caption': 4., 'accuracy/caption': .5,
            'learning_rate': 1e-3, 'eval/mlm/perplexity': 80. - step, 'eval/g/top1': .1 * step}
           for step in range(1, 6)]
  (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, steps)) + '\n')
  (workdir / 'samples.json').write_text(json.dumps({
      'captions': [{'image': _DOT, 'reference': 'full block', 'prediction': 'Full block'},
                   {'image': _DOT, 'reference': 'arrow', 'prediction': '<script>'}],
      'classification': [],
      'videos': [{'frames': [_DOT] * 8, 'reference': 'turn', 'prediction': 'move'}]}))
  (workdir / 'experts.json').write_text(json.dumps({
      'checkpoint': 'step 5', 'conditions': ['image 10011000', 'words 11010110'], 'layers': [0, 2],
      'sublayers': ['attention', 'mlp'], 'num_experts': 3, 'tasks': {'caption': {'visual': 0, 'words': 1}},
      'coefficients': [[[[.25, .75, 0], [0, .5, .5]]] * 2] * 2, 'effective_experts': [[[1.75, 2]] * 2] * 2,
      'task_overlap': [[[[1]]] * 2] * 2, 'mean_task_overlap': [[1]]}))
  (workdir / 'run.json').write_text(json.dumps({
      'config': {'model': {'width': 128}, 'tasks': {}},
      'parameters': {'total': 3214592, 'active': 1450240}, 'conditions': ['image 10011000'],
      'seed': 0, 'commit': '1f2e3d4', 'command': 'python launch/train.py --config="a&b"'}))


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


class ReportTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir('quick<start').full_path)

  def _page(self):
    path = reporting_html.write_report(self.workdir)
    self.assertEqual(os.fspath(path), os.fspath(self.workdir / 'report.html'))
    return self.workdir.joinpath('report.html').read_text()

  def test_a_whole_workdir_leaves_no_section_absent(self):
    _write_all(self.workdir)
    page = self._page()
    self.assertNotIn('class="absent"', page)
    for fact in ('step 5', '3,214,592 parameters', 'seed 0', 'commit 1f2e3d4', '1 of 2 metrics',
                 'a&amp;b', 'model.width', 'attention router', 'layer 2', 'image 10011000'):
      self.assertIn(fact, page)

  def test_the_page_is_well_formed_and_needs_no_network(self):
    _write_all(self.workdir)
    parser = _Balance()
    page = self._page()
    parser.feed(page)
    self.assertEmpty(parser.stack)
    self.assertTrue(all(link.startswith('data:image/png;base64,') for link in parser.links))
    self.assertNotRegex(page, r'https?:|url\(|@import|<script|<link')
    self.assertIn('prefers-color-scheme: dark', page)

  def test_text_from_files_cannot_become_markup(self):
    _write_all(self.workdir)
    page = self._page()
    self.assertIn('&lt;script&gt;', page)
    self.assertIn('quick&lt;start', page)

  def test_every_baseline_shows_whether_it_is_beaten(self):
    _write_all(self.workdir)
    page = self._page()
    self.assertIn('majority 0.140 <span class="better"', page)
    self.assertIn('pixels 0.630 <span class="worse"', page)
    self.assertIn('unigram 118.4 <span class="better"', page)
    self.assertIn('<b>0.400</b> <span class="quiet">± 0.010</span>', page)

  def test_there_is_a_panel_per_metric_with_its_strongest_baseline_as_a_dashed_line(self):
    _write_all(self.workdir)
    page = self._page()
    panels = re.findall('<svg viewBox="0 0 270 .*?</svg>', page)
    self.assertLen(panels, 6)
    for title, baseline in (('mlm', 'unigram'), ('g', 'pixels')):
      [panel] = [panel for panel in panels if f'>{title}<' in panel]
      self.assertIn('class="reference"', panel)
      self.assertIn(f'>{baseline}<', panel)
    self.assertEqual(page.count('class="reference"'), 2)

  def test_samples_count_exact_matches_as_the_metric_does(self):
    _write_all(self.workdir)
    page = self._page()
    self.assertIn('Captions · 1 of 2 exact', page)
    self.assertIn('Videos · 0 of 1 exact', page)
    self.assertEqual(page.count('<img'), 2 + 8)

  @parameterized.parameters(*_FILES)
  def test_a_missing_file_is_reported_and_costs_only_its_section(self, name):
    _write_all(self.workdir)
    (self.workdir / name).unlink()
    page = self._page()
    self.assertEqual(page.count('class="absent"'), 1)
    self.assertIn(f'There is no {name} in this workdir', page)

  @parameterized.product(name=_FILES, content=('', '{"half": ', 'null', '[1]', '{"x": {"y": 3}}'))
  def test_a_broken_file_is_reported_and_costs_only_its_section(self, name, content):
    _write_all(self.workdir)
    (self.workdir / name).write_text(content)
    page = self._page()
    if (name, content) == ('run.json', '{"x": {"y": 3}}'):
      return  # any object is a run's facts
    self.assertEqual(page.count('class="absent"'), 1)
    self.assertRegex(page, f'{name} (could not be read|does not hold what this page expects)')

  def test_a_line_cut_off_by_a_kill_is_counted_and_a_repeated_step_counts_once(self):
    _write_all(self.workdir)
    with open(self.workdir / 'metrics.jsonl', 'a') as lines:
      # A restart from step 3 writes 4 and 5 again, and is killed inside a line.
      lines.write('{"step": 4, "loss/total": 40.0}\n{"step": 5, "loss/total": 50.0}\n{"step": 6, ')
    content, bad = curves.read((self.workdir / 'metrics.jsonl').read_text())
    self.assertEqual(content['loss/total'], ([1, 2, 3, 4, 5], [8., 7., 6., 40., 50.]))
    self.assertEqual(bad, 1)
    self.assertIn('Unreadable lines of metrics.jsonl that were skipped: 1', self._page())

  def test_losses_that_are_not_finite_do_not_break_the_page(self):
    (self.workdir / 'metrics.jsonl').write_text(
        '{"step": 1, "loss/total": NaN}\n{"step": 2, "loss/total": Infinity}\n')
    self.assertIn('2 not finite', self._page())

  def test_a_folder_that_is_not_there_is_named(self):
    with self.assertRaisesRegex(FileNotFoundError, "workdir '/no/such' is not a folder"):
      reporting_html.write_report('/no/such')


class LaunchTest(parameterized.TestCase):

  def _launch(self, *arguments):
    return subprocess.run([sys.executable, _ROOT / 'launch/report.py', *arguments],
                          env={**os.environ, 'PYTHONPATH': str(_ROOT)}, capture_output=True,
                          text=True, check=False)

  def test_the_path_is_printed(self):
    workdir = self.create_tempdir().full_path
    done = self._launch(f'--workdir={workdir}')
    self.assertEqual((done.returncode, done.stdout), (0, f'{workdir}/report.html\n'), done.stderr)

  def test_curves_become_a_figure_of_their_own(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    figure = workdir / 'curves.svg'
    (workdir / 'metrics.jsonl').write_text('{"step": 1, "loss/a": 2.0, "accuracy/a": 0.5, "grad_norm": 7.0}\n')
    done = self._launch(f'--workdir={workdir}', f'--output={figure}')
    self.assertEqual((done.returncode, done.stdout), (0, f'{workdir}/report.html\n{figure}\n'), done.stderr)
    drawn = figure.read_text()
    self.assertIn('loss/a  2', drawn)
    self.assertNotIn('grad_norm', drawn)

  def test_curves_of_a_run_without_losses_are_refused_in_one_sentence(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    (workdir / 'metrics.jsonl').write_text('{"step": 1, "grad_norm": 7.0}\n')
    done = self._launch(f'--workdir={workdir}', f'--output={workdir}/curves.png')
    self.assertEqual(done.returncode, 2)
    self.assertIn('no curve is named loss/… or accuracy/…; there are grad_norm', done.stderr)

  @parameterized.parameters(
      ((), 'Flag --workdir must have a value'), (('--workdir=/no/such',), "'/no/such' is not a folder"),
      (('--workdri=/tmp',), "Unknown command line flag 'workdri'"),
      (('--workdir=/tmp', '/tmp'), "unexpected argument '/tmp'"))
  def test_a_mistake_is_one_sentence_and_exit_code_2(self, arguments, message):
    done = self._launch(*arguments)
    self.assertEqual(done.returncode, 2)
    self.assertEqual(done.stdout, '')
    self.assertLen(done.stderr.splitlines(), 1)
    self.assertIn(message, done.stderr)


if __name__ == '__main__':
  absltest.main()
