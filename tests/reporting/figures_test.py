"""Figures: what is drawn where, read back out of the SVG."""

import re
import xml.etree.ElementTree

import numpy as np
from absl.testing import absltest, parameterized

from uni_moe_jax.reporting import figures


def _elements(svg, tag, css):
  return [element for element in xml.etree.ElementTree.fromstring(svg).iter(tag)
          if element.get('class') == css]


class FiguresTest(parameterized.TestCase):

  def test_smoothing_keeps_the_start_and_averages_the_tail(self):
    # Point 0 alone; point 1 of three; point 30 of 25 to 35.
    values = np.arange(100.) ** 2
    smoothed = figures.smooth(values)
    self.assertEqual(smoothed[0], 0)
    self.assertAlmostEqual(smoothed[1], (0 + 1 + 4) / 3)
    self.assertAlmostEqual(smoothed[30], np.mean(values[25:36]))
    self.assertAlmostEqual(smoothed[99], np.mean(values[88:]))

  @parameterized.parameters(
      (0, 1, [0, .5, 1]), (0, 100, [0, 50, 100]), (2.1, 2.6, [2.2, 2.4, 2.6]),
      (-1, 1, [-1, 0, 1]), (5, 5, [5]))
  def test_ticks_are_round_and_inside(self, low, high, expected):
    np.testing.assert_allclose(figures.nice_ticks(low, high), expected, atol=1e-12)

  @parameterized.parameters((0, '0'), (1500, '1.5k'), (2e6, '2M'), (1e-4, '1e-4'),
                            (2.5e-3, '2.5e-3'), (.25, '0.25'), (-.5, '-0.5'))
  def test_axis_labels_are_short(self, value, expected):
    self.assertEqual(figures.short_number(value), expected)

  def test_a_falling_curve_falls_in_the_image(self):
    [path] = _elements(figures.line_panel('loss', [1, 2, 3], [3., 2., 1.], '1', smoothed=False),
                       'path', 'curve')
    points = np.array(re.findall(r'([\d.]+) ([\d.]+)', path.get('d')), float)
    self.assertTrue((np.diff(points[:, 0]) > 0).all())
    self.assertTrue((np.diff(points[:, 1]) > 0).all())  # y grows downwards in SVG

  def test_a_wide_span_gets_a_logarithmic_axis(self):
    svg = figures.line_panel('grad', [0, 1, 2], [1., 10., 100.], '100', smoothed=False)
    heights = [float(dot.get('cy')) for dot in _elements(svg, 'circle', 'dot')]
    self.assertAlmostEqual(heights[0] - heights[1], heights[1] - heights[2], places=0)

  def test_values_that_are_not_finite_are_counted(self):
    svg = figures.line_panel('loss', [1, 2, 3, 4, 5], [1., np.nan, np.inf, 2., 3.], '3')
    self.assertIn('2 not finite', svg)
    self.assertNotIn('nan', svg)

  @parameterized.parameters(([np.nan],), ([0.],), ([1e-12],), ([-3.],))
  def test_a_single_point_is_drawn_or_printed(self, values):
    xml.etree.ElementTree.fromstring(figures.line_panel('x', [7], values, ''))

  def test_a_spike_survives_thinning(self):
    values = np.ones(5000)
    values[2345] = 9.
    [path] = _elements(figures.line_panel('loss', np.arange(5000), values, '1'), 'path', 'raw')
    heights = [float(y) for _, y in re.findall(r'([\d.]+) ([\d.]+)', path.get('d'))]
    self.assertLess(min(heights), 50)  # the image's top
    self.assertLess(len(heights), 500)

  def test_the_bar_and_its_ticks_share_a_scale(self):
    # The largest, .8, stands at 1 / 1.1 of the width; the value .4 at half of that.
    svg = figures.bullet(.4, {'baseline': .8}, width=110)
    [bar], [tick] = _elements(svg, 'rect', 'bar'), _elements(svg, 'rect', 'tick')
    self.assertEqual(float(bar.get('width')), 50)
    self.assertEqual(float(tick.get('x')) + 1, 100)

  def test_a_heat_map_has_a_cell_for_every_layer_row_and_expert(self):
    coefficients = np.zeros((7, 2, 16))
    coefficients[3, 1, 5] = 1
    svg = figures.heat_map(['image <in>', 'words'], range(7), coefficients)
    cells = {cell[0].text: float(cell.get('fill-opacity'))
             for cell in _elements(svg, 'rect', 'cell')}
    self.assertLen(cells, 7 * 2 * 16)
    self.assertEqual(cells.pop('layer 3, words, expert 5: 1.000'), 1)
    self.assertLess(max(cells.values()), .1)

  def test_layers_of_a_heat_map_run_across_and_then_down(self):
    svg = figures.heat_map(['a'], range(4), np.zeros((4, 1, 16)))  # three fit in a line
    x, y = ([float(cell.get(axis)) for cell in _elements(svg, 'rect', 'cell')][::16]
            for axis in 'xy')
    self.assertTrue(x[0] < x[1] < x[2])
    self.assertEqual((x[3], y[0]), (x[0], y[1]))
    self.assertGreater(y[3], y[0])

  def test_a_heat_map_of_another_shape_is_an_error(self):
    with self.assertRaisesRegex(ValueError, r'\(1, 2, 3\) must be \[2 layers, 2 rows, experts\]'):
      figures.heat_map(['a', 'b'], [0, 2], np.zeros((1, 2, 3)))

  def test_a_signed_map_shows_sign_by_color_size_by_depth_and_the_number(self):
    values, notes = np.array([[1., -.5], [0., np.nan]]), [['aa', 'ab'], ['ba', '<bb>']]
    svg = figures.signed_map(['a', 'b'], values, [True, True], notes)
    cells = {cell[0].text: (css, float(cell.get('fill-opacity'))) for css in ('cell', 'minus')
             for cell in _elements(svg, 'rect', css)}
    self.assertEqual(cells, {'aa': ('cell', .75), 'ab': ('minus', .375), 'ba': ('cell', 0), '<bb>': ('cell', 0)})
    numbers = ['1.00', '-0.50', '0.00', '–']
    self.assertEqual([text.text for text in _elements(svg, 'text', 'inside')], numbers)
    unsure = figures.signed_map(['a', 'b'], values, [False, True], notes)
    self.assertEqual([text.text for text in _elements(unsure, 'text', 'inside')], numbers)
    self.assertEqual({float(cell.get('fill-opacity')) for css in ('cell', 'minus')
                      for cell in _elements(unsure, 'rect', css)}, {0})
    with self.assertRaisesRegex(ValueError, r'\(2, 2\) must be \[3, 3\]'):
      figures.signed_map(['a', 'b', 'c'], values, [], [])


if __name__ == '__main__':
  absltest.main()
