"""Which characters look the same: in some font they share an outline, or very nearly a picture."""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from fontTools import ttLib

# Outlines are compared on a grid of 1/64 em, a third of a pixel: finer differences cannot be seen.
_OUTLINE_GRID = 64
# Two pictures look the same below this Euclidean distance: 0.6 of one white pixel on black. Some
# twins are drawn anew (Greek and Cyrillic phi), which no comparison of outlines finds.
_SAME_DISTANCE = 153
_BLOCK = 4  # pixels, both ways
_ROWS = 1024  # pictures that are compared with all others at a time


def outline(font: ttLib.TTFont, glyph: str) -> bytes:
  """Key of a glyph's outline, wherever it stands on its line; empty if it draws nothing."""
  coordinates, ends, _ = font['glyf'][glyph].getCoordinates(font['glyf'])
  if not coordinates:
    return b''
  points = np.asarray(coordinates, np.float64)
  # Pictures are centred, so that glyphs look alike whatever space a font leaves beside them.
  points[:, 0] -= points[:, 0].min()
  grid = np.rint(points * (_OUTLINE_GRID / font['head'].unitsPerEm)).astype('<i2')
  # A composed glyph may list the same contours in another order.
  contours = np.split(grid, np.asarray(ends[:-1]) + 1)
  return b'/'.join(sorted(contour.tobytes() for contour in contours))


def close_pairs(pixels: np.ndarray) -> Iterator[tuple[int, int]]:
  """Pairs (i < j) of pictures that look the same.

  Args:
    pixels: uint8 [N, H, W]; H and W are multiples of 4.
  """
  count, height, width = pixels.shape
  # Sums over blocks, divided by the block's side, are at most as far apart as the pictures are
  # (Cauchy-Schwarz): a sixteenth of the work leaves few candidates to compare in full.
  tiles = pixels.reshape(count, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
  blocks = tiles.sum((2, 4), dtype=np.float32).reshape(count, -1) / _BLOCK
  norms = np.square(blocks).sum(1)
  slack = 1e-5 * norms.max(initial=1)  # of float32 rounding
  for start in range(0, count, _ROWS):
    part = slice(start, start + _ROWS)
    bound = norms[part, None] + norms - 2 * blocks[part] @ blocks.T
    one, other = np.nonzero(bound < _SAME_DISTANCE**2 + slack)
    one += start
    one, other = one[one < other], other[one < other]
    # Whole numbers: the same answer on every machine.
    difference = pixels[one].astype(np.int32) - pixels[other]
    near = np.square(difference).sum((1, 2)) < _SAME_DISTANCE**2
    yield from zip(one[near].tolist(), other[near].tolist(), strict=True)


def join(
    outlines: Iterable[Mapping[int, bytes]], pairs: Iterable[Sequence[int]] = ()
) -> list[tuple[int, ...]]:
  """Groups of characters that a chain of shared outlines and given pairs joins.

  Args:
    outlines: for each font, character -> key of its outline. A character is one in all fonts.
    pairs: further characters that look the same; all of them have an outline.

  Returns:
    Groups in the order of their first character, each in order; every character is in exactly one.
  """
  parent: dict[int, int] = {}

  def root(code: int) -> int:
    while parent[code] != code:
      parent[code] = parent[parent[code]]
      code = parent[code]
    return code

  def unite(one: int, other: int) -> None:
    low, high = sorted((root(one), root(other)))
    parent[high] = low

  first: dict[bytes, int] = {}
  for font in outlines:
    for code, key in font.items():
      parent.setdefault(code, code)
      unite(code, first.setdefault(key, code))
  for one, other in pairs:
    unite(one, other)
  groups = collections.defaultdict(list)
  for code in sorted(parent):
    groups[root(code)].append(code)
  return [tuple(groups[code]) for code in sorted(groups)]
