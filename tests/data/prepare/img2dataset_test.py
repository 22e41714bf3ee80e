"""What img2dataset writes goes in by the documented command, and its broken images are counted and named."""

import functools
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import venv

import numpy as np
import pytest

from tests.data import own_files
from tests.helpers import processes
from uni_moe_jax.data.shards import file_dataset

pytestmark = pytest.mark.nightly

_NUM_IMAGES = 25
_PACKAGE = 'img2dataset==1.47.0'


@pytest.fixture(name='program', scope='module')
def _program(tmp_path_factory):
  """img2dataset in an environment of its own: its pins exclude versions of ours."""
  folder = pathlib.Path(os.environ.get('IMG2DATASET_ENVIRONMENT') or tmp_path_factory.mktemp('environment'))
  if not (folder / 'bin/img2dataset').exists():
    venv.create(folder, with_pip=True)
    if subprocess.run([folder / 'bin/python', '-m', 'pip', 'install', '-q', _PACKAGE], check=False).returncode:
      pytest.skip(f'{_PACKAGE} cannot be installed')
  return folder / 'bin/img2dataset'


class _Handler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


@pytest.fixture(name='urls')
def _urls(tmp_path):
  """A .csv file of URLs of images on this machine: number 3 is cut, 5 is no image, 7 is missing."""
  folder = tmp_path / 'served'
  for i in range(_NUM_IMAGES):
    own_files.write_image(folder / f'{i}.jpg', 'red', i, (64, 48))
  (folder / '3.jpg').write_bytes((folder / '3.jpg').read_bytes()[:700])
  (folder / '5.jpg').write_bytes(b'no image')
  (folder / '7.jpg').unlink()
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(_Handler, directory=folder))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  lines = [f'http://127.0.0.1:{server.server_port}/{i}.jpg,caption number {i}' for i in range(_NUM_IMAGES)]
  (tmp_path / 'urls.csv').write_text('\n'.join(['url,caption', *lines]))
  yield tmp_path / 'urls.csv'
  server.shutdown()
  server.server_close()


@pytest.mark.parametrize('output_format, name', [
    ('webdataset', '{00000..00002}.tar'), ('parquet', ''), ('webdataset', '')])
def test_what_img2dataset_writes_goes_in_by_the_documented_command(program, urls, tmp_path, output_format, name):
  subprocess.run([
      program, f'--url_list={urls}', '--input_format=csv', '--url_col=url', '--caption_col=caption',
      f'--output_format={output_format}', f'--output_folder={tmp_path}/shards', '--disable_all_reencoding=True',
      '--number_sample_per_shard=10', '--processes_count=1', '--thread_count=2', '--enable_wandb=False'],
      check=True, cwd=tmp_path, env={**os.environ, 'NO_ALBUMENTATIONS_UPDATE': '1'})
  processes.run([
      sys.executable, 'launch/prepare_data.py', f'--input={tmp_path}/shards/{name}', '--name=downloaded',
      f'--data_dir={tmp_path}/data', '--max_corrupt_fraction=0.2', '--num_workers=2'])
  summary = json.loads((tmp_path / 'data/own/downloaded/1.0.0/prepared.json').read_text())
  kept = [i for i in range(_NUM_IMAGES) if i not in (3, 5, 7)]
  records = [record for split, size in summary['splits'].items()
             for record in file_dataset.load('own:downloaded', tmp_path / 'data', split).read(np.arange(size))]
  assert {record['captions']: record['image'] for record in records} == {
      (f'caption number {i}',): (tmp_path / f'served/{i}.jpg').read_bytes() for i in kept}
  assert summary['columns'] == {'captions': 'texts', 'image': 'image'}
  reasons = {'corrupt image', 'not an image', *(['no image'] if output_format == 'parquet' else [])}
  assert {reason: rows['count'] for reason, rows in summary['skipped'].items()} == dict.fromkeys(reasons, 1)
  assert all(rows['first'][0].startswith('00000.') for rows in summary['skipped'].values())
