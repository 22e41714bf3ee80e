"""Homoglyphs: shared outlines and nearly equal images group characters."""

import numpy as np
from fontTools import ttLib

from uni_moe_jax.data.embedded import glyphs, homoglyphs


class TestGroups:

  def test_a_chain_over_two_fonts_is_one_group(self):
    # 1 and 2 look the same in one font, 2 and 3 in the other: 1 and 3 must stay in one group, too.
    first = {1: b'a', 2: b'a', 3: b'b', 4: b'c'}
    second = {1: b'd', 2: b'e', 3: b'e'}
    assert homoglyphs.group_characters([first, second]) == [(1, 2, 3), (4,)]

  def test_characters_with_one_outline_in_two_fonts_are_grouped(self):
    # A mathematical italic letter of one font equals the letter of the italic font.
    assert homoglyphs.group_characters([{7: b'x'}, {3: b'x'}]) == [(3, 7)]

  def test_given_pairs_are_grouped(self):
    assert homoglyphs.group_characters([{1: b'a', 2: b'b', 3: b'c'}], [(3, 1)]) == [(1, 3), (2,)]

  def test_the_order_of_fonts_does_not_matter(self):
    fonts = [{1: b'a', 2: b'a'}, {2: b'b', 3: b'b'}, {4: b'c', 3: b'd'}]
    assert homoglyphs.group_characters(fonts) == homoglyphs.group_characters(fonts[::-1])


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

  def test_latin_and_cyrillic_a_share_an_outline(self):
    assert self._key('A') == self._key('\N{CYRILLIC CAPITAL LETTER A}')

  def test_capital_and_small_o_have_different_outlines(self):
    assert self._key('O') != self._key('o')

  def test_height_distinguishes_outlines(self):
    # A full stop and a middle dot have the same shape at different heights.
    assert self._key('.') != self._key('\N{MIDDLE DOT}')

  def test_a_blank_has_no_outline(self):
    assert self._key(' ') == b''
