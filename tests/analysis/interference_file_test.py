"""interference.json, its heat maps and their section of the report."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from uni_moe_jax.analysis import interference, interference_file, run_interference
from uni_moe_jax.analysis.param_subsets import ParamSlice
from uni_moe_jax.reporting import html

TASKS = ('names <a>', 'motion')
# By batch: the first task has a certain effect on itself and is hurt by the second, whose own effect is uncertain.
_ROWS = np.array([[[2., 2.2, 1.8], [-1., -1.1, -.9]], [[.5, .4, .6], [.1, -.1, .03]]])


@pytest.fixture(name='content', scope='module')
def _content():
  slices = [ParamSlice(f'layer {i} ffn_out', i, 'ffn_out', f'path{i}', None) for i in (3, 11)]
  estimates = {name: interference.estimate(interference.Products(sign * _ROWS, sign * _ROWS), num_resamples=100)
               for name, sign in (('all', 1), ('layer 11 ffn_out', -1), ('layer 3 ffn_out', 1))}
  facts = dict(checkpoint='step 7', parameters='ffn_out/kernel$', num_batches=3)
  return run_interference.to_json(facts, TASKS, estimates, slices)


def test_the_content_has_every_subset_in_the_order_of_layers_with_both_ratios(content):
  assert [(p['subset'], p['layer']) for p in content['subsets']] == [
      ('all', None), ('layer 3 ffn_out', 3), ('layer 11 ffn_out', 11)]
  assert content['tasks'] == list(TASKS)
  total = content['subsets'][0]
  assert total['ratio_of_means']['value'][0] == pytest.approx([1, -.5])
  assert total['mean_of_ratios']['value'][0] == pytest.approx([1, -.5])
  low, value, high = (total['delta'][k][0][1] for k in ('low', 'value', 'high'))
  assert low < value < high and value == pytest.approx(-1)
  json.dumps(content, allow_nan=False)


def test_rows_without_a_certain_base_are_known(content):
  assert interference_file.has_base(content['subsets'][0]) == [True, False]
  assert interference_file.has_base(content['subsets'][2]) == [False, False]  # a step on the task itself hurts: no base


def test_heat_maps_are_white_at_zero_blue_where_a_step_helps_and_red_where_it_hurts(content, tmp_path):
  paths = interference_file.write(content, tmp_path, 'interference')
  assert [p.name for p in paths] == ['interference.json', 'interference.png', 'interference_subsets.png']
  assert json.loads(paths[0].read_text()) == content
  with Image.open(paths[1]) as image:
    colors = {c for n, c in image.convert('RGB').getcolors(1 << 20) if n > 500}
  blue, red = [c for c in colors if c[2] > c[0] + 60], [c for c in colors if c[0] > c[2] + 60]
  assert blue and red and (255, 255, 255) in colors


@pytest.mark.parametrize('pattern', [
    r'ffn_\w+/kernel$|attention_\w+/kernel$',  # no formula
    'ffn_out/kernel$|heads/kernel$'])  # a formula, in which Matplotlib would show no dollar sign
def test_dollar_signs_of_a_pattern_are_no_mathematics(content, tmp_path, pattern):
  def width(title):
    interference_file.draw(tmp_path / 'map.png', [content['subsets'][:1]], TASKS, title)
    with Image.open(tmp_path / 'map.png') as image:
      return image.width

  assert width(5 * pattern) > width(5 * pattern.replace('$', ''))


def test_a_figure_that_cannot_be_drawn_costs_no_measurement(content, tmp_path):
  (tmp_path / 'interference.png').mkdir()
  with pytest.raises(OSError):
    interference_file.write(content, tmp_path, 'interference')
  assert json.loads((tmp_path / 'interference.json').read_text()) == content


def test_the_report_shows_the_heat_maps_only_if_they_were_made(content, tmp_path):
  assert 'id="interference"' not in html.write_report(tmp_path).read_text()
  _, *figures = interference_file.write(content, tmp_path, 'interference')
  page = html.write_report(tmp_path).read_text()
  section = page[page.index('id="interference"'):page.index('id="run"')]
  assert re.findall('base64,([^"]+)"', section) == [base64.b64encode(f.read_bytes()).decode() for f in figures]
