"""Training on a user's own data: the guide's commands, and several small datasets together."""

import contextlib
import json
import re
import shlex
import shutil

import jax
import pytest

from tests.data import own_files
from tests.helpers import in_process, saved_run
from tests.helpers.processes import ROOT
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.cli import shipped
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.eval import headline, suite
from uni_moe_jax.io import storage
from uni_moe_jax.train import loop
from uni_moe_jax.utils.errors import UsageError

# A small model and few steps; commands and all other fields are those of the guide.
_SMALL = ('model.num_layers=1', 'model.width=16', 'model.num_heads=2', 'model.mlp_dim=16', 'model.image_size=16',
          'moe.num_experts=2', 'train.steps=2', 'train.log_every=1')


@pytest.mark.nightly
def test_the_commands_of_the_guide_print_a_retrieval_result(tmp_path, monkeypatch, capfd):
  guide = (ROOT / 'docs/guides/data.md').read_text()
  commands = [shlex.split(line)[1:] for line in guide.split('```bash\n')[1].split('```')[0].splitlines()]
  assert [name for name, *_ in commands] == ['prepare-data', 'train', 'evaluate']
  own_files.write_captioned_images(tmp_path / 'photos', 40)
  monkeypatch.setenv('HOME', str(tmp_path))  # the default data directory is below it
  outputs = []
  for name, *arguments in commands:
    small = [f'--config.{field}' for field in _SMALL] if any(a.startswith('--config=') for a in arguments) else []
    with contextlib.chdir(tmp_path):
      assert in_process.run(shipped.scripts()[name], *arguments, *small) == 0, capfd.readouterr().err
    outputs.append(capfd.readouterr().out)
  # Forty images with two captions each, every fifth in the test split.
  assert 'pets 1.0.0: train 32, test 8' in outputs[0] and 'captions (texts)' in outputs[0]
  [row] = [line for line in outputs[2].splitlines() if 'i2t_R@1' in line.split()]
  assert row.split()[:2] == ['pets', 'retrieval'] and (tmp_path / 'runs/pets/evaluation.json').exists()
  assert "nearest neighbor's name" in row


@pytest.mark.nightly
@pytest.mark.parametrize('scheme', ['gcs', 's3'])
def test_data_in_a_bucket_gives_the_log_and_the_scores_of_data_in_a_folder(scheme, request, tmp_path, monkeypatch):
  bucket = f'{request.getfixturevalue(scheme).address}/own'
  [guide] = re.findall(r'^## Data in a bucket\n.*?```bash\n(.*?)```', (ROOT / 'docs/guides/data.md').read_text(),
                       re.MULTILINE | re.DOTALL)
  guide += 'uni-moe evaluate --workdir=runs/pets'
  photos = own_files.write_captioned_images(tmp_path / 'photos', 40)
  for path in photos.rglob('*.*'):
    storage.write_bytes(storage.path(bucket) / f'photos/{path.relative_to(photos)}', path.read_bytes())
  monkeypatch.setenv('HOME', str(tmp_path))  # the default cache is below it
  results, caches, commands = [], [], guide.splitlines()
  for name, source, data in (('bucket', f'{bucket}/photos', f'{bucket}/data'), ('folder', photos, tmp_path / 'data')):
    (tmp_path / name).mkdir()
    for line in commands:
      line = line.replace('gs://photos/pets', str(source)).replace('gs://lab/data', str(data))
      _, command, *arguments = shlex.split(line)
      small = [f'--config.{field}' for field in _SMALL] if any(a.startswith('--config=') for a in arguments) else []
      with contextlib.chdir(tmp_path / name):
        assert in_process.run(shipped.scripts()[command], *arguments, *small) == 0, (line, request)
    pets = tmp_path / name / 'runs/pets'
    results.append((saved_run.lines(pets), json.loads((pets / 'evaluation.json').read_text())))
    caches.append([*tmp_path.rglob('buckets')])
    for cache in caches[-1]:
      shutil.rmtree(cache)
  assert results[0] == results[1] and len(results[0][0]) == 2
  assert caches[0] and not caches[1]


def _own(arg: str):
  return cli.config_from(f'own:{arg}', [])


