"""launch/export.py: from a trained run to captions in an environment without this package."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from tests.helpers import in_process, processes, saved_run, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.eval import suite
from uni_moe_jax.export import artifact, contents
from uni_moe_jax.train import loop
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.train.checkpoint import Checkpoints

_ROOT = processes.ROOT
_RUN = 'runs/quickstart'


def _export(*arguments: str) -> subprocess.CompletedProcess:
  return processes.python('launch/export.py', *arguments, XLA_FLAGS='--xla_backend_optimization_level=0')


# The code of a server that has only the folder; compiled with optimizations, unlike the tests.
_SERVER = '''
import importlib.util, sys
import numpy as np
import load, texts
assert not [n for n in ('uni_moe_jax', 'flax', 'optax', 'tensorflow') if importlib.util.find_spec(n)]
model = load.Model()
pixels = np.load(sys.argv[1])
log_p = {n: np.asarray(model.run('shape', 'classify', pixels=pixels[:n])['log_p']) for n in (1, 3, 64)}
captions = {n: texts.Texts(model).captions('caption', pixels[:n]) for n in (1, 3, 64)}
for n in (1, 3):
  np.testing.assert_allclose(log_p[n], log_p[64][:n], rtol=1e-5, atol=1e-6)
  assert captions[n] == captions[64][:n], captions
np.savez(sys.argv[2], log_p=log_p[64], captions=captions[64])
'''


def _commands() -> str:
  """The commands of docs/guides/export.md from a trained run to a caption."""
  return (_ROOT / 'docs/guides/export.md').read_text().partition('```bash\n')[2].partition('```')[0]


def _cannot_install(folder: pathlib.Path) -> str:
  """Return why no package can be installed, or '' if one can; tries with a small package."""
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-cache-dir', '--quiet', f'--dest={folder}',
             'flatbuffers']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return done.stderr if done.returncode else ''


@pytest.fixture(name='root', scope='module')
def _root_folder(tmp_path_factory):
  """A folder with a run of one step where the guide's commands expect it."""
  folder = tmp_path_factory.mktemp('root')
  c = tiny.config('shape', 'caption', data_dir=tiny.data_dir())
  c.evaluators.shapes = config_lib.evaluator('classification', 'shape', split='train')
  c.train.update(dict(steps=1))
  assert loop.train(c, str(folder / _RUN), jax.devices()[:1]) == loop.FINISHED
  return folder


def _write_evaluation(run: pathlib.Path, step: int) -> None:
  row = dict(evaluator='shapes', metric='top-1', value=0.625, chance=1 / 3, baselines={}, standard_error=0.1, count=24,
             step=step, higher_is_better=True)
  model = workdir_lib.model_fingerprint(run, '', step)
  evaluators = {name: {**fields, 'data_fingerprint': None, 'model_fingerprint': model}
                for name, fields in workdir_lib.load_config(run).evaluators.to_dict().items()}
  for name, content in ((suite.EVALUATION_FILE, [row]), (suite.EVALUATORS_FILE, evaluators)):
    (run / name).write_text(json.dumps(content))


@pytest.mark.nightly
def test_the_guides_five_commands_print_captions_in_a_fresh_environment(root, tmp_path):
  assert _commands().count('\n') == 5
  if (why := _cannot_install(tmp_path / 'probe')) and not os.environ.get('CI'):
    pytest.skip(f'no packages can be installed: {why[-300:]}')
  _write_evaluation(root / _RUN, step=2)
  in_process.write_command(root / 'bin/uni-moe', XLA_FLAGS='--xla_backend_optimization_level=0')
  (root / 'bin/python').symlink_to(sys.executable)  # not every machine has this name
  env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
  env |= {'PATH': f'{root / "bin"}:{env["PATH"]}', 'PIP_CONSTRAINT': str(_ROOT / 'constraints.txt'), 'PIP_QUIET': '1'}
  run = functools.partial(subprocess.run, capture_output=True, text=True, env=env, check=False)
  done = run(['bash', '-ec', _commands()], cwd=root)
  assert done.returncode == 0, done.stderr
  first, weights, *lines = done.stdout.splitlines()
  assert 'exported: step 1, 4 kernels per projection for ' in first and first.endswith(' 2 tasks')
  assert re.search(r'params\.safetensors \d\.\d\d MB, .*total \d\.\d\d MB$', weights), weights
  assert sorted(line.partition(':')[0] for line in lines) == ['caption', 'shape'], lines
  assert all(line.endswith('; as at export') for line in lines), lines
  assert 'This step was not evaluated.' in (root / 'exported/README.md').read_text()

  pixels = np.random.default_rng(0).integers(0, 256, (64, 1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 1), dtype=np.uint8)
  np.save(tmp_path / 'in.npy', pixels)
  served = run([root / 'serve/bin/python', '-c', _SERVER, tmp_path / 'in.npy', tmp_path / 'out.npz'],
               cwd=root / 'exported')
  assert served.returncode == 0, served.stderr
  arrays = np.load(tmp_path / 'out.npz')
  built, predictor, _ = saved_run.load(workdir_lib.load_config(root / _RUN), root / _RUN)
  caption, shape = built.plan.tasks
  features = predictor.inputs(shape.type, {'pixels': pixels, 'id': np.zeros(len(pixels), np.uint32)})
  np.testing.assert_allclose(arrays['log_p'], predictor.log_probabilities(features, shape)[:, 0], rtol=1e-5, atol=1e-6)
  assert arrays['captions'].tolist() == predictor.captions(caption, pixels) and len(set(arrays['captions'])) > 1


