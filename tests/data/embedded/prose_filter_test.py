"""The prose filter: paragraphs of docstrings, their roles, and what reads as English."""

import inspect

import pytest

from uni_moe_jax.data.embedded import prose_filter
from uni_moe_jax.data.embedded.prose_filter import BODY, ITEM, SUMMARY, extract_paragraphs

_NUMPY_STYLE = inspect.cleandoc('''
    Computes the mean of the values.

    The mean is the sum of the values, divided by their number along
    the `axis`; see :func:`numpy.sum` for what a sum is [1]_.

    Parameters
    ----------
    x : array_like
        The values whose mean is wanted, in an array of any shape.
    Notes
    -----
    A sum of many small values is best done in double precision.

    >>> mean([1, 2, 3])
    2
    ''')
_GOOGLE_STYLE = inspect.cleandoc('''
    Computes the mean of the values.

    There are two ways in which this function can be used:

    * It is called with one array, and gives one number for
      all of it.
    * It is called with an axis, and gives an array of numbers.

    Args:
      x: The values whose mean is wanted, in an array of
        any shape.
      axis: int or None.

    Raises:
      ValueError: The array has no values, so that it has no mean.
    ''')


def test_numpy_style():
  assert extract_paragraphs(_NUMPY_STYLE) == [
      ('Computes the mean of the values.', SUMMARY),
      ('The mean is the sum of the values, divided by their number along the axis; see numpy.sum for what a sum is.',
       BODY),
      ('The values whose mean is wanted, in an array of any shape.', ITEM),
      ('A sum of many small values is best done in double precision.', BODY),
  ]


def test_google_style_with_a_list():
  assert extract_paragraphs(_GOOGLE_STYLE) == [
      ('Computes the mean of the values.', SUMMARY),
      ('It is called with one array, and gives one number for all of it.', ITEM),
      ('It is called with an axis, and gives an array of numbers.', ITEM),
      ('The values whose mean is wanted, in an array of any shape.', ITEM),
  ]


_SENTENCE = 'This is one of very many sentences in a row.'  # 44 characters, 45 with a space


@pytest.mark.parametrize('document, paragraph', [
    ('Sums\n====\nThis is where all of the sums are made and kept.',
     ('This is where all of the sums are made and kept.', SUMMARY)),
    ('* It is called with one array and\ngives one number for all of it.',
     ('It is called with one array and gives one number for all of it.', ITEM)),
    ('This is so short.\n\nThis is so short.', ('This is so short.', SUMMARY)),  # short ones are kept as summaries only
    (' '.join([_SENTENCE] * 20), (' '.join([_SENTENCE] * 11), SUMMARY)),  # 11 * 45 - 1 = 494 <= 500 < 539
], ids=['a summary follows a heading', 'an item continues at its margin', 'short', 'long'])
def test_only_one_paragraph_is_kept_of(document, paragraph):
  assert extract_paragraphs(document) == [paragraph]


@pytest.mark.parametrize('raw, expected', [
    ('See the :ref:`user guide <guide>` for all that there is to know.',
     'See the user guide for all that there is to know.'),
    ('It is the same as :class:`~a.B` but with another name for it.',
     'It is the same as a.B but with another name for it.'),
    ('This is described in [the paper](https://x.org/1) in all of its details.',
     'This is described in the paper in all of its details.'),
    ('It is **not** the case that *this* function returns a ``copy`` of it.',
     'It is not the case that this function returns a copy of it.'),
    ('It isn’t the “best”  way\nto do all of this but it is the ﬁrst that was found.',
     'It isn\'t the "best" way to do all of this but it is the first that was found.'),
], ids=['titled role', 'shortened role', 'markdown link', 'emphasis', 'typography'])
def test_markup_is_removed(raw, expected):
  assert extract_paragraphs(raw) == [(expected, SUMMARY)]


@pytest.mark.parametrize('text', [
    'Returns the sum of all the values in an array along an axis.',
    'If the file is missing, it is made in the folder of the user.',
    'The number of jobs to run (1 if it is not given), or None for as many as there are.',
    'The n_samples rows of the array are the points that are to be sorted.',
])
def test_this_reads_as_english(text):
  assert prose_filter.reads_as_english(text)


@pytest.mark.parametrize('name, text', [
    ('no end', 'Returns the sum of all the values in an array along the following'),
    ('begins inside', 'returns the sum of all the values in an array along an axis.'),
    ('ends in a colon', 'This is how the sum of all the values is made in practice:'),
    ('code', 'It is the first of all the values that are in this a|b array here.'),
    ('doctest', '>>> It is what it was, and it is what it will be, and this is all.'),
    ('table', 'The ----- is ----- in ----- of ----- and ----- to ----- it ----- is.'),
    ('formula', 'The sum x + y of two values is the value that is made by adding.'),
    ('symbols', 'The p and q of r are s and t of the u that is v to the w.'),
    ('names', 'The CamelCase and AnotherName of SomeThing are with YetMore in the function.'),
    ('address', 'All of this is described at https://example.org in the manual of it.'),
    ('list of words', 'Apples pears cherries lemons oranges bananas melons grapes plums dates.'),
    ('punctuation', 'It is, as it was, and as it will be, all of it, to us, or, not, to, them.'),
    ('condition only', 'If the array is empty or the axis is not in the array.'),
    ('open bracket', 'Any of the names) or None when there is no name for it.'),
    ('numbers', 'The 1 of 2 and 3 in 4 to 5 of the 6 is 7 and 8.'),
    ('other alphabet', 'Это the очень of короткий to текст in без is английских and слов.'),
    ('eight words', 'This is the sum of all the values.'),
])
def test_this_does_not_read_as_english(name, text):
  assert not prose_filter.reads_as_english(text), name
