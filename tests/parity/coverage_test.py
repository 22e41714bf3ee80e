"""Every golden file is compared, or excluded by name with a reason."""

import numpy as np
import pytest

from tests.parity import fixtures
from tests.parity.fixtures import Arrays, relative


def test_every_case_is_compared_or_excluded_by_name():
  compared = set(fixtures.cases(*fixtures.SECTIONS, *fixtures.WEIGHTS))
  left_out = fixtures.excluded()
  everything = set(fixtures.manifest()['files'])
  assert compared | set(left_out) == everything, sorted(everything - compared - set(left_out))
  assert not compared & set(left_out)
  print(f'\n{fixtures.FOLDER}: {len(compared)} files compared, {len(left_out)} excluded: '
        + '; '.join(f'{name} ({why})' for name, why in left_out.items()))


def test_only_listed_cases_are_excluded():
  for name in fixtures.excluded():
    assert 'queue_len' in fixtures.entry(name), name
  assert fixtures.cases('forward') and fixtures.cases('state_dict')


def test_an_unread_array_is_reported():
  arrays = Arrays(fixtures.cases(*fixtures.SECTIONS)[0])
  first, *rest = arrays.keys()
  assert first in arrays  # a membership test is no reading
  assert arrays[first] is not None and arrays.unread == set(rest)


@pytest.mark.parametrize('theirs, ours, error', [
    ([3., 4.], [3., 4.5], .1),  # .5 of 5
    ([0., 0.], [0., 2e-3], 2e-3),  # exact zeros are compared absolutely
])
def test_the_error_is_relative_to_their_norm(theirs, ours, error):
  np.testing.assert_allclose(relative(ours, theirs), error)
