"""Figures: what is drawn where, read back out of the SVG or the table."""

import re
import xml.etree.ElementTree

import numpy as np
import pytest

from uni_moe_jax.reporting import figures


def _elements(markup, tag, css):
  return [element for element in xml.etree.ElementTree.fromstring(markup).iter(tag) if element.get('class') == css]


def _points(markup, css):
  [path] = _elements(markup, 'path', css)
  return np.array(re.findall(r'([\d.]+) ([\d.]+)', path.get('d')), float)


def _percent(element, key):
  return float(re.search(rf'{key}: ([\d.]+)%', element.get('style'))[1])


def test_smoothing_keeps_the_start_and_averages_the_tail():
  # Point 0 alone; point 1 of three; point 30 of 25 to 35.
  values = np.arange(100.) ** 2
  expected = [0, (0 + 1 + 4) / 3, np.mean(values[25:36]), np.mean(values[88:])]
  np.testing.assert_allclose(figures.smooth(values)[[0, 1, 30, 99]], expected, rtol=0, atol=5e-8)


@pytest.mark.parametrize('spike', [1e18, np.nan, np.inf])
def test_a_spike_is_in_the_windows_that_have_it_and_in_no_other(spike):
  values = np.full(400, 2.)
  values[20] = spike
  smoothed = figures.smooth(values)
  # Point 17 has the window 14 to 20, point 24 has 20 to 28.
  assert smoothed[16] == smoothed[25] == smoothed[-1] == 2
  assert not (abs(smoothed[17:25]) < 1e17).any()


@pytest.mark.parametrize('low, high, expected', [
    (0, 1, [0, .5, 1]), (0, 100, [0, 50, 100]), (2.1, 2.6, [2.2, 2.4, 2.6]), (-1, 1, [-1, 0, 1]), (5, 5, [5])])
def test_ticks_are_round_and_inside(low, high, expected):
  np.testing.assert_allclose(figures.nice_ticks(low, high), expected, atol=1e-12)


@pytest.mark.parametrize('value, expected', [
    (0, '0'), (1500, '1.5k'), (2e6, '2M'), (1e-4, '1e-4'), (2.5e-3, '2.5e-3'), (3 * 1e-4, '3e-4'),
    (.25, '0.25'), (-.5, '-0.5')])
def test_axis_labels_are_short(value, expected):
  assert figures.short_number(value) == expected


def test_a_falling_curve_falls_in_the_image():
  points = _points(figures.line_panel('loss', [1, 2, 3], [3., 2., 1.], '1', smoothed=False), 'curve')
  assert (np.diff(points, axis=0) > 0).all()  # y grows downwards in SVG


def test_a_wide_span_gets_a_logarithmic_axis():
  panel = figures.line_panel('grad', [0, 1, 2], [1., 10., 100.], '100', smoothed=False)
  heights = [float(dot.get('cy')) for dot in _elements(panel, 'circle', 'dot')]
  assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=.5)


def test_values_that_are_not_finite_are_counted():
  panel = figures.line_panel('loss', [1, 2, 3, 4, 5], [1., np.nan, np.inf, 2., 3.], '3')
  assert '2 not finite' in panel and 'nan' not in panel


@pytest.mark.parametrize('value', [np.nan, 0., 1e-12, -3.])
def test_a_single_point_is_drawn_or_printed(value):
  xml.etree.ElementTree.fromstring(figures.line_panel('x', [7], [value], ''))


def test_a_spike_survives_thinning():
  values = np.ones(5000)
  values[2345] = 9.
  heights = _points(figures.line_panel('loss', np.arange(5000), values, '1'), 'raw')[:, 1]
  assert min(heights) < 50  # the image's top
  assert len(heights) < 500


def test_the_bar_and_its_ticks_share_a_scale():
  # The largest, .8, stands at 1 / 1.1 of the width; the value .4 at half of that.
  bullet = figures.bullet(.4, {'baseline': .8})
  [bar], [tick] = _elements(bullet, 'i', 'bar'), _elements(bullet, 'i', 'tick')
  assert (_percent(bar, 'width'), _percent(tick, 'left')) == (45.5, 90.9)


def test_a_heat_map_has_a_cell_for_every_layer_row_and_expert():
  coefficients = np.zeros((7, 2, 16))
  coefficients[3, 1, 5] = 1
  table = figures.heat_map(['image <in>', 'words'], range(7), coefficients)
  cells = {cell.get('title'): _percent(cell, '--share') for cell in _elements(table, 'td', 'cell')}
  assert len(cells) == 7 * 2 * 16
  assert cells.pop('layer 3, words, expert 5: 1.000') == 100
  assert max(cells.values()) < 10


def test_layers_of_a_heat_map_run_across_and_then_down():
  table = xml.etree.ElementTree.fromstring(figures.heat_map(['a'], range(4), np.zeros((4, 1, 16))))
  lines = [[cell.get('title') for cell in line if cell.get('title')] for line in table]
  assert [[title.split(',')[0] for title in line[::16]] for line in lines if line] == [
      ['layer 0', 'layer 1', 'layer 2'], ['layer 3']]  # three fit in a line


def test_a_heat_map_of_another_shape_is_an_error():
  with pytest.raises(ValueError, match=r'\(1, 2, 3\) must be \[2 layers, 2 rows, experts\]'):
    figures.heat_map(['a', 'b'], [0, 2], np.zeros((1, 2, 3)))


def test_a_signed_map_shows_sign_by_color_size_by_depth_and_the_number():
  values, notes = np.array([[1., -.5], [0., np.nan]]), [['aa', 'ab'], ['ba', '<bb>']]

  def cells(sure):
    table = figures.signed_map(['a', 'b'], values, sure, notes)
    elements = [cell for css in ('cell', 'minus') for cell in _elements(table, 'td', css)]
    return {c.get('title'): (c.get('class'), _percent(c, '--share'), c.text) for c in elements}

  assert cells([True, True]) == {'aa': ('cell', 75, '1.00'), 'ab': ('minus', 37.5, '-0.50'), 'ba': ('cell', 0, '0.00'),
                                 '<bb>': ('cell', 0, '–')}
  unsure = cells([False, True])
  assert {note: text for note, (_, _, text) in unsure.items()} == {
      'aa': '1.00', 'ab': '-0.50', 'ba': '0.00', '<bb>': '–'}
  assert {share for _, share, _ in unsure.values()} == {0}
  with pytest.raises(ValueError, match=r'\(2, 2\) must be \[3, 3\]'):
    figures.signed_map(['a', 'b', 'c'], values, [], [])
