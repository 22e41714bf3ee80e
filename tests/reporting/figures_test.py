"""Curves: what is drawn where, read back out of the SVG."""

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
  points = _points(figures.line_panel('loss', [1, 2, 3], [3., 2., 1.], '1'), 'curve')
  assert (np.diff(points, axis=0) > 0).all()  # y grows downwards in SVG


def test_a_wide_span_gets_a_logarithmic_axis():
  panel = figures.line_panel('grad', [0, 1, 2], [1., 10., 100.], '100', dots=True)
  heights = [float(dot.get('cy')) for dot in _elements(panel, 'circle', 'dot')]
  assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=.5)


def test_values_that_are_not_finite_are_counted():
  panel = figures.line_panel('loss', [1, 2, 3, 4, 5], [1., np.nan, np.inf, 2., 3.], '3')
  assert '2 not finite' in panel and 'nan' not in panel


@pytest.mark.parametrize('value', [np.nan, 0., 1e-12, -3.])
def test_a_single_point_is_drawn_or_printed(value):
  xml.etree.ElementTree.fromstring(figures.line_panel('x', [7], [value], ''))


def test_a_long_curve_is_its_local_means_over_a_faint_one_that_keeps_every_spike():
  values = np.tile([1., 3.], 2500)
  values[2345] = 9.
  panel = figures.line_panel('loss', np.arange(5000), values, '1')
  raw, means = _points(panel, 'raw'), _points(panel, 'curve')
  assert len(means) == 120 and len(raw) == 240
  low, middle, high = 120 - 106 * np.array([1, 2, 9]) / 9  # heights of the values in the image
  assert raw[:, 1].max() == pytest.approx(low, abs=.1) and raw[:, 1].min() == pytest.approx(high, abs=.1)
  assert np.sum(abs(means[:, 1] - middle) < .5) == 119  # all buckets but that of the spike
  assert not _elements(figures.line_panel('loss', np.arange(49), values[:49], '1'), 'path', 'raw')
