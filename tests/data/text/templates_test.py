"""Templates of text classification: filling, truncation and errors."""

import pytest

from uni_moe_jax.data.text.templates import fill_template


class _Letters:
  """Encodes a number as itself, and any other word as 100 plus the number of its letters."""
  spe, eot = 2, 3

  def encode(self, text):
    return [int(word) if word.isdigit() else 100 + len(word) for word in text.split()]

  def encode_batch(self, texts):
    return [self.encode(text) for text in texts]


def _fill(template, length, **texts):
  return fill_template(_Letters(), template, texts, length)


@pytest.mark.parametrize('template, texts, ids, slot', [
    ('{a} <eot> it is <spe> . <eot>', dict(a='11 12'), [11, 12, 3, 102, 102, 2, 101, 3], 5),
    ('{a} <eot> <spe> , {b} <eot>', dict(a='11', b='21 22'), [11, 3, 2, 101, 21, 22, 3], 2),
    ('{shot.at: x-y|no_stop} . {{<spe>}} <eot>', {'shot.at: x-y': '11 12.'}, [11, 12, 101, 101, 2, 101, 3], 4),
])
def test_texts_are_inserted_and_the_slot_is_located(template, texts, ids, slot):
  filled = _fill(template, 20, **texts)
  assert (filled.ids, filled.slot) == (ids, slot)
  # Numbers are of texts, all else is of the template.
  assert filled.in_field == [10 < i < 100 for i in ids]


@pytest.mark.parametrize('text, longest', [
    ('11 12 13 14 ' * 1000, 12 * 7),
    ('11 ' + ' ' * 200 + '12 13 14 ' * 1000, 12 * 7 * 4),  # too few tokens in the first part
    ('wordless ' + 'x' * 10_000, 10_009)])
def test_of_a_document_only_a_part_is_tokenized(text, longest, monkeypatch):
  expected, encode, sizes = _Letters().encode(text)[:7], _Letters.encode, []
  monkeypatch.setattr(_Letters, 'encode', lambda self, text: [sizes.append(len(text)), encode(self, text)][1])
  assert _fill('{a} <eot> <spe> <eot>', 10, a=text).ids[:-3] == expected
  assert max(sizes) == longest


@pytest.mark.parametrize('length, a, b, kept_a, kept_b', [
    (9, 8, 8, 3, 2),  # 9 - 4 fixed tokens = 5: b gets at most 5 // 2 = 2, a the rest
    (9, 8, 1, 4, 1),  # a short b leaves more to a
    (9, 1, 8, 1, 2),  # a short a leaves nothing to b
    (6, 8, 8, 1, 1),  # the smallest possible
    (10, 3, 3, 3, 3),  # exactly enough
])
def test_texts_are_truncated_before_they_are_inserted(length, a, b, kept_a, kept_b):
  ids, slot, _ = _fill('{a} <eot> <spe> , {b} <eot>', length, a='11 ' * a, b='21 ' * b)
  assert ids == [11] * kept_a + [3, 2, 101] + [21] * kept_b + [3]
  assert slot == kept_a + 1


@pytest.mark.parametrize('template, message', [
    ('{a} <eot>', 'has 0 slots <spe>'),
    ('{a} <spe> <spe> <eot>', 'has 2 slots <spe>'),
    ('{a} <spe> .', 'must end in <eot>'),
    ('{txt_a} <spe> <eot>', "'txt_a', which the record lacks; did you mean 'text_a'"),
    ('{a <spe> <eot>', 'the brace at position 1 is not closed'),
    ('{a} <eot> <spe> , {text_a} <eot>', 'length 5 is too small .* needs at least 6'),
])
def test_an_invalid_template_is_refused(template, message):
  with pytest.raises(ValueError, match=message):
    _fill(template, 5, a='11', text_a='11')
