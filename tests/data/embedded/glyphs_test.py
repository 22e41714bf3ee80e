"""Glyph images: drawing, names, and what test splits must not share with training."""

import collections

import numpy as np
import pytest

from uni_moe_jax.data.embedded import glyph_classes, glyphs
from uni_moe_jax.data.shards.writer import Columns

_SEEN_FACE_SPLITS = ('train', 'validation', 'test_characters')


@pytest.fixture(scope='module')
def records() -> dict[str, Columns]:
  return {split: columns for split, columns, _ in glyphs.splits(lambda line: None)}


def _names(columns: Columns, column: str = 'name') -> set[str]:
  return set(columns[column].tolist())


class TestContent:

  @pytest.mark.parametrize(('split', 'min_images', 'min_names'), [
      ('train', 25_000, 500), ('validation', 1_000, 200), ('test_characters', 2_500, 500), ('test_fonts', 2_000, 500)])
  def test_columns_are_many_images_with_name_face_and_class(self, records, split, min_images, min_names):
    columns, count = records[split], len(records[split]['name'])
    assert set(columns) == {'pixels', 'name', 'face', 'class'}
    assert columns['pixels'].shape == (count, 32, 32)
    assert columns['pixels'].dtype == np.uint8
    assert columns['pixels'].any((1, 2)).all()  # every image shows something
    assert columns['name'].shape == columns['face'].shape == columns['class'].shape == (count,)
    assert count > min_images
    names = _names(records[split])
    assert len(names) > min_names
    assert all(name == name.lower() and not name.startswith('combining ') for name in names)

  def test_a_tenth_of_the_characters_is_in_test_and_a_twentieth_in_validation(self, records):
    count = {split: len(_names(records[split])) for split in _SEEN_FACE_SPLITS}
    total = sum(count.values())
    assert count['test_characters'] / total == pytest.approx(0.10, abs=0.01)
    assert count['validation'] / total == pytest.approx(0.05, abs=0.01)

  def test_names_are_unicode_names(self, records):
    assert 'greek small letter alpha with tonos' in _names(records['train'])

  def test_images_are_centered_horizontally(self, records):
    inked = records['train']['pixels'].any(1)  # [N, W]
    assert (np.abs(inked.argmax(1) - inked[:, ::-1].argmax(1)) <= 3).mean() > 0.95


class TestLeaks:

  def test_no_character_is_in_two_of_the_splits_by_character(self, records):
    counts = collections.Counter(name for split in _SEEN_FACE_SPLITS for name in _names(records[split]))
    assert [name for name, count in counts.items() if count > 1] == []

  @pytest.mark.parametrize('names', [
      ('latin capital letter h', 'greek capital letter eta', 'cyrillic capital letter en'),
      ('latin small letter o', 'greek small letter omicron', 'cyrillic small letter o'),
      ('greek capital letter phi', 'cyrillic capital letter ef'),  # drawn separately, not copied
  ])
  def test_homoglyphs_are_in_one_split(self, records, names):
    assert len([split for split in _SEEN_FACE_SPLITS if _names(records[split]) & set(names)]) == 1

  def test_no_image_occurs_twice_in_or_across_splits(self, records):
    images = [pixels.tobytes() for columns in records.values() for pixels in columns['pixels']]
    assert len(set(images)) == len(images)

  def test_unseen_faces_occur_in_test_fonts_only(self, records):
    for split in _SEEN_FACE_SPLITS:
      assert not _names(records[split], 'face') & set(glyphs.UNSEEN_FACES)
    assert _names(records['test_fonts'], 'face') == set(glyphs.UNSEEN_FACES)

  def test_characters_of_test_fonts_are_trained_on(self, records):
    assert _names(records['test_fonts']) <= _names(records['train'])

  def test_every_word_of_an_unseen_face_name_is_trained_on(self, records):
    seen = {word for face in _names(records['train'], 'face') for word in face.split()}
    assert {word for face in glyphs.UNSEEN_FACES for word in face.split()} <= seen


