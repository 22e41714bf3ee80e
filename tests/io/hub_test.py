"""A model goes to a stand-in of the Hub and comes back bit for bit; each thing that can be wrong is one sentence."""

import hashlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import hub_server
from uni_moe_jax.io import hub, storage
from uni_moe_jax.utils.errors import RunError, UsageError

pytest.importorskip('huggingface_hub')
_PARAMS = {'a/kernel': np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)}


@pytest.fixture(name='server')
def _server(monkeypatch, tmp_path):
  hub._snapshot.cache_clear()
  with hub_server.running(monkeypatch, tmp_path) as server:
    yield server


@pytest.fixture(name='exported')
def _exported(tmp_path):
  """A folder with what an exported one has for the Hub: a small file, a large one, one in a folder, and the digests."""
  folder = tmp_path / 'exported'
  (folder / 'programs').mkdir(parents=True)
  save_file(_PARAMS, folder / 'params.safetensors')
  (folder / 'README.md').write_text('---\ntags: [jax]\n---\n# Model\n')
  (folder / 'programs/step.stablehlo').write_bytes(bytes(range(256)) * 9)
  names = ('params.safetensors', 'programs/step.stablehlo')
  (folder / 'SHA256SUMS').write_text(''.join(
      f'{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n' for name in names))
  return folder


def _log_in(exported, token=hub_server.TOKEN):
  (exported.parent / 'token').write_text(token)  # see `hub_server.running`


def _pushed(exported) -> str:
  _log_in(exported)
  return hub.push(exported, 'me/model')


def test_parameters_come_back_bit_for_bit_from_a_private_repository(server, exported):
  address = _pushed(exported)
  assert server.repositories['me/model'].private
  assert address == f'hf:me/model@{server.repositories["me/model"].branches["main"]}'
  folder = storage.path('hf:me/model')
  assert folder == storage.path(address) and folder.name == address.partition('@')[2]
  back = load_file(folder / 'params.safetensors')
  assert {name: x.tobytes() for name, x in back.items()} == {name: x.tobytes() for name, x in _PARAMS.items()}
  assert storage.path(f'{address}/programs/step.stablehlo').read_bytes() == bytes(range(256)) * 9


def test_a_revision_is_pinned_to_the_commit_that_it_names_now(server, exported):
  first = _pushed(exported)
  assert hub.pinned('hf:me/model', 'init') == hub.pinned('hf:me/model@main', 'init') == first
  server.repositories['me/model'].commit({'more.txt': b'a newer commit'})
  assert hub.pinned(first, 'init') == first and not (storage.path(first) / 'more.txt').exists()
  hub._snapshot.cache_clear()  # as in the next process
  assert hub.pinned('hf:me/model', 'init') != first
  assert hub.pinned('runs/quickstart', 'init') == 'runs/quickstart'


def test_a_pinned_model_is_used_from_its_copy_without_network(server, exported):
  address = _pushed(exported)
  folder = storage.path(address)
  hub._snapshot.cache_clear()
  server.status = 503
  assert storage.path(address) == folder


def test_a_second_model_replaces_the_first_and_leaves_what_others_added(server, exported):
  old, new = (exported / f'checkpoints/{step}/params' for step in (200, 100))
  old.parent.mkdir(parents=True)
  old.write_bytes(b'of the first model')
  with open(exported / 'SHA256SUMS', 'a') as sums:
    sums.write(f'{hashlib.sha256(old.read_bytes()).hexdigest()}  checkpoints/200/params\n')
  first = _pushed(exported)
  server.repositories['me/model'].commit({'LICENSE': b'by hand'})
  new.parent.mkdir()
  new.write_bytes(b'of the second')
  old.unlink()
  sums = (exported / 'SHA256SUMS').read_text().splitlines()[:-1]
  (exported / 'SHA256SUMS').write_text('\n'.join(
      [*sums, f'{hashlib.sha256(new.read_bytes()).hexdigest()}  checkpoints/100/params\n']))
  files = server.repositories['me/model'].commits[_pushed(exported).partition('@')[2]]
  assert {path for path in files if path.startswith('checkpoints/')} == {'checkpoints/100/params'}
  assert files['LICENSE'] == b'by hand'
  assert files['params.safetensors'] == (exported / 'params.safetensors').read_bytes()
  assert (storage.path(first) / 'checkpoints/200/params').read_bytes() == b'of the first model'  # an older commit


@pytest.mark.parametrize('name, where', [
    ('params.safetensors', 'on the Hub'), ('params.safetensors', 'in the copy'),
    ('programs/step.stablehlo', 'nowhere')])