@pytest.mark.nightly
def test_options_reduce_the_export(root, tmp_path):
  _write_evaluation(root / _RUN, step=1)
  done = _export(f'--workdir={root / _RUN}', f'--output={tmp_path}/out', '--tasks=shape', '--bake_targets',
                 '--dtype=bfloat16', '--torch')
  assert done.returncode == 0 and 'a dense model, ' in done.stdout and ', 1 tasks' in done.stdout, done.stderr
  manifest, card = json.loads((tmp_path / 'out/manifest.json').read_text()), (tmp_path / 'out/README.md').read_text()
  programs = {name: sorted(task['programs']) for name, task in manifest['tasks'].items()}
  assert programs == {'shape': ['classify', 'encode']}
  assert manifest['model']['dtype'] == 'bfloat16' and manifest['trained']['dtype'] == 'float32'
  assert not manifest['examples'] and (tmp_path / 'out/model.pth').stat().st_size > 0
  assert 'shapes' in manifest['evaluators'] and '0.625' in card and 'was not evaluated' not in card


def test_best_exports_the_best_checkpoint_with_its_scores_and_without_it_a_note_names_both(
    tmp_path, monkeypatch, capfd):
  c, workdir, exports = tiny.config('package', data_dir=tiny.data_dir()), tmp_path / 'run', []
  c.model.num_layers = 1
  c.evaluators.package = config_lib.evaluator('classification', 'package', split='train')
  params = saved_run.save_best_and_newest(workdir, c)
  _write_evaluation(workdir, step=2)
  monkeypatch.setattr(contents, 'make_contents', lambda _, params, *more, **options: types.SimpleNamespace(
      params=params, summary=lambda: 'a model'))
  monkeypatch.setattr(artifact, 'write', lambda *given: exports.append(given) or 'weights')

  def exported(*best):
    """((step, steps of the scores, factors of a parameter), output) of an export."""
    arguments = f'--workdir={workdir}', f'--output={tmp_path / "out"}', *best
    assert in_process.run(_ROOT / 'launch/export.py', *arguments) == 0
    _, made, provenance, rows, *_ = exports.pop()
    new, old = (jax.tree.leaves(tree)[0] for tree in (made.params, params))
    return (provenance['step'], [row['step'] for row in rows], np.unique(new / old).tolist()), capfd.readouterr()

  read, output = exported()
  assert read == (4, [], [2]) and f'{tmp_path}/out: step 4, ' in output.out
  assert 'newest checkpoint, of step 4; the best by config.train.best_metric is that of step 2, which --best reads' in (
      output.err)
  read, output = exported('--best')
  assert read == (2, [2], [1]) and f'{tmp_path}/out: step 2, ' in output.out and '--best' not in output.err
  with Checkpoints(workdir, 2) as checkpoints:
    checkpoints.add_metrics(4, {'loss/total': 0.})
  damaged = shutil.copytree(workdir / 'checkpoints/4', workdir / 'checkpoints/6')
  saved_run.flip_bit(damaged / saved_run.largest_file(damaged))
  read, output = exported()  # the newest intact one is the best
  assert read == (4, [], [2]) and '--best' not in output.err
