"""A work directory belongs to one config."""

import contextlib
import errno
import json
import subprocess
import sys

import pytest

from tests import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config import validate
from uni_moe_jax.train import workdir


def _claimed(tmp_path):
  c = tiny.config('shape', data_dir='/somewhere')
  workdir.claim_workdir(tmp_path, c, 'print')
  return c


def test_the_same_config_comes_back(tmp_path):
  c = _claimed(tmp_path)
  workdir.claim_workdir(tmp_path, c, 'print')
  assert workdir.load_config(tmp_path).to_dict() == c.to_dict()


@pytest.mark.parametrize('section, field, value', [
    ('train', 'log_every', 7), ('data', 'dir', '/elsewhere'), ('train', 'interference_every', 5),
    ('train', 'interference_parameters', 'qkv'), ('train', 'hang_timeout', 9.), ('train', 'best_metric', 'loss/total')])
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


def test_other_files_beside_the_data_are_refused_where_the_run_knew_them(tmp_path):
  c = tiny.config('shape', data_dir='/somewhere')
  workdir.claim_workdir(tmp_path, c, 'print', inputs='these')
  for inputs in ('these', None):
    workdir.claim_workdir(tmp_path, c, 'print', inputs=inputs)
  with pytest.raises(ValueError, match='file of class names'):
    workdir.claim_workdir(tmp_path, c, 'print', inputs='others')
  path = tmp_path / workdir.CONFIG_FILE  # as an earlier version wrote it
  path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != 'inputs'}))
  workdir.claim_workdir(tmp_path, c, 'print', inputs='others')


def test_another_tokenizer_than_the_runs_is_refused_by_every_process(tmp_path):
  file = tmp_path / 'a.model'
  file.write_bytes(b'pieces')
  workdir.keep_tokenizer(tmp_path, file, writes=False)
  assert not (tmp_path / 'tokenizer.model').exists()
  for _ in range(2):
    workdir.keep_tokenizer(tmp_path, file)
  file.write_bytes(b'other pieces')
  for writes in (True, False):
    with pytest.raises(ValueError, match='was trained with another tokenizer than .*a.model'):
      workdir.keep_tokenizer(tmp_path, file, writes)
  assert (tmp_path / 'tokenizer.model').read_bytes() == b'pieces'


def test_published_merges_may_be_packed_in_another_way(tmp_path):
  file = tmp_path / 'merges.gz'
  for content in (b'packed', b'packed again'):
    file.write_bytes(content)
    workdir.keep_tokenizer(tmp_path, file)


def test_a_check_without_data_makes_nothing(tmp_path):
  workdir.claim_workdir(tmp_path / 'new', tiny.config('shape'))
  assert not (tmp_path / 'new').exists()


def test_a_folder_without_a_run_names_the_command(tmp_path):
  with pytest.raises(FileNotFoundError, match='holds no run .*launch/train.py'):
    workdir.load_config(tmp_path)


def _written_before(tmp_path):
  """A config whose file lacks fields of a section, of every task, of a set and of an evaluator: they are younger."""
  c = tiny.config('shape', 'pair', data_dir='/somewhere')
  c.evaluators.top = config_lib.evaluator('classification', 'shape', split='test')
  workdir.claim_workdir(tmp_path, c, 'print')
  path = tmp_path / workdir.CONFIG_FILE
  written = json.loads(path.read_text())
  fields = written['config']
  for task in fields['tasks'].values():
    del task['sampling']
  del fields['model']['video_mean'], fields['train']['twins'], fields['mesh']
  del fields['sets']['shapes']['samples'], fields['evaluators']['top']['number']
  del fields['model']['prompts'], fields['model']['prefix_prompts'], fields['sets']['shapes']['label_prompts']
  fields['optim']['rules'] = [r for r in fields['optim']['rules'] if 'prompts/' not in r[0]]
  fields['model']['prefix'] = 'spe'  # as it was called before a word could have this name
  path.write_text(json.dumps(written))
  return c


def test_a_config_of_an_earlier_version_gets_the_defaults_of_younger_fields(tmp_path):
  c = _written_before(tmp_path)
  loaded = workdir.load_config(tmp_path)
  assert (loaded.model.video_mean, loaded.train.mask_duplicate_texts, loaded.tasks.pair.sampling_weight) == ((), 'masked', 0.)
  assert loaded.to_dict() == c.to_dict()
  assert validate.resolve(loaded) == validate.resolve(c)


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
  c = _written_before(tmp_path)
  for fingerprint in ('print', None):
    workdir.claim_workdir(tmp_path, c, fingerprint)


