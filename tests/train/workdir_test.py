"""A work directory belongs to one config."""

import pytest

from tests import tiny
from uni_moe_jax.train import workdir


def _claimed(tmp_path):
  c = tiny.config('shape', data_dir='/somewhere')
  workdir.claim_workdir(tmp_path, c, 'print')
  return c


def test_the_same_config_comes_back(tmp_path):
  c = _claimed(tmp_path)
  workdir.claim_workdir(tmp_path, c, 'print')
  assert workdir.load_config(tmp_path).to_dict() == c.to_dict()


@pytest.mark.parametrize('section, field, value', [('train', 'log_every', 7), ('data', 'dir', '/elsewhere')])
def test_fields_that_may_change_may(tmp_path, section, field, value):
  c = _claimed(tmp_path)
  c[section][field] = value
  workdir.claim_workdir(tmp_path, c, 'print')


@pytest.mark.parametrize('section, field, said', [
    ('model', 'width', 'model.width: 16 → 99'), ('train', 'steps', 'train.steps: 6 → 99')])
def test_another_config_is_refused_with_the_field(tmp_path, section, field, said):
  c = _claimed(tmp_path)
  c[section][field] = 99
  for fingerprint in ('print', None):
    with pytest.raises(ValueError, match=f'belongs to a run with another config .*{said}'):
      workdir.claim_workdir(tmp_path, c, fingerprint)


def test_other_data_is_refused(tmp_path):
  c = _claimed(tmp_path)
  with pytest.raises(ValueError, match='the data'):
    workdir.claim_workdir(tmp_path, c, 'another print')


def test_a_check_without_data_makes_nothing(tmp_path):
  workdir.claim_workdir(tmp_path / 'new', tiny.config('shape'))
  assert not (tmp_path / 'new').exists()


def test_a_folder_without_a_run_names_the_command(tmp_path):
  with pytest.raises(FileNotFoundError, match='holds no run .*launch/train.py'):
    workdir.load_config(tmp_path)
