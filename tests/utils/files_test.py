"""Files that are replaced atomically, and output that is written where a flag points."""

import json

from uni_moe_jax.utils import files


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