def test_a_file_that_was_changed_or_is_missing_is_refused(server, exported, name, where):
  address = _pushed(exported)
  repository, changed = server.repositories['me/model'], bytearray((exported / name).read_bytes())
  changed[-1] ^= 1
  if where == 'nowhere':
    del repository.commits[repository.branches['main']][name]
  elif where == 'on the Hub':
    repository.commit({name: bytes(changed)})
    address = 'hf:me/model'
  else:
    (storage.path(address) / name).resolve().write_bytes(changed)
  hub._snapshot.cache_clear()
  with pytest.raises(RunError, match=rf'{name} of me/model differs from SHA256SUMS of commit \w+: it was '):
    storage.path(address, '--model')


def test_a_repository_without_digests_is_no_exported_model(server, exported):
  _pushed(exported)
  repository = server.repositories['me/model']
  del repository.commits[repository.branches['main']]['SHA256SUMS']
  with pytest.raises(UsageError, match='--model: me/model has no SHA256SUMS, so it is no exported model'):
    storage.path('hf:me/model', '--model')


@pytest.mark.parametrize('address, message', [
    ('hf:me/other', r'--model: me/other does not exist, or it is private and .*; check the name, or set HF_TOKEN'),
    ('hf:me/model@v9', r"--model: me/model has no revision 'v9'; give a branch"),
    ('hf:model', r"--model='hf:model' is no address of the Hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"),
    ('hf:me/model/../x', 'is no address of the Hub'), ('hf:me/model@', 'is no address of the Hub')])
def test_wrong_addresses_are_one_sentence(server, exported, address, message):
  _pushed(exported)
  with pytest.raises(UsageError, match=message) as e:
    storage.path(address, '--model')
  assert '\n' not in str(e.value)


def test_reading_a_private_repository_and_writing_need_a_token(server, exported):
  _pushed(exported)
  (exported.parent / 'token').unlink()
  with pytest.raises(UsageError, match='does not exist, or it is private and the token may not read it'):
    storage.path('hf:me/model')
  with pytest.raises(UsageError, match='me/model: the token is missing, has expired or lacks the right; set HF_TOKEN'):
    hub.push(exported, 'me/model')


def test_a_hub_that_does_not_answer_is_one_sentence(server, exported, monkeypatch):
  server.status = 500
  message = rf'train\.init: me/model: {re.escape(server.endpoint)} does not answer, or only with errors, and there'
  with pytest.raises(RunError, match=message):
    storage.path('hf:me/model', 'config.train.init')
  server.status = 0
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  with pytest.raises(RunError, match=message):
    storage.path('hf:me/model', 'config.train.init')


@pytest.mark.parametrize('status, token, error', [(500, hub_server.TOKEN, RunError), (0, 'wrong', UsageError)])
def test_an_upload_that_fails_leaves_the_export_and_names_how_to_upload_it(
    server, exported, tmp_path, status, token, error):
  _log_in(exported, token)
  server.status = status
  folder = exported.rename(tmp_path / 'my model')
  fix = f"remove {folder} before you repeat the command, or upload it by `hf upload me/model '{folder}'`."
  with pytest.raises(error, match=re.escape(fix)) as e:
    hub.push(folder, 'me/model')
  assert '\n' not in str(e.value) and (folder / 'SHA256SUMS').exists()


@pytest.mark.parametrize('name', ['model', 'me/', 'https://hub/me/model', 'hf:me/model', 'me/model/x'])
def test_a_wrong_repository_is_reported_before_anything_is_written(exported, name):
  with pytest.raises(UsageError, match=r'is no repository of the Hub; write OWNER/NAME\.'):
    hub.push(exported, name)


@pytest.mark.parametrize('name', ['me/a--b', 'me/a..b', 'me/model.git', 'me/model-', f'me/{"x" * 97}'])
def test_a_name_that_the_hub_never_gives_is_one_sentence_before_the_export(exported, name):
  with pytest.raises(UsageError, match=rf"--push_to_hub='{name}' is no repository of the Hub: OWNER and NAME have at"):
    hub.check_push(name, exported)
  with pytest.raises(UsageError, match=f"config.train.init='{name}' is no repository"):
    hub.pinned(f'hf:{name}@v1', 'config.train.init')
  hub.check_push(f'me/{"x" * 96}', exported)


def test_a_folder_in_a_bucket_is_not_uploaded():
  with pytest.raises(UsageError, match=r"uploads from a disk, and --output='gs://b/x' is in a bucket; give a local"):
    hub.check_push('me/model', 'gs://b/x')
