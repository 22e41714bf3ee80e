"""A work directory belongs to one config."""

import json
import shlex

import numpy as np
import pytest

import uni_moe_jax
from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.train import workdir
from uni_moe_jax.train.checkpoint import Checkpoints


def _claimed(tmp_path):
  c = tiny.config('shape', data_dir='/somewhere')
  workdir.claim_workdir(tmp_path, c, 'print')
  return c


def _content(tmp_path):
  return json.loads((tmp_path / workdir.CONFIG_FILE).read_text())


def _rewrite(tmp_path, **changed):
  """Changes fields of config.json; None deletes one."""
  content = {k: v for k, v in {**_content(tmp_path), **changed}.items() if k not in changed or v is not None}
  (tmp_path / workdir.CONFIG_FILE).write_text(json.dumps(content))


def test_a_fraction_overrides_a_whole_number_in_a_field_of_floats_also_in_a_stored_run(tmp_path):
  c = _claimed(tmp_path)
  c.tasks.shape = config_lib.task('image_classification', 'shapes', batch_size=4, loss_weight=2)
  c.tasks.shape.loss_weight = 0.5
  content = _content(tmp_path)['config']
  content['tasks']['shape']['loss_weight'] = content['optim']['learning_rate'] = 2
  _rewrite(tmp_path, config=content)
  stored = workdir.load_config(tmp_path)
  stored.tasks.shape.loss_weight = stored.optim.learning_rate = 0.5
  assert type(stored.tasks.shape.batch_size) is int


@pytest.mark.parametrize('section, field, value', [
    ('train', 'log_every', 7), ('data', 'dir', '/elsewhere'), ('train', 'hang_timeout', 9.),
    ('train', 'best_metric', 'loss/total'), ('moe', 'gmm', 'megablox'), ('model', 'attention_impl', 'splash')])
def test_some_fields_may_change(tmp_path, section, field, value):
  c = _claimed(tmp_path)
  c[section][field] = value
  workdir.claim_workdir(tmp_path, c, 'print')


def test_a_run_that_continues_records_what_may_change_and_one_that_is_only_checked_does_not(tmp_path):
  c = _claimed(tmp_path)
  before = _content(tmp_path)
  c.train.best_metric, c.data.dir, c.mesh.data = 'loss/total', '/elsewhere', 1
  c.evaluators.shapes = config_lib.evaluator('classification', 'shape', split='train')
  workdir.check_workdir(tmp_path, c, extends=True)
  workdir.claim_workdir(tmp_path, c, 'print')
  workdir.claim_workdir(tmp_path, c, 'print', extends=True, writes=False)
  assert _content(tmp_path) == before
  workdir.claim_workdir(tmp_path, c, 'print', extends=True)
  assert workdir.load_config(tmp_path).to_dict() == c.to_dict()
  assert {k: v for k, v in _content(tmp_path).items() if k != 'config'} == {
      **{k: v for k, v in before.items() if k != 'config'}, 'extended': []}


def test_the_evaluator_of_the_best_metric_keeps_its_protocol_once_checkpoints_have_its_score(tmp_path):
  c = tiny.config('shape', data_dir='/somewhere')
  c.evaluators.shapes = config_lib.evaluator(
      'classification', 'shape', split='train', num_examples=100, during_training=True)
  c.train.update(evaluate_every=c.train.checkpoint_every, best_metric='eval/shapes/top-1')
  workdir.claim_workdir(tmp_path, c, 'print')
  c.evaluators.shapes.num_examples = 50
  workdir.claim_workdir(tmp_path, c, 'print', extends=True)  # nothing is scored yet
  with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
    checkpoints.save(1, {'params': {'a': np.zeros(1)}}, {'eval/shapes/top-1': .97})
  c.evaluators.shapes.batch_size = 7  # which changes no score
  workdir.claim_workdir(tmp_path, c, 'print', extends=True)
  c.evaluators.shapes.num_examples = 0
  with pytest.raises(ValueError, match=r"best_metric='eval/shapes/top-1' of another .* \(num_examples: 50 → 0\)"):
    workdir.claim_workdir(tmp_path, c, 'print', extends=True)
  c.evaluators.all = c.evaluators.shapes.copy_and_resolve_references()
  del c.evaluators.shapes
  c.train.best_metric = 'eval/all/top-1'
  workdir.claim_workdir(tmp_path, c, 'print', extends=True)


