"""The provenance of an export identifies the origin of its parameters without naming folders of the machine."""

import json

import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config import schema
from uni_moe_jax.export import description
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.train import workdir


def _provenance(folder, files=None, **fields):
  c = tiny.config('shape', data_dir='/home/me/prepared')
  for section, changes in fields.items():
    for name, value in changes.items():
      c[section][name] = value
  folder = folder / 'mine'
  workdir.claim_workdir(folder, c, 'print')
  for name, content in (files or {}).items():
    (folder / name).write_text(json.dumps(content))
  return workdir.provenance(folder, 7)


def test_a_run_from_scratch_is_its_own_origin(tmp_path):
  provenance = _provenance(tmp_path, {'run.json': {'commit': 'abc'}})
  assert provenance['name'] == 'mine' and provenance['step'] == 7 and provenance['seed'] == 0
  assert provenance['data (fingerprint)'] == 'print'
  assert provenance['trained by commit'] == 'abc' and not {'started from', 'converted from'} & set(provenance)


def test_a_warm_started_run_names_the_run_it_started_from(tmp_path):
  provenance = _provenance(tmp_path, train={'init': '/home/me/runs/quickstart'})
  assert provenance['started from'] == 'quickstart'


def test_a_converted_checkpoint_is_named_with_its_checksum(tmp_path):
  provenance = _provenance(tmp_path, {'conversion.json': {'checkpoint': '/home/me/model.pth', 'sha256': '12ab'}})
  assert provenance['converted from'] == 'model.pth (sha256 12ab)' and provenance['trained by commit'] == 'unknown'


def test_a_run_that_starts_from_an_export_compares_its_classes_with_those_of_the_exported_run(tmp_path):
  workdir.claim_workdir(tmp_path / 'mine', tiny.config('shape'), 'print', class_digests={'shapes': '12ab'})
  workdir.write_config(tmp_path, workdir.provenance(tmp_path / 'mine', 7))
  assert workdir.class_digests(tmp_path) == {'shapes': '12ab'}


def test_files_and_folders_are_reduced_to_their_names(tmp_path):
  provenance = _provenance(
      tmp_path, tokenizer={'merges_path': '/home/me/merges.txt.gz', 'path': '/home/me/tokenizer.model'},
      train={'init': '/home/me/runs/quickstart'}, target_sets={
          'shapes': config_lib.target_set('file:/home/me/names.tsv', family='names'),
          'colors': config_lib.target_set(('file:a/red', 'b/c'), family='names')})
  assert {name: s['entries'] for name, s in provenance['config']['target_sets'].items()} == {
      'shapes': 'file:names.tsv', 'colors': ['file:a/red', 'b/c']}
  assert provenance['config']['data']['dir'] == 'prepared'
  assert provenance['config']['tokenizer']['merges_path'] == 'merges.txt.gz'
  assert '/home/me' not in json.dumps(provenance)


@pytest.mark.parametrize('section, field', [
    ('data', 'dir'), ('data', 'cache_dir'), ('tokenizer', 'path'), ('tokenizer', 'merges_path'), ('train', 'init')])
def test_every_path_is_reduced_to_its_name_unless_it_is_the_default(tmp_path, section, field):
  default = config_lib.base()[section][field]
  provenances = [_provenance(tmp_path / str(i), **{section: {field: value}})
                 for i, value in enumerate(('/home/me/secret/last', default))]
  assert [p['config'][section][field] for p in provenances] == ['last', default]
  assert '/home/me' not in json.dumps(provenances[0])


def test_the_fields_that_the_schema_declares_as_paths_are_those_above():
  assert set(schema.PATHS) == {
      ('data', 'dir'), ('data', 'cache_dir'), ('tokenizer', 'path'), ('tokenizer', 'merges_path'), ('train', 'init')}


def test_a_task_has_the_preprocessing_of_its_evaluation():
  task = small_model.task_spec('video_classification', crop='jittered_crop', frame_stride=32.0)
  entry = description._task(ExportedTask(task, 4), {}, small_model.spec())
  assert (entry['num_frames'], entry['frame_stride'], entry['crop']) == (4, 32.0, 'jittered_crop')
