"""Groups of characters that look the same: in some font they share an outline, or nearly an image."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from fontTools import ttLib

# Outlines are compared on a grid of 1/64 em, a third of a pixel: finer differences are invisible.
_OUTLINE_GRID = 64
# Two images look the same below this Euclidean distance: 0.6 of one white pixel on black. Some homoglyphs have separate
# drawings (Greek and Cyrillic phi), which a comparison of outlines does not find.
_MAX_DISTANCE = 153
_BLOCK = 4  # pixels per side
_CHUNK = 1024  # images that are compared with all others at a time


def outline_key(font: ttLib.TTFont, glyph: str) -> bytes:
  """Returns a key of a glyph's outline, whatever its horizontal position; empty if it draws nothing."""
  coordinates, ends, _ = font['glyf'][glyph].getCoordinates(font['glyf'])
  if not coordinates:
    return b''
  points = np.asarray(coordinates, np.float64)
  # Images are centered, so the space that a font leaves beside a glyph does not matter.
  points[:, 0] -= points[:, 0].min()
  grid = np.rint(points * (_OUTLINE_GRID / font['head'].unitsPerEm)).astype('<i2')
  # A composed glyph may list the same contours in another order.
  contours = np.split(grid, np.asarray(ends[:-1]) + 1)
  return b'/'.join(sorted(contour.tobytes() for contour in contours))


def similar_pairs(pixels: np.ndarray) -> Iterator[tuple[int, int]]:
  """Yields pairs (i < j) of images that look the same; pixels: uint8 [N, H, W], H and W multiples of 4."""
  count, height, width = pixels.shape
  # Block sums, divided by the block's side, are at most as far from each other as the images are (Cauchy-Schwarz). This
  # test costs a sixteenth and leaves few candidates for the exact comparison.
  tiles = pixels.reshape(count, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
  blocks = tiles.sum((2, 4), dtype=np.float32).reshape(count, -1) / _BLOCK
  norms = np.square(blocks).sum(1)
  slack = 1e-5 * norms.max(initial=1)  # of float32 rounding
  for start in range(0, count, _CHUNK):
    chunk = slice(start, start + _CHUNK)
    bound = norms[chunk, None] + norms - 2 * blocks[chunk] @ blocks.T
    i, j = np.nonzero(bound < _MAX_DISTANCE**2 + slack)
    i += start
    i, j = i[i < j], j[i < j]
    # Integers: the same result on every machine.
    difference = pixels[i].astype(np.int32) - pixels[j]
    similar = np.square(difference).sum((1, 2)) < _MAX_DISTANCE**2
    yield from zip(i[similar].tolist(), j[similar].tolist(), strict=True)


def group_characters(
    outlines: Iterable[Mapping[int, bytes]], pairs: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
  """Returns sorted groups of characters that share an outline, or that `pairs` connect; every character is in one.

  outlines: for each font, character → key of its outline. A character is the same node in all fonts.
  """
  from scipy.cluster.hierarchy import DisjointSet  # imported late: it takes a second
  groups, first = DisjointSet(), {}
  for font in outlines:
    for code, key in font.items():
      groups.add(code)
      groups.merge(code, first.setdefault(key, code))
  for a, b in pairs:
    groups.merge(a, b)
  return sorted(tuple(sorted(group)) for group in groups.subsets())
