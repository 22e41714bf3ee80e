"""The experiment at the published LayerScale, in full."""

import math

import pytest

from tests.stress import mixed_precision


def test_the_lower_bound_is_the_entropy_of_smoothed_labels():
  # Ten classes: .91 for the label, .01 for each of nine others.
  assert mixed_precision.lower_bound() == pytest.approx(-.91 * math.log(.91) - .09 * math.log(.01))


def test_bfloat16_learns_as_float32_does_at_the_published_layer_scale():
  assert mixed_precision.main(width=192, batch_size=32, seeds=1, bound=.02) == 0
