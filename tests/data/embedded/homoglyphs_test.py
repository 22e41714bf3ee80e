"""Homoglyphs: shared outlines and nearly equal images group characters."""

import numpy as np
import pytest
from fontTools import ttLib

from uni_moe_jax.data.embedded import glyphs, homoglyphs


@pytest.mark.parametrize(('fonts', 'pairs', 'groups'), [
    # 1 and 2 look the same in one font, 2 and 3 in the other: 1 and 3 must stay in one group, too.
    ([{1: b'a', 2: b'a', 3: b'b', 4: b'c'}, {1: b'd', 2: b'e', 3: b'e'}], (), [(1, 2, 3), (4,)]),
    ([{1: b'a', 2: b'a'}, {2: b'b', 3: b'b'}, {4: b'c', 3: b'd'}], (), [(1, 2, 3), (4,)]),
    ([{7: b'x'}, {3: b'x'}], (), [(3, 7)]),  # a mathematical italic letter equals the letter of the italic font
    ([{1: b'a', 2: b'b', 3: b'c'}], [(3, 1)], [(1, 3), (2,)]),
], ids=['a chain over two fonts', 'three fonts', 'one outline in two fonts', 'a given pair'])
def test_characters_that_look_the_same_are_grouped_in_any_order_of_fonts(fonts, pairs, groups):
  assert homoglyphs.group_characters(fonts, pairs) == homoglyphs.group_characters(fonts[::-1], pairs) == groups


class TestSimilarPairs:

  def test_a_difference_under_the_threshold_is_similar(self):
    pixels = np.zeros((3, 32, 32), np.uint8)
    pixels[1, 5, 5] = 140  # 0.55 of white
    pixels[2, 5, 5] = 255  # 0.45 from the second, 1 from the first
    assert list(homoglyphs.similar_pairs(pixels)) == [(0, 1), (1, 2)]

  def test_every_similar_pair_is_found(self):
    # Compared with the exhaustive search; distances of this noise lie on both sides of the threshold.
    rng = np.random.default_rng(0)
    pixels = (100 + rng.normal(0, 3.4, (60, 32, 32))).clip(0, 255).astype(np.uint8)
    level = pixels.astype(int)
    distance = np.square(level[:, None] - level[None]).sum((2, 3))
    expected = [(i, j) for i in range(60) for j in range(i + 1, 60) if distance[i, j] < 153**2]
    assert 100 < len(expected) < 1700
    assert sorted(homoglyphs.similar_pairs(pixels)) == expected

  def test_pairs_across_chunks_are_found(self):
    # 1,500 images are compared in two chunks: one pair across them, and one inside the second.
    pixels = np.random.default_rng(0).integers(0, 255, (1500, 8, 8), np.uint8)
    pixels[1400] = pixels[10]
    pixels[1300] = pixels[1100]
    assert sorted(homoglyphs.similar_pairs(pixels)) == [(10, 1400), (1100, 1300)]


class TestOutline:

  def _key(self, character: str) -> bytes:
    with ttLib.TTFont(glyphs.font_path('DejaVuSans')) as font:
      return homoglyphs.outline_key(font, font.getBestCmap()[ord(character)])

  def test_outlines_have_the_size_height_and_shape_of_a_character(self):
    assert self._key(' ') == b''
    assert self._key('A') == self._key('\N{CYRILLIC CAPITAL LETTER A}')
    assert self._key('O') != self._key('o')
    assert self._key('.') != self._key('\N{MIDDLE DOT}')  # the same shape at another height