class TestClasses:

  def test_every_class_of_a_split_is_trained_on(self, records):
    assert _names(records['train'], 'class') == {*glyph_classes.CLASSES, ''}
    for split in glyphs.SPLITS:
      assert _names(records[split], 'class') <= _names(records['train'], 'class')

  def test_every_class_has_at_least_twenty_characters(self, records):
    columns = [records[split] for split in _SEEN_FACE_SPLITS]
    characters = {pair for c in columns for pair in zip(c['name'].tolist(), c['class'].tolist(), strict=True)}
    counts = collections.Counter(label for _, label in characters)
    assert {label: counts[label] for label in glyph_classes.CLASSES if counts[label] < 20} == {}

  @pytest.mark.parametrize(('name', 'label'), [
      ('latin small letter d with hook', 'latin small letter'),  # a hook makes another letter
      ('latin small letter a', 'latin small letter'),
      ('latin small letter a with acute', 'accented latin small letter'),
      ('greek capital letter omega with tonos', 'greek capital letter'),
      ('long rightwards arrow from bar', 'rightwards arrow'), ('left right double arrow', 'two-way arrow'),
      ('north west arrow', 'diagonal arrow'),
      ('leftwards harpoon with barb up above rightwards harpoon with barb up', 'harpoon'),
      ('left square bracket', 'bracket'), ('black square', 'square'), ('square root', ''),
      ('circled latin small letter l', 'circled letter'), ('white circle', 'circle'),
      ('playing card queen of hearts', 'playing card'), ('smiling face with sunglasses', 'face'), ('die face-1', ''),
      ('double-struck capital r', 'double-struck letter'), ('mathematical bold capital a', ''),  # an A in a bold face
      ('roman numeral one', ''), ('modifier letter small h', ''),
  ])
  def test_class_follows_from_the_name(self, name, label):
    assert glyph_classes.class_of(name) == label


class TestRender:

  @pytest.fixture
  def font(self):
    return glyphs.load_font('DejaVuSans')

  def test_letters_keep_their_sizes_and_share_a_baseline(self, font):
    capital, small = (glyphs.render(font, letter).any(1).sum() for letter in 'Oo')
    assert capital > small + 2
    assert {32 - glyphs.render(font, letter).any(1)[::-1].argmax() for letter in 'EXx'} == {24}

  def test_a_dot_on_the_left_of_its_box_stays_on_the_left(self, font):
    left, right = (glyphs.render(font, dot) for dot in '\u2801\u2808')  # braille dots 1, 4
    assert left.any(0).argmax() < right.any(0).argmax()

  def test_blank_and_too_wide_characters_are_not_drawn(self, font):
    assert glyphs.render(font, ' ') is None
    assert glyphs.render(font, '\N{PER TEN THOUSAND SIGN}') is None


class TestSplits:

  def test_a_group_is_in_one_split(self):
    groups = [(65 + 2 * i, 66 + 2 * i) for i in range(40)]
    splits = glyphs.assign_splits(groups)
    assert all(splits[a] == splits[b] for a, b in groups)

  def test_of_forty_groups_four_are_in_test_and_two_in_validation_whatever_other_classes_there_are(self):
    braille, hexagrams = ([(code,) for code in range(first, first + 40)] for first in (0x2801, 0x4DC0))
    splits = glyphs.assign_splits(braille)
    assert collections.Counter(splits.values()) == {'test_characters': 4, 'validation': 2, 'train': 34}
    assert {code: glyphs.assign_splits(hexagrams + braille)[code] for code in splits} == splits


@pytest.mark.parametrize(('splits', 'fonts', 'selected'), [
    # Of equal images the one in a seen face is kept.
    ({65: 'train'}, {'bold times': {65: 1}, 'regular sans': {65: 1}}, {'train': [('a', 'regular sans')]}),
    # An unseen character is tested in seen faces only.
    ({65: 'test_characters', 66: 'train'}, {'regular sans': {65: 1, 66: 2}, 'bold times': {65: 3, 66: 4}}, {
        'test_characters': [('a', 'regular sans')], 'train': [('b', 'regular sans')],
        'test_fonts': [('b', 'bold times')]}),
    # In the seen face B equals A. That image belongs to A, so B is neither trained on nor tested.
    ({65: 'train', 66: 'train'}, {'regular sans': {65: 1, 66: 1}, 'bold times': {65: 2, 66: 3}}, {
        'train': [('a', 'regular sans')], 'test_fonts': [('a', 'bold times')]}),
])
def test_images_are_selected_by_equality_character_and_face(splits, fonts, selected):
  # Fonts draw each character as a uniform gray.
  made = [glyphs.Font(face, dict.fromkeys(grays, b''), {c: np.full((32, 32), g, np.uint8) for c, g in grays.items()})
          for face, grays in fonts.items()]
  rows, _ = glyphs.select_images(made, splits)
  assert {split: [(name[-1], face) for _, name, face, _ in rows[split]] for split in rows} == {
      split: selected.get(split, []) for split in glyphs.SPLITS}


def test_a_missing_font_is_named():
  with pytest.raises(FileNotFoundError, match='NoSuchFont.ttf is missing.*constraints.txt'):
    glyphs.load_font('NoSuchFont')
