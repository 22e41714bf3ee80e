"""Glyph pictures: every named character that matplotlib's fonts draw, with name, face and class.

The pictures, names and splits follow from the installed packages alone, so that nothing is
downloaded. A split by character holds whole groups of look-alikes (A, Alpha, Cyrillic A), and no
picture occurs twice, in whatever splits: what a test asks cannot have been learnt by heart.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from fontTools import ttLib
from PIL import Image, ImageDraw, ImageFont

from uni_moe_jax.data.embedded import homoglyphs
from uni_moe_jax.data.embedded.glyph_classes import CLASSES, class_of
from uni_moe_jax.data.pipeline import npz_records
from uni_moe_jax.data.pipeline.records import Records
from uni_moe_jax.utils.errors import MissingFileError, UsageError

SPLITS = ('train', 'validation', 'test_characters', 'test_fonts')

# By file name: other fonts of that folder map placeholders or legacy code points to characters.
FACES = {
    'DejaVuSans': 'regular sans',
    'DejaVuSans-Bold': 'bold sans',
    'DejaVuSans-Oblique': 'oblique sans',
    'DejaVuSans-BoldOblique': 'bold oblique sans',
    'DejaVuSansMono': 'regular mono',
    'DejaVuSansMono-Bold': 'bold mono',
    'DejaVuSansMono-Oblique': 'oblique mono',
    'DejaVuSansMono-BoldOblique': 'bold oblique mono',
    'DejaVuSerif': 'regular serif',
    'DejaVuSerif-Bold': 'bold serif',
    'DejaVuSerif-Italic': 'italic serif',
    'DejaVuSerif-BoldItalic': 'bold italic serif',
    'STIXGeneral': 'regular times',
    'STIXGeneralBol': 'bold times',
    'STIXGeneralItalic': 'italic times',
    'STIXGeneralBolIta': 'bold italic times',
}
# Every word of these two phrases is learnt from other faces.
UNSEEN_FACES = ('bold italic serif', 'bold times')

SIZE = 32  # pixels, both ways
_POINT_SIZE = 22  # pixels per em: a capital is half the picture, and 0.3 % do not fit (left out)
_BASELINE = 24  # rows above the baseline, which leaves 8 for descenders
_TEST_SHARE, _VALIDATION_SHARE = 0.10, 0.05  # of the groups of look-alikes
_FOLDER = 'glyphs-1'  # the number changes with the content: an older folder is not read


@dataclasses.dataclass(frozen=True)
class Font:
  """One face.

  Attributes:
    face: its phrase, a value of FACES.
    outlines: character -> key of its outline, for every character that the font draws.
    pictures: character -> uint8 [SIZE, SIZE], for those that fit.
  """
  face: str
  outlines: dict[int, bytes]
  pictures: dict[int, np.ndarray]


def _name(code: int) -> str:
  return unicodedata.name(chr(code), '').lower()


def _is_sign(code: int) -> bool:
  """Whether a character has a name and stands alone: no mark on others, blank or control."""
  return bool(_name(code)) and unicodedata.category(chr(code))[0] not in 'MZC'


def render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
  """Draws a character in white on black, on one baseline and centred from left to right.

  What is centred is the space that the character takes up: a dot on the left of its space, as in
  braille, stays on the left.

  Returns:
    uint8 [SIZE, SIZE], or None if the character draws nothing or does not fit.
  """
  left, top, right, bottom = font.getbbox(character, anchor='ls')
  if right - left > SIZE or -top > _BASELINE or bottom > SIZE - _BASELINE:
    return None
  picture = Image.new('L', (SIZE, SIZE))
  position = ((SIZE - (right - left)) // 2 - left, _BASELINE)
  ImageDraw.Draw(picture).text(position, character, fill=255, font=font, anchor='ls')
  pixels = np.asarray(picture)
  return pixels if pixels.any() else None


def font_path(file_name: str) -> pathlib.Path:
  """Where matplotlib keeps a font of FACES; raises MissingFileError if it does not."""
  path = pathlib.Path(matplotlib.get_data_path(), 'fonts', 'ttf', f'{file_name}.ttf')
  if not path.exists():
    raise MissingFileError(
        f'font {path} is missing: install the matplotlib version of constraints.txt.')
  return path


def _read_font(file_name: str) -> Font:
  path = font_path(file_name)
  with ttLib.TTFont(path) as font:
    # What a font lacks it draws as a box: only its own table says which characters it has.
    glyphs = {code: glyph for code, glyph in sorted(font.getBestCmap().items()) if _is_sign(code)}
    by_glyph = {glyph: homoglyphs.outline(font, glyph) for glyph in set(glyphs.values())}
  outlines = {code: by_glyph[glyph] for code, glyph in glyphs.items() if by_glyph[glyph]}
  # Basic layout: the other engine shapes differently and needs a library that may be missing.
  drawer = ImageFont.truetype(path, _POINT_SIZE, layout_engine=ImageFont.Layout.BASIC)
  pictures = {code: render(drawer, chr(code)) for code in outlines}
  pictures = {code: pixels for code, pixels in pictures.items() if pixels is not None}
  return Font(FACES[file_name], outlines, pictures)


def _group(fonts: Sequence[Font]) -> list[tuple[int, ...]]:
  """Groups of look-alikes over all fonts."""
  pairs = []
  for font in fonts:
    codes = tuple(font.pictures)
    close = homoglyphs.close_pairs(np.stack(list(font.pictures.values())))
    pairs += [(codes[one], codes[other]) for one, other in close]
  return homoglyphs.join((font.outlines for font in fonts), pairs)


def assign_splits(groups: Sequence[Sequence[int]]) -> dict[int, str]:
  """Character -> 'train', 'validation' or 'test_characters', the same for a whole group.

  Within every class, groups are ordered by a hash of their first character and cut by share: a
  class is in every split in proportion, and a change in one class moves no character of another.
  """
  strata = collections.defaultdict(list)
  for group in groups:
    strata[class_of(_name(group[0]))].append(group)
  splits = {}
  for stratum in strata.values():
    stratum.sort(key=lambda group: hashlib.sha256(f'glyph group {group[0]}'.encode()).digest())
    tested = round(_TEST_SHARE * len(stratum))
    held = tested + round(_VALIDATION_SHARE * len(stratum))
    for position, group in enumerate(stratum):
      if position < tested:
        split = 'test_characters'
      elif position < held:
        split = 'validation'
      else:
        split = 'train'
      splits.update(dict.fromkeys(group, split))
  return splits


def choose(
    fonts: Sequence[Font], splits: Mapping[int, str]
) -> tuple[dict[str, list[tuple[np.ndarray, str, str, str]]], collections.Counter[str]]:
  """Which pictures stay, and where.

  Args:
    fonts: seen and unseen faces in any order.
    splits: the split of every character, see `assign_splits`.

  Returns:
    Rows (pixels, name, face, class) by split, and counts of what was left out, by reason.
  """
  rows = {split: [] for split in SPLITS}
  left_out = collections.Counter()
  seen = set()
  # Seen faces first: of two equal pictures the first stays, never the one of an unseen face.
  for font in sorted(fonts, key=lambda font: font.face in UNSEEN_FACES):
    unseen = font.face in UNSEEN_FACES
    left_out['too large'] += len(font.outlines) - len(font.pictures)
    for code, pixels in font.pictures.items():
      if unseen and splits[code] != 'train':
        left_out['of unseen characters in unseen faces'] += 1
      elif pixels.tobytes() in seen:
        left_out['equal to another'] += 1
      else:
        seen.add(pixels.tobytes())
        name = _name(code)
        split = 'test_fonts' if unseen else splits[code]
        rows[split].append((pixels, name, font.face, class_of(name)))
  # A character whose pictures in seen faces all equal those of others was not learnt.
  learnt = {name for _, name, _, _ in rows['train']}
  kept = [row for row in rows['test_fonts'] if row[1] in learnt]
  left_out['of unseen characters in unseen faces'] += len(rows['test_fonts']) - len(kept)
  return rows | {'test_fonts': kept}, left_out


def build(directory: str | os.PathLike[str], report: Callable[[str], None] = print) -> None:
  """Makes the glyph pictures in `directory`, unless they are there; reports sizes and seconds.

  Raises:
    MissingFileError: if the installed matplotlib lacks one of the fonts.
    UsageError: if a class of a test or validation picture has no picture in train.
  """
  folder = pathlib.Path(directory) / _FOLDER
  if folder.is_dir():
    return
  start = time.monotonic()
  fonts = [_read_font(name) for name in FACES]
  rows, left_out = choose(fonts, assign_splits(_group(fonts)))
  trained = {label for *_, label in rows['train']}
  for split in SPLITS:
    missing = {label for *_, label in rows[split]} - trained
    if missing:
      raise UsageError(f'split {split!r} has classes that train lacks: {sorted(missing)}.')
  with npz_records.atomic_folder(folder) as temporary:
    for split in SPLITS:
      pixels, names, faces, labels = zip(*rows[split], strict=True)
      columns = {
          'pixels': np.stack(pixels),
          'name': np.array(names),
          'face': np.array(faces),
          'class': np.array(labels),
      }
      npz_records.save(temporary, split, columns, {'class': CLASSES})
      report(f'glyphs: {split} has {len(names)} pictures of {len(set(names))} characters')
  reasons = ', '.join(f'{count} {reason}' for reason, count in left_out.items())
  report(f'glyphs: left out {reasons}; took {time.monotonic() - start:.1f} s')


def load(directory: str | os.PathLike[str], split: str) -> Records:
  """One of SPLITS: pixels uint8 [N, 32, 32], and name, face, class ('' for no class) as text [N].

  Raises:
    MissingFileError: if `build` has not made them in `directory`.
    UsageError: if there is no such split.
  """
  return npz_records.load(pathlib.Path(directory) / _FOLDER, split, directory)
