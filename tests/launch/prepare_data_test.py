"""launch/prepare_data.py turns a TFDS dataset into a source, without network access here."""

import shlex
import socket
import types
import urllib.request

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds

from tests.helpers import in_process
from tests.helpers.processes import ROOT
from tests.stress import injected_faults
from uni_moe_jax.cli import shipped
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.utils import exit_codes

_SIZES = {'train': 7, 'test': 3}
_CLASSES = ('bad', 'good')


class TinyReviews(tfds.core.GeneratorBasedBuilder):
  """Text i of a split has class i modulo 2. TFDS registers the builder as tiny_reviews."""
  VERSION = tfds.core.Version('1.2.0')

  def _info(self):
    features = tfds.features
    return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(
        {'text': features.Text(), 'label': features.ClassLabel(names=list(_CLASSES))}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split, size) for split, size in _SIZES.items()}

  def _generate_examples(self, split, size):
    for i in range(size):
      yield i, {'text': f'{split} {i}', 'label': i % 2}


def test_the_command_in_the_error_for_a_missing_source_prepares_it(tmp_path, capsys):
  with pytest.raises(FileNotFoundError) as missing:
    file_dataset.load('tfds:tiny_reviews', tmp_path, 'train')
  _, command = str(missing.value).split('prepare it: uni-moe ')
  name, *arguments = shlex.split(command)
  assert (name, arguments) == ('prepare-data', ['--tfds=tiny_reviews', f'--data_dir={tmp_path}'])

  assert in_process.run(shipped.scripts()[name], *arguments) == 0
  [output] = [line for line in capsys.readouterr().out.splitlines() if line.startswith('tiny_reviews/1.2.0: ')]
  sizes = set(output.removeprefix('tiny_reviews/1.2.0: ').split(', '))
  assert sizes == {f'{split} {size}' for split, size in _SIZES.items()}

  for split, size in _SIZES.items():
    dataset = file_dataset.load('tfds:tiny_reviews', tmp_path, split)
    assert (dataset.size, dataset.classes) == (size, {'label': _CLASSES})
    records = dataset.read(np.arange(size))
    assert {r['text'] for r in records} == {f'{split} {i}' for i in range(size)}
    assert all(r['label'] == _CLASSES[int(r['text'].split()[1]) % 2] for r in records)
    assert dataset.read(np.array([2, 0])) == [records[2], records[0]]

  assert in_process.run(shipped.scripts()[name], *arguments) == 0  # again


class RemoteReviews(TinyReviews):
  """Is downloaded from a host. TFDS registers it as remote_reviews."""
  url_infos = {'https://reviews.example/reviews.zip': tfds.core.download.checksums.UrlInfo(9, '0' * 64, 'reviews.zip')}

  def _split_generators(self, dl_manager):
    if self.url_infos:
      raise requests.ConnectionError('the host is gone\nand more')
    return super()._split_generators(dl_manager)


class ManualReviews(TinyReviews):
  """Is downloaded by the user. TFDS registers it as manual_reviews."""
  MANUAL_DOWNLOAD_INSTRUCTIONS = """
  Register at https://reviews.example,
  and get reviews.tar.
  """

  def _split_generators(self, dl_manager):
    assert (dl_manager.manual_dir / 'reviews.tar').exists(), 'reviews.tar is missing\nand more'
    return super()._split_generators(dl_manager)


def _prepare(name, tmp_path, capsys):
  """(exit code, what the command prints, its standard error)"""
  code = in_process.run(ROOT / 'launch/prepare_data.py', f'--tfds={name}', f'--data_dir={tmp_path}')
  printed = capsys.readouterr()
  return code, printed.out, [line for line in printed.err.splitlines() if line.startswith(('error', 'Traceback'))]


@pytest.fixture(name='network')
def _network(monkeypatch):
  """The hosts that were tried, whether they answer, and the proxies that are set."""
  network = types.SimpleNamespace(tried=[], answers=False, proxies={'no': 'localhost'})

  def connect(address, timeout):
    if network.answers:
      return socket.socket()
    network.tried.append((address, timeout))
    raise socket.gaierror(-2, 'Name or service not known')

  monkeypatch.setattr(socket, 'create_connection', connect)
  monkeypatch.setattr(urllib.request, 'getproxies', lambda: network.proxies)
  return network


