"""The argument of a config file."""

import pytest

from uni_moe_jax import config
from uni_moe_jax.utils.errors import UsageError


def _parse(arg, required=()):
  return vars(config.arguments(arg, 'work/c.py', dict(size='base', stage=1, moe=True, run=''),
                               dict(size=('base', 'tiny'), stage=(1, 2)), required))


@pytest.mark.parametrize('arg, changes', [
    ('', {}), (None, {}), ('size=tiny', dict(size='tiny')), ('stage=2,moe=false', dict(stage=2, moe=False)),
    ('moe=True,run=runs/a=b', dict(run='runs/a=b')), ('run=', {})])
def test_values_have_the_types_of_the_defaults(arg, changes):
  assert _parse(arg) == {**dict(size='base', stage=1, moe=True, run=''), **changes}


@pytest.mark.parametrize('arg, message', [
    ('tiny', r"^work/c.py:tiny: 'tiny' must be NAME=VALUE, with NAME one of size, stage, moe, run; for example "
     r'work/c.py:size=base,stage=1,moe=true,run=RUN\.'),
    ('sise=tiny', r"argument 'sise' is unknown; did you mean 'size'\? choices: moe, run, size, stage"),
    ('size=tyny', "size='tyny' is unknown; did you mean 'tiny'"), ('stage=3', "stage='3' is unknown; choices: 1, 2"),
    ('moe=yes', "moe='yes' is unknown; choices: false, true"),
    ('size=tiny,size=base', "argument 'size' is given twice")])
def test_a_wrong_argument_is_an_error_with_its_choices(arg, message):
  with pytest.raises(UsageError, match=message):
    _parse(arg)


def test_a_required_argument_is_an_error_if_missing_or_empty():
  for arg in ('', 'run='):
    with pytest.raises(UsageError, match="argument 'run' is missing; give run=RUN"):
      _parse(arg, required=('run',))