def test_the_evaluator_of_the_best_metric_keeps_its_data_once_checkpoints_have_its_score(tmp_path):
  c = tiny.config('shape', data_dir='/somewhere')
  for name in ('shapes', 'others'):
    c.evaluators[name] = config_lib.evaluator('classification', 'shape', split='validation', during_training=True)
  c.train.update(evaluate_every=c.train.checkpoint_every, best_metric='eval/shapes/top-1')
  claim = lambda **evaluations: workdir.claim_workdir(tmp_path, c, 'print', extends=True, evaluations=evaluations)
  claim(shapes='a', others='a')
  claim(shapes='b', others='a')  # nothing is scored yet

  def save(step, **evaluation_data):
    with Checkpoints(tmp_path, max_to_keep=1, evaluation_data=evaluation_data) as checkpoints:
      checkpoints.save(step, {'params': {'a': np.zeros(1)}}, {'eval/shapes/top-1': .97, 'eval/others/top-1': .97})

  save(1, shapes='b', others='a')
  claim(shapes='b', others='b')  # by which no checkpoint is chosen
  refused = lambda: pytest.raises(ValueError, match=r'of another evaluator \(its data, by the fingerprint\), so scores')
  with refused():
    claim(shapes='a', others='b')
  c.train.best_metric = 'eval/others/top-1'  # whose score is on the data before
  with refused():
    claim(shapes='b', others='b')
  claim(shapes='b', others='a')
  save(2, shapes='b', others='b')  # the one that was scored on the data before is gone
  claim(shapes='b', others='b')
  with refused():
    claim(shapes='b', others='a')
  with Checkpoints(tmp_path, max_to_keep=1, evaluation_data={'others': 'a'}) as checkpoints:
    checkpoints.add_metrics(2, {'eval/others/top-1': .98})
  claim(shapes='b', others='a')
  save(3)  # without digests, as of an earlier version
  claim(shapes='b', others='b')


def test_a_run_that_continues_unchanged_writes_nothing(tmp_path):
  c = _claimed(tmp_path)
  def written():
    status = (tmp_path / workdir.CONFIG_FILE).stat()
    return status.st_ino, status.st_mtime_ns  # not the time of access: the claim reads the file

  before = written()
  workdir.claim_workdir(tmp_path, c, 'print', extends=True)
  assert written() == before
  c.train.log_every = 7  # the positive control
  workdir.claim_workdir(tmp_path, c, 'print', extends=True)
  assert written() != before


@pytest.mark.parametrize('section, field, message', [
    ('model', 'width', 'model.width: 16 → 99'), ('train', 'steps', 'train.steps: 6 → 99')])
def test_another_config_is_refused_with_the_field(tmp_path, section, field, message):
  c = _claimed(tmp_path)
  c[section][field] = 99
  for fingerprint in ('print', None):
    with pytest.raises(ValueError, match=f'belongs to a run with another config .*{message}'):
      workdir.claim_workdir(tmp_path, c, fingerprint)


def test_a_run_whose_parent_has_moved_continues_with_the_field_of_the_message(tmp_path):
  """With a checkpoint, which is when the parent is no longer read."""
  c = tiny.config('shape', data_dir='/somewhere')
  c.train.init = "/runs/it's here"
  workdir.claim_workdir(tmp_path, c, 'print')
  c.train.init = '/elsewhere/parent'
  with pytest.raises(ValueError, match='train.init: .*config of that run[.]$'):
    workdir.claim_workdir(tmp_path, c, 'print')
  with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
    checkpoints.save(1, {'params': {'a': np.zeros(1)}}, {})
  with pytest.raises(ValueError) as refused:
    workdir.claim_workdir(tmp_path, c, 'print')
  [c.train.init] = shlex.split(str(refused.value).rpartition('--config.train.init=')[2].removesuffix('.'))
  workdir.claim_workdir(tmp_path, c, 'print')
  c.model.width = 99  # the control: of another field nothing is advised
  with pytest.raises(ValueError, match='config of that run[.]$'):
    workdir.claim_workdir(tmp_path, c, 'print')


def test_other_data_and_other_files_of_the_tokenizer_or_class_names_are_refused(tmp_path):
  c = tiny.config('shape', data_dir='/somewhere')
  workdir.claim_workdir(tmp_path, c, 'print', inputs='these')
  for inputs in ('these', None):
    workdir.claim_workdir(tmp_path, c, 'print', inputs=inputs)
  with pytest.raises(ValueError, match='file of class names'):
    workdir.claim_workdir(tmp_path, c, 'print', inputs='others')
  with pytest.raises(ValueError, match='different data.* a source was prepared again or .*[.] Restore the old data'):
    workdir.claim_workdir(tmp_path, c, 'another print')


