"""Files that are replaced atomically, and output that is written where a flag points."""

import errno
import json
import os

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
  with pytest.raises(OSError, match='too long'):  # code 1: nobody knows what is there, as on a broken mount
    files.check_writable(str(tmp_path / ('x' * 300)), '--workdir')
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


class TestAtomicFolder:

  def test_the_folder_appears_when_the_block_ends_without_an_error(self, tmp_path):
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / 'made') as folder:
      (folder / 'half').touch()
      raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(tmp_path / 'made') as folder:
      (folder / 'part').touch()
      assert not (tmp_path / 'made').exists()
    assert [file.name for file in (tmp_path / 'made').iterdir()] == ['part']

  def test_of_two_concurrent_builds_the_first_to_finish_is_kept(self, tmp_path):
    with files.atomic_folder(tmp_path / 'made') as slow:
      with files.atomic_folder(tmp_path / 'made') as fast:
        (fast / 'fast').touch()
      (slow / 'slow').touch()
    paths = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob('*'))
    assert paths == ['made', 'made/fast']

  def test_the_second_of_two_that_need_not_be_equal_is_an_error(self, tmp_path):
    with pytest.raises(UsageError, match='made was made by another process in the meantime'):
      with files.atomic_folder(tmp_path / 'made', is_reproducible=False) as slow:
        with files.atomic_folder(tmp_path / 'made', is_reproducible=False) as fast:
          (fast / 'fast').touch()
        (slow / 'slow').touch()
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob('*')) == ['made', 'made/fast']
