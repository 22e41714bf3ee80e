"""What an export tells about where its parameters come from: enough to find them again, and nothing of the machine."""

import json

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.train import workdir


def _told(folder, files=None, **fields):
  c = tiny.config('shape', data_dir='/home/me/prepared')
  for section, changes in fields.items():
    c[section].update(changes)
  folder = folder / 'mine'
  workdir.claim_workdir(folder, c, 'print')
  for name, content in (files or {}).items():
    (folder / name).write_text(json.dumps(content))
  return workdir.provenance(folder, 7)


def test_a_run_from_scratch_is_its_own_origin(tmp_path):
  told = _told(tmp_path, {'run.json': {'commit': 'abc'}})
  assert told['name'] == 'mine' and told['step'] == 7 and told['seed'] == 0 and told['data (fingerprint)'] == 'print'
  assert told['trained by commit'] == 'abc' and not {'started from', 'converted from'} & set(told)


def test_a_warm_started_run_names_the_run_it_started_from(tmp_path):
  told = _told(tmp_path, train={'init': '/home/me/runs/quickstart'})
  assert told['started from'] == 'quickstart'


def test_a_converted_checkpoint_is_named_with_its_checksum(tmp_path):
  told = _told(tmp_path, {'conversion.json': {'checkpoint': '/home/me/model.pth', 'sha256': '12ab'}})
  assert told['converted from'] == 'model.pth (sha256 12ab)' and told['trained by commit'] == 'unknown'


def test_of_files_and_folders_only_their_name_is_told(tmp_path):
  told = _told(tmp_path, tokenizer={'merges': '/home/me/merges.txt.gz', 'file': '/home/me/tokenizer.model'},
               train={'init': '/home/me/runs/quickstart'}, sets={
                   'shapes': config_lib.target_set('file:/home/me/names.tsv', family='names'),
                   'colours': config_lib.target_set(('file:a/red', 'b/c'), family='names')})
  assert {name: s['entries'] for name, s in told['config']['target_sets'].items()} == {
      'shapes': 'file:names.tsv', 'colours': ['file:a/red', 'b/c']}
  assert told['config']['data']['dir'] == 'prepared' and told['config']['tokenizer']['merges'] == 'merges.txt.gz'
  assert '/home/me' not in json.dumps(told)
