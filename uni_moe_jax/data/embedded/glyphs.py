"""Glyph images: every named character that matplotlib's fonts draw, with name, face and class.

Images, names and splits depend on the installed packages only; nothing is downloaded. A split by character contains
whole groups of homoglyphs (A, Alpha, Cyrillic A), and no image occurs twice in any splits: no test can be solved by
memorization.
"""

import collections
import dataclasses
import hashlib
import pathlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from fontTools import ttLib
from PIL import Image, ImageDraw, ImageFont

from uni_moe_jax.data.embedded import homoglyphs
from uni_moe_jax.data.embedded.glyph_classes import CLASSES, class_of
from uni_moe_jax.data.shards.writer import Split
from uni_moe_jax.utils.errors import MissingFileError, UsageError

SPLITS = ('train', 'validation', 'test_characters', 'test_fonts')

# By file name. Other fonts of that folder map placeholders or legacy code points to characters.
FACES = {
    'DejaVuSans': 'regular sans', 'DejaVuSans-Bold': 'bold sans',
    'DejaVuSans-Oblique': 'oblique sans', 'DejaVuSans-BoldOblique': 'bold oblique sans',
    'DejaVuSansMono': 'regular mono', 'DejaVuSansMono-Bold': 'bold mono',
    'DejaVuSansMono-Oblique': 'oblique mono', 'DejaVuSansMono-BoldOblique': 'bold oblique mono',
    'DejaVuSerif': 'regular serif', 'DejaVuSerif-Bold': 'bold serif',
    'DejaVuSerif-Italic': 'italic serif', 'DejaVuSerif-BoldItalic': 'bold italic serif',
    'STIXGeneral': 'regular times', 'STIXGeneralBol': 'bold times',
    'STIXGeneralItalic': 'italic times', 'STIXGeneralBolIta': 'bold italic times',
}
# Every word of these two names occurs in other faces, which are trained on.
UNSEEN_FACES = ('bold italic serif', 'bold times')

SIZE = 32  # pixels per side
_POINT_SIZE = 22  # pixels per em: a capital is half of the image; 0.3 % of the characters do not fit and are left out
_BASELINE = 24  # rows above the baseline, which leaves 8 for descenders
_TEST_FRACTION, _VALIDATION_FRACTION = 0.10, 0.05  # of the groups of homoglyphs


@dataclasses.dataclass(frozen=True)
class Font:
  """The characters of a font."""
  face: str  # a value of FACES
  outlines: dict[int, bytes]  # key of the outline of every character that the font draws
  images: dict[int, np.ndarray]  # uint8 [SIZE, SIZE], of those that fit


def _name(code: int) -> str:
  return unicodedata.name(chr(code), '').lower()


