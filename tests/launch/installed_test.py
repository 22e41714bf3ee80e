"""A wheel in an empty environment and an empty folder: the quickstart for thirty steps, without the repository."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers import processes, served


@pytest.mark.nightly
def test_an_installed_wheel_prepares_trains_evaluates_exports_and_serves_the_quickstart(tmp_path):
  folder, python = tmp_path / 'empty', tmp_path / 'environment/bin/python'
  folder.mkdir()
  env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
  env |= {'HOME': str(tmp_path), 'PATH': f'{python.parent}:{env["PATH"]}'}

  def run(*command, cwd=folder) -> str:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    print(f'{time.perf_counter() - start:4.0f} s  {" ".join(map(str, command[:4]))}', flush=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout

  run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, '.', cwd=processes.ROOT)
  [wheel] = tmp_path.glob('*.whl')
  run(sys.executable, '-m', 'venv', python.parents[1])
  pins = 'constraints-py313.txt' if sys.version_info[:2] == (3, 13) else 'constraints.txt'
  run(python, '-m', 'pip', 'install', '-q', '-c', processes.ROOT / pins, f'{wheel}[serve]')
  assert 'configs' in run('uni-moe', '--help').lower()
  run('uni-moe', 'prepare-data')
  assert 'trained 30 steps' in run('uni-moe', 'train', '--config=quickstart', '--workdir=runs/quickstart',
                                   '--config.train.steps=30', '--compile_separately')
  assert 'top-1' in run('uni-moe', 'evaluate', '--workdir=runs/quickstart')
  assert run('uni-moe', 'report', '--workdir=runs/quickstart').endswith('report.html\n')
  assert 'step 30' in run('uni-moe', 'export', '--workdir=runs/quickstart', '--output=exported', '--num_examples=2')
  assert 'as at export' in run('python', 'exported/example.py')
  with served.started(['uni-moe', 'serve', '--model=exported', '--port=0'], folder, env) as service:
    status, model, _ = service.request('GET', '/model')
    assert status == 200 and b'glyph_class' in model
    image = served.png(np.zeros((32, 32), np.uint8))
    assert len(service.post('/classify', task='glyph_class', image=image, top=3)['answers']) == 3
    service.process.terminate()
    assert service.process.wait(60) == 0, service.output