def test_missing_data_names_the_form_for_another_directory(tmp_path):
  with pytest.raises(UsageError, match='own:gone is not in .* another data directory: sources=DIRECTORY/own/gone[.]'):
    _own('sources=gone')
  with pytest.raises(UsageError, match='own:gone is not in ((?!DIRECTORY).)*$'):
    _own(f'sources={tmp_path}/own/gone')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Captioned images with odd rows, a folder by class, videos, and pairs of texts."""
  root, data = tmp_path_factory.mktemp('in'), tmp_path_factory.mktemp('data')
  own_files.append_odd_rows(own_files.write_captioned_images(root / 'photos', 60))
  prepare.prepare(root / 'photos', data, 'photos', max_corrupt_fraction=0.5)
  for split, count in (('train', 12), ('test', 3)):
    for i in range(count):
      color = list(own_files.COLORS)[i % 3]
      own_files.write_image(root / 'folder' / split / color / f'{i}.JPG', color, count + i)  # no image twice
  prepare.prepare(root / 'folder', data, 'folder')
  own_files.write_videos(root / 'videos', count=12)
  prepare.prepare(root / 'videos', data, 'videos', test_fraction=0.3)
  prepare.prepare(own_files.write_text_pairs(root / 'pairs'), data, 'pairs')
  return data


def _shrink(c):
  c.model.update(dict(num_layers=2, width=32, num_heads=2, mlp_dim=32, image_size=16, patch_size=8))
  c.moe.num_experts = 2
  c.tokenizer.vocab_size = 60
  c.train.update(dict(steps=30, log_every=10, checkpoint_every=100))
  for t in c.tasks.values():
    t.update(dict(batch_size=4, max_len=t.max_len and 16))
  if 'photos_retrieval' in c.tasks:
    # With 16 tokens some captions would be truncated to equal texts.
    c.tasks.photos_retrieval.update(dict(batch_size=16, max_len=32))
  return c


def _evaluated(workdir, c):
  run, predictor, _ = saved_run.load(c, workdir)
  return suite.evaluate(run.plan, run.data, predictor, 1, workdir)


@pytest.mark.nightly
def test_several_sources_are_trained_together_and_evaluated(data, tmp_path):
  sources = '+'.join(f'{data}/own/{name}' for name in ('photos', 'folder', 'videos', 'pairs'))
  c = _shrink(_own(f'sources={sources}'))
  assert set(c.tasks) == {
      'photos_retrieval', 'photos_caption', 'photos_color', 'folder_label', 'videos_label', 'pairs_label'}
  assert loop.train(c, str(tmp_path / 'run'), jax.devices()[:1]) == loop.FINISHED
  rows = _evaluated(tmp_path / 'run', c)
  print(headline.table(rows))
  scores = {(r['evaluator'], r['metric']): r for r in rows}
  # Twelve test images with two captions each.
  assert scores['photos retrieval', 'i2t_R@1']['count'] == 12
  assert scores['photos retrieval', 't2i_R@1']['count'] == 24
  # Neither of the two correct ones is among five of 24: 22 choose 5 of 24 choose 5.
  assert scores['photos retrieval', 'i2t_R@5']['chance'] == pytest.approx(1 - 19 * 18 / (24 * 23))
  assert {e for e, _ in scores} == {'photos retrieval', 'photos caption', 'photos color', 'folder label',
                                    'videos label', 'pairs label'}
  fitted = {'photos color': {'nearest neighbor', 'logistic regression'}, 'videos label': {'one frame', 'all frames'},
            'pairs label': {'tf-idf'}}
  for name, baselines in fitted.items():
    assert scores[name, 'top-1']['baselines'].keys() == {'majority', *baselines}
  assert scores['photos color', 'top-1']['baselines']['nearest neighbor'] == 1  # of images of one color each
  assert scores['photos caption', 'CIDEr-D']['baselines']["nearest neighbor's name"] > 0
  samples = json.loads((tmp_path / 'run/samples.json').read_text())
  assert samples['videos label'][0]['frames'] and samples['photos caption'][0]['image']

  # The run is adapted to one source by prompts; tokenizer and model are those of the run.
  tuned = _own(f'sources={data}/own/folder,run={tmp_path}/run,mode=prompts')
  tuned.train.update(dict(steps=2, log_every=1))
  tuned.tasks.folder_label.batch_size = 4
  assert loop.train(tuned, str(tmp_path / 'tuned'), jax.devices()[:1]) == loop.FINISHED
  untuned = _own(f'sources={data}/own/folder,run={tmp_path}/run,mode=zero_shot')
  assert not [t for t in untuned.tasks.values() if t.batch_size]