def test_without_network_a_dataset_ends_in_one_sentence_before_tfds_tries(network, tmp_path, capsys):
  code, _, errors = _prepare('remote_reviews', tmp_path, capsys)
  assert code == exit_codes.ERROR and network.tried == [(('reviews.example', 443), 5.0)]
  assert errors == [
      'error: tfds:remote_reviews cannot be downloaded (reviews.example cannot be reached: [Errno -2] Name or service '
      f'not known); prepare it on a machine with network and copy {tmp_path}/tfds/remote_reviews.']


@pytest.mark.parametrize('case', ['a host answers', 'a proxy', 'a file was downloaded', 'a file in the manual folder'])
def test_where_the_network_may_not_be_needed_tfds_tries(case, network, tmp_path, capsys):
  if case == 'a host answers':
    network.answers = True
  elif case == 'a proxy':
    network.proxies = {'https': 'http://proxy.example'}
  else:
    [(url, info)] = RemoteReviews.url_infos.items()
    downloads = tmp_path / 'tfds/downloads'
    path = (downloads / 'manual/reviews.zip' if 'manual' in case else
            downloads / tfds.core.download.resource.get_dl_fname(url, info.checksum))
    path.parent.mkdir(parents=True)
    path.touch()
  code, _, errors = _prepare('remote_reviews', tmp_path, capsys)
  assert code == exit_codes.ERROR and not network.tried
  assert errors == ['error: tfds:remote_reviews cannot be downloaded (the host is gone); prepare it on a machine with '
                    f'network and copy {tmp_path}/tfds/remote_reviews.']


def test_archives_that_the_user_must_download_are_named(tmp_path, capsys):
  manual = tmp_path / 'tfds/downloads/manual'
  code, _, [error] = _prepare('manual_reviews', tmp_path, capsys)
  assert code == exit_codes.USAGE
  assert error == (f'error: tfds:manual_reviews must be downloaded by you: put its archives into {manual} (Register at '
                   'https://reviews.example, and get reviews.tar).')
  manual.mkdir(parents=True)
  (manual / 'other.tar').touch()
  code, _, [error] = _prepare('manual_reviews', tmp_path, capsys)
  assert code == exit_codes.USAGE
  assert error == (f'error: tfds:manual_reviews: {manual} does not contain its archives (reviews.tar is missing). '
                   'Register at https://reviews.example, and get reviews.tar.')
  (manual / 'reviews.tar').touch()
  assert _prepare('manual_reviews', tmp_path, capsys)[0] == exit_codes.FINISHED
  (manual / 'reviews.tar').unlink()
  code, out, errors = _prepare('manual_reviews', tmp_path, capsys)  # it is prepared: no archive is needed
  assert code == exit_codes.FINISHED and 'train 7' in out and not errors


class DefectReviews(TinyReviews):
  """Cannot be read. TFDS registers it as defect_reviews."""

  def _generate_examples(self, split, size):
    return {}['defect']


def test_another_error_of_a_builder_is_not_taken_for_one_of_the_network(tmp_path, capsys):
  with pytest.raises(KeyError, match='defect') as error:
    _prepare('defect_reviews', tmp_path, capsys)
  assert error.value.__cause__ is not error.value  # a circle would not end when causes are followed


def test_without_network_a_prepared_dataset_is_found(network, tmp_path, capsys, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(RemoteReviews, 'url_infos', None)
    assert _prepare('remote_reviews', tmp_path, capsys)[0] == exit_codes.FINISHED
  assert _prepare('remote_reviews', tmp_path, capsys)[0] == exit_codes.FINISHED and not network.tried


def test_where_folders_cannot_be_renamed_nothing_is_prepared(tmp_path, capsys, monkeypatch):
  injected_faults.no_folder_renames(monkeypatch.setattr)
  (tmp_path / 'texts').mkdir()
  script, data_dir = ROOT / 'launch/prepare_data.py', f'--data_dir={tmp_path / "data"}'
  unreadable = f'--input={tmp_path}/texts', '--name=mine'
  for arguments in ('--num_workers=1',), ('--tfds=tiny_reviews',), unreadable:
    assert in_process.run(script, data_dir, *arguments) == exit_codes.USAGE
    error = capsys.readouterr().err
    assert error.startswith(f'error: {data_dir}: folders cannot be renamed there') and error.count('\n') == 1
  assert not (tmp_path / 'data').exists()