def test_rules_of_an_earlier_run_with_a_head_stay_as_they_were(tmp_path):
  # There the rule that prompts and heads have got since then would change what trains.
  c = _written_before(tmp_path)
  path = tmp_path / workdir.CONFIG_FILE
  written = json.loads(path.read_text())
  written['config']['tasks']['shape']['head'] = True
  path.write_text(json.dumps(written))
  assert len(workdir.load_config(tmp_path).optim.param_groups) == len(c.optim.param_groups) - 1


@pytest.mark.parametrize('change, said', [
    (lambda c: c.train.update(mask_duplicate_texts=False), "train.mask_duplicate_texts: 'masked' → 'negatives'"),
    (lambda c: c.tasks.pair.update(sampling_weight=2.), 'tasks.pair.sampling_weight: 0.0 → 2.0'),
    (lambda c: c.model.update(video_mean=(.5,)), r'model.video_mean: \[\] → \[0.5\]')
], ids=['section', 'task', 'tuple'])
def test_a_run_of_an_earlier_version_goes_on_with_the_defaults_only(tmp_path, change, said):
  c = _written_before(tmp_path)
  change(c)
  with pytest.raises(ValueError, match=f'belongs to a run with another config .*{said}'):
    workdir.claim_workdir(tmp_path, c, 'print')


def _begun_with(tmp_path, **changed):
  _claimed(tmp_path)
  path = tmp_path / workdir.CONFIG_FILE
  content = json.loads(path.read_text())
  content['versions'].update(changed)
  path.write_text(json.dumps(content))


@pytest.mark.parametrize('harm', [
    {'versions': 3}, {'versions': {'jax': 3}}, {'versions': {'jax': None}}, {'versions': {'jax': '0.1'}, 'earlier_versions': 3}])
def test_versions_that_are_no_texts_are_damage(tmp_path, harm):
  _begun_with(tmp_path)
  path = tmp_path / workdir.CONFIG_FILE
  path.write_text(json.dumps({**json.loads(path.read_text()), **harm}))
  with pytest.raises(ValueError, match=r'config.json is damaged \(its versions are no texts by package\)'):
    workdir.check_versions(tmp_path, accept=True)


def test_the_same_versions_go_on_without_a_word(tmp_path, capsys):
  workdir.check_versions(tmp_path)  # a new folder
  _begun_with(tmp_path)
  workdir.check_versions(tmp_path)
  assert capsys.readouterr() == ('', '')


def test_another_release_of_a_package_is_refused_with_both_numbers_and_what_to_do(tmp_path):
  _begun_with(tmp_path, jax='0.9.1', numpy=workdir.versions()['numpy'] + '.1')
  said = (r"jax: 0.9.1 → .*, numpy: .*pip install 'jax==0.9.1'\), start a new run from its parameters "
          r"\(config.train.init='.*'\), or go on .* --accept_versions")
  with pytest.raises(ValueError, match=said):
    workdir.check_versions(tmp_path)


def test_a_later_fix_of_the_same_release_is_noted(tmp_path, capsys):
  _begun_with(tmp_path, numpy=workdir.versions()['numpy'] + '.1')
  workdir.check_versions(tmp_path)
  assert 'note: workdir' in (said := capsys.readouterr().err) and 'numpy: ' in said and 'last digits' in said


def test_versions_that_are_accepted_are_the_runs_from_then_on(tmp_path, capsys):
  _begun_with(tmp_path, jax='0.9.1')
  workdir.check_versions(tmp_path, accept=True)
  workdir.check_versions(tmp_path)
  assert capsys.readouterr() == ('', '')
  content = json.loads((tmp_path / workdir.CONFIG_FILE).read_text())
  assert content['versions'] == workdir.versions() and content['earlier_versions'][0]['jax'] == '0.9.1'
  workdir.claim_workdir(tmp_path, tiny.config('shape', data_dir='/somewhere'), 'print')


_HOLDS = '''
import contextlib, pathlib, sys, time
from uni_moe_jax.train import workdir
with contextlib.ExitStack() as until:
  print(workdir.lock(sys.argv[1], until), flush=True)
  time.sleep(60)
'''


def test_a_work_directory_is_that_of_one_process_until_it_ends_or_dies(tmp_path):
  def free():
    with contextlib.ExitStack() as until:
      return workdir.lock(tmp_path, until)

  assert free() and free()  # who closes it gives it back
  with subprocess.Popen([sys.executable, '-c', _HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'True\n'
    assert not free()
    process.kill()
  assert free()


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(workdir.fcntl, 'flock', no_locks)
  with contextlib.ExitStack() as until:
    assert workdir.lock(tmp_path, until)
  assert 'cannot be locked (No locks available); see to it that no other process trains there' in capsys.readouterr().err