def render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
  """Draws a character in white on black, uint8 [SIZE, SIZE]; None if it draws nothing or does not fit.

  It is on a fixed baseline. Its advance box is centered horizontally, not its ink: a dot on the left of its box, as in
  braille, stays left.
  """
  left, top, right, bottom = font.getbbox(character, anchor='ls')
  if right - left > SIZE or -top > _BASELINE or bottom > SIZE - _BASELINE:
    return None
  image = Image.new('L', (SIZE, SIZE))
  position = ((SIZE - (right - left)) // 2 - left, _BASELINE)
  ImageDraw.Draw(image).text(position, character, fill=255, font=font, anchor='ls')
  return np.asarray(image) if image.getbbox() else None


def load_font(file_name: str) -> ImageFont.FreeTypeFont:
  """Loads a font of FACES for `render`."""
  # Basic layout: the other engine shapes differently and needs a library that may be missing.
  return ImageFont.truetype(font_path(file_name), _POINT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def font_path(file_name: str) -> pathlib.Path:
  """Returns matplotlib's path of a font of FACES. Raises MissingFileError if it does not exist."""
  path = pathlib.Path(matplotlib.get_data_path(), 'fonts', 'ttf', f'{file_name}.ttf')
  if not path.exists():
    raise MissingFileError(f'font {path} is missing: install the matplotlib version of constraints.txt.')
  return path


def _read_font(file_name: str) -> Font:
  with ttLib.TTFont(font_path(file_name)) as font:
    # Pillow draws a missing character as a box; only the font's own table lists its characters. Combining marks, blanks
    # and control characters are left out.
    glyphs = {code: glyph for code, glyph in sorted(font.getBestCmap().items())
              if _name(code) and unicodedata.category(chr(code))[0] not in 'MZC'}
    by_glyph = {glyph: homoglyphs.outline_key(font, glyph) for glyph in set(glyphs.values())}
  outlines = {code: by_glyph[glyph] for code, glyph in glyphs.items() if by_glyph[glyph]}
  drawer = load_font(file_name)
  images = {code: render(drawer, chr(code)) for code in outlines}
  return Font(FACES[file_name], outlines, {code: image for code, image in images.items() if image is not None})


def _homoglyph_groups(fonts: Sequence[Font]) -> list[tuple[int, ...]]:
  """Returns groups of homoglyphs over all fonts."""
  pairs = []
  for codes, images in (zip(*font.images.items()) for font in fonts):
    pairs += [(codes[i], codes[j]) for i, j in homoglyphs.similar_pairs(np.stack(images))]
  return homoglyphs.group_characters((font.outlines for font in fonts), pairs)


def assign_splits(groups: Sequence[Sequence[int]]) -> dict[int, str]:
  """Returns character → 'train', 'validation' or 'test_characters', the same for a whole group.

  Groups of a class are ordered by a hash of their first character and cut by fraction: every split has every class in
  proportion, and a change in one class moves no character of another.
  """
  by_class = collections.defaultdict(list)
  for group in groups:
    by_class[class_of(_name(group[0]))].append(group)
  splits = {}
  for members in by_class.values():
    members.sort(key=lambda group: hashlib.sha256(f'glyph group {group[0]}'.encode()).digest())
    num_test, num_validation = (round(fraction * len(members)) for fraction in (_TEST_FRACTION, _VALIDATION_FRACTION))
    for i, group in enumerate(members):
      split = 'test_characters' if i < num_test else 'validation' if i < num_test + num_validation else 'train'
      splits |= dict.fromkeys(group, split)
  return splits


def select_images(
    fonts: Sequence[Font], splits: Mapping[int, str]
) -> tuple[dict[str, list[tuple[np.ndarray, str, str, str]]], collections.Counter[str]]:
  """Returns rows (pixels, name, face, class) by split, and counts of what was left out, by reason."""
  rows, left_out, seen = {split: [] for split in SPLITS}, collections.Counter(), set()
  # Seen faces first: of two equal images the first is kept, never the one of an unseen face.
  for font in sorted(fonts, key=lambda font: font.face in UNSEEN_FACES):
    unseen = font.face in UNSEEN_FACES
    # Without characters whose images in seen faces all equal those of others.
    trained = {name for _, name, _, _ in rows['train']}
    left_out['too large'] += len(font.outlines) - len(font.images)
    for code, pixels in font.images.items():
      name = _name(code)
      if unseen and name not in trained:
        left_out['of unseen characters in unseen faces'] += 1
      elif pixels.tobytes() in seen:
        left_out['equal to another'] += 1
      else:
        seen.add(pixels.tobytes())
        rows['test_fonts' if unseen else splits[code]].append((pixels, name, font.face, class_of(name)))
  return rows, left_out


def splits(report: Callable[[str], None] = print) -> Iterator[Split]:
  """Yields SPLITS: pixels uint8 [N, 32, 32], and name, face, class ('' for no class) as text [N].

  Raises MissingFileError if matplotlib lacks a font.
  """
  fonts = [_read_font(name) for name in FACES]
  rows, left_out = select_images(fonts, assign_splits(_homoglyph_groups(fonts)))
  trained = {label for *_, label in rows['train']}
  for split in SPLITS:
    if missing := {label for *_, label in rows[split]} - trained:
      raise UsageError(f'split {split!r} has classes that train lacks: {sorted(missing)}.')
    columns = {name: np.array(column) for name, column in zip(
        ('pixels', 'name', 'face', 'class'), zip(*rows[split], strict=True), strict=True)}
    report(f'glyphs: {split} has {len(rows[split])} images of {len(set(columns["name"]))} characters')
    yield split, columns, {'class': CLASSES}
  report('glyphs: left out ' + ', '.join(f'{count} {reason}' for reason, count in left_out.items()))