def test_another_tokenizer_than_the_runs_is_refused_by_every_process(tmp_path):
  file = tmp_path / 'a.model'
  file.write_bytes(b'pieces')
  workdir.copy_tokenizer(tmp_path, file, writes=False)
  assert not (tmp_path / 'tokenizer.model').exists()
  for _ in range(2):
    workdir.copy_tokenizer(tmp_path, file)
  file.write_bytes(b'other pieces')
  for writes in (True, False):
    with pytest.raises(ValueError, match='the tokenizer of workdir .* differs from .*a.model'):
      workdir.copy_tokenizer(tmp_path, file, writes)
  assert (tmp_path / 'tokenizer.model').read_bytes() == b'pieces'


def test_published_merges_may_be_compressed_differently(tmp_path):
  file = tmp_path / 'merges.gz'
  for content in (b'packed', b'packed again'):
    file.write_bytes(content)
    workdir.copy_tokenizer(tmp_path, file)


def test_a_check_without_data_creates_nothing(tmp_path):
  workdir.check_workdir(tmp_path / 'new', tiny.config('shape'))
  assert not (tmp_path / 'new').exists()


def test_a_folder_without_a_run_names_the_command(tmp_path):
  with pytest.raises(FileNotFoundError, match='holds no run .*uni-moe train'):
    workdir.load_config(tmp_path)


@pytest.mark.parametrize('version, name', [(None, '0.1'), ('0.1.9', '0.1.9'), ('0.3.0', '0.3.0'), ('0.99.0', '0.99.0')])
@pytest.mark.parametrize('read', [
    workdir.load_config, lambda path: workdir.claim_workdir(path, tiny.config('shape', data_dir='/somewhere'), 'print'),
    workdir.check_versions])
def test_a_work_directory_of_another_version_is_refused(tmp_path, version, name, read):
  _claimed(tmp_path)
  _rewrite(tmp_path, uni_moe_jax=version)
  with pytest.raises(ValueError, match=f'was written by uni_moe_jax {name}, and this is {uni_moe_jax.__version__}'):
    read(tmp_path)


def test_a_work_directory_of_a_release_with_the_same_format_is_read(tmp_path):
  _claimed(tmp_path)
  _rewrite(tmp_path, uni_moe_jax='0.4.99')
  workdir.load_config(tmp_path)


def _started_with(tmp_path, **changed):
  _claimed(tmp_path)
  _rewrite(tmp_path, versions={**workdir.versions(), **changed})


@pytest.mark.parametrize('damage', [
    {'versions': 3}, {'versions': {'jax': 3}}, {'versions': {'jax': None}},
    {'versions': {'jax': '0.1'}, 'earlier_versions': 3}])
def test_versions_that_are_not_strings_are_damage(tmp_path, damage):
  _started_with(tmp_path)
  _rewrite(tmp_path, **damage)
  with pytest.raises(ValueError, match=r'config.json is damaged \(its versions are not strings by package\)'):
    workdir.check_versions(tmp_path, allow_mismatch=True)


def test_the_same_versions_continue_silently(tmp_path, capsys):
  workdir.check_versions(tmp_path)  # a new folder
  _started_with(tmp_path)
  workdir.check_versions(tmp_path)
  assert capsys.readouterr() == ('', '')


def test_another_minor_version_of_a_package_is_refused_with_both_versions_and_the_fix(tmp_path):
  _started_with(tmp_path, jax='0.9.1', numpy=workdir.versions()['numpy'] + '.1')
  message = (r"jax: 0.9.1 → .*, numpy: .*pip install 'jax==0.9.1'\), start a new run from its parameters "
             r"\(config.train.init='.*'\), or continue .* --allow_version_mismatch")
  with pytest.raises(ValueError, match=message):
    workdir.check_versions(tmp_path)


def test_another_patch_version_is_noted(tmp_path, capsys):
  _started_with(tmp_path, numpy=workdir.versions()['numpy'] + '.1')
  workdir.check_versions(tmp_path)
  note = capsys.readouterr().err
  assert 'note: workdir' in note and 'numpy: ' in note and 'last digits' in note


def test_of_several_processes_those_that_do_not_write_allow_a_mismatch_and_record_nothing(tmp_path):
  _started_with(tmp_path, jax='0.9.1')
  before = _content(tmp_path)
  workdir.check_versions(tmp_path, allow_mismatch=True, writes=False)
  assert _content(tmp_path) == before


def test_an_allowed_mismatch_records_the_installed_versions(tmp_path, capsys):
  _started_with(tmp_path, jax='0.9.1')
  workdir.check_versions(tmp_path, allow_mismatch=True)
  workdir.check_versions(tmp_path)
  assert capsys.readouterr() == ('', '')
  content = _content(tmp_path)
  assert content['versions'] == workdir.versions() and content['earlier_versions'][0]['jax'] == '0.9.1'
  workdir.claim_workdir(tmp_path, tiny.config('shape', data_dir='/somewhere'), 'print')
