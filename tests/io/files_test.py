"""Files that are replaced atomically, and output that is written where a flag points."""

import errno
import json
import os
from unittest import mock

import pytest

from uni_moe_jax.io import files
from uni_moe_jax.utils.errors import UsageError


def _refuse(source, target):
  raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _copy(source, target):
  os.makedirs(f'{target}/folder')


@pytest.mark.parametrize('rename, renames', [(os.rename, True), (_refuse, False), (_copy, False)])
def test_folders_that_are_renamed_differ_from_those_that_are_refused_or_copied(tmp_path, monkeypatch, rename, renames):
  monkeypatch.setattr(os, 'rename', rename)
  assert files.renames_folders(tmp_path) == renames
  assert list(tmp_path.iterdir()) == []
  new = tmp_path / 'not/there/yet'
  if renames:
    files.check_renames_folders(new, '--data_dir')
  else:
    with pytest.raises(UsageError, match=f'--data_dir={new}: folders cannot be renamed there, as on a bucket'):
      files.check_renames_folders(new, '--data_dir')
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_and_none_is_made(tmp_path, monkeypatch):
  new = tmp_path / 'not/there/yet'
  files.check_writable(str(tmp_path), '--workdir')
  files.check_writable(str(new), '--workdir')
  files.check_writable('gs://bucket/run', '--workdir')  # no request is sent
  monkeypatch.setattr(os, 'access', lambda path, mode: path != tmp_path)  # as on a read-only file system
  files.check_writable('/', '--workdir')
  for folder in (tmp_path, new):
    with pytest.raises(UsageError, match=f'--workdir={folder}: {tmp_path} cannot be written .*; give a folder'):
      files.check_writable(str(folder), '--workdir')
  with monkeypatch.context() as patch:
    patch.setattr(os, 'lstat', mock.Mock(side_effect=OSError(errno.ENOTCONN, 'not connected')))
    with pytest.raises(OSError, match='not connected'):  # code 1: a mount may come back
      files.check_writable(str(new), '--workdir')
  (tmp_path / 'not').symlink_to('gone')
  with pytest.raises(UsageError, match=f'--workdir={new}: {tmp_path}/not is not a folder'):
    files.check_writable(str(new), '--workdir')
  assert os.listdir(tmp_path) == ['not']


def test_output_goes_through_a_link_and_other_files_are_replaced(tmp_path):
  target, link = tmp_path / 'target', tmp_path / 'link'  # a link, as /dev/stdout is
  target.write_text('old')
  link.symlink_to(target)
  files.write_output(str(link), {'a': 1})
  assert link.is_symlink() and json.loads(target.read_text()) == {'a': 1}
  files.write_json(link, {'a': 2})
  assert not link.is_symlink() and json.loads(target.read_text()) == {'a': 1}
  assert files.read_json(link) == {'a': 2}
  assert sorted(path.name for path in tmp_path.iterdir()) == ['link', 'target']  # no temporary file is left
