"""The exported folder reproduces the trained model at every batch size, and a changed folder is refused."""

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import hub_server, saved_run, shipped, tiny
from tests.helpers.shipped import assert_close
from uni_moe_jax import config as config_lib
from uni_moe_jax.convert import torch_file, torch_layout
from uni_moe_jax.data.text.token_rows import encode_texts, pad_tokens
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.export import artifact, contents, loader, programs
from uni_moe_jax.io import hub
from uni_moe_jax.model import decoding, merging
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.uni_perceiver import UniPerceiver, param_shapes
from uni_moe_jax.train import checkpoint, trained_run
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.utils.tree_paths import by_path

_BATCHES = shipped.BATCHES
_ROWS = [dict(evaluator='captions', metric='exact_match', value=0.625, chance=1 / 3, baselines={'majority': 0.5},
              standard_error=0.1, count=24, step=2, higher_is_better=True)]


def _config():
  """One image task trained in bfloat16 and two tasks without training."""
  c = tiny.config('shape', 'caption', 'pair', data_dir=tiny.data_dir())
  c.model.dtype = 'bfloat16'
  c.tasks.caption.batch_size = 0
  c.tasks.pair.batch_size = 0
  c.model.extra_temperature_groups = ('image_caption', 'image_retrieval')
  c.evaluators.captions = config_lib.evaluator('caption', 'caption', split='train', beam_size=2, length_penalty=1.0)
  c.train.update(dict(steps=2))
  return c


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(workdir, run, parameters) of a run with a checkpoint of step 2."""
  workdir = tmp_path_factory.mktemp('run')
  saved_run.save(workdir, _config(), step=2)
  run = train_run.build(workdir_lib.load_config(workdir), jax.devices()[:1])
  with checkpoint.Checkpoints(workdir, 1) as checkpoints:
    return workdir, run, jax.device_get(checkpoints.restore_params())


def _contents(trained, dtype: str | None = 'float32', **options):
  _, run, params = trained
  return contents.make_contents(run.spec.model.spec, params, run.plan, run.data, dtype=dtype, **options)


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
  """(folder, its contents) of all tasks."""
  exported = _contents(trained, num_examples=2)
  folder = tmp_path_factory.mktemp('artifact') / 'model'
  artifact.write(folder, exported, workdir_lib.provenance(trained[0], 2), _ROWS)
  return folder, exported


@pytest.fixture(scope='module')
def served(exported, tmp_path_factory):
  """(pixels, arrays, output) of a process that has only the folder."""
  shape = max(_BATCHES), 1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 1
  pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
  folder = tmp_path_factory.mktemp('served')
  np.savez(folder / 'in.npz', pixels=pixels)
  done = subprocess.run(
      [sys.executable, '-c', shipped.SERVER, folder / 'in.npz', folder / 'out.npz'], capture_output=True, text=True,
      cwd=exported[0], timeout=300, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return pixels, dict(np.load(folder / 'out.npz')), done.stdout


@pytest.fixture(scope='module')
def expected(trained, exported):
  """The trained model with its experts, in float32."""
  _, run, params = trained
  spec = _with_experts(trained)
  assert spec.num_experts == 4 and not spec.kernels and run.spec.model.spec.dtype == jnp.bfloat16
  return Predictor(UniPerceiver(spec), params, exported[1].target_sets, run.data.tokenizer)


@pytest.fixture(scope='module')
def searched(trained, served, exported):
  """Token ids [64, n] of the evaluator's search with the experts."""
  search = dict(beam_size=2, length_penalty=1.0)
  tokens = _search(trained, served[0], exported[1].features['words'], **search).tokens[:, 0]
  assert len(set(map(tuple, tokens))) > 1  # otherwise equality would prove little
  return tokens


@pytest.fixture(scope='module')
def greedy(trained, served, exported):
  return _search(trained, served[0], exported[1].features['words'])


def _search(trained, pixels, words, **options) -> decoding.Captions:
  """Captions by the model with its experts."""
  _, run, params = trained
  task, tokenizer = _task(trained, 'caption'), run.data.tokenizer
  return shipped.search(_with_experts(trained), params, task, tokenizer, pixels, words, **options)


def _with_experts(trained):
  return contents.portable(trained[1].spec.model.spec, 'float32')


def _task(trained, name):
  return next(t for t in (*trained[1].plan.tasks, *trained[1].plan.probes) if t.name == name)


@pytest.mark.nightly
def test_the_folder_runs_without_this_package(served):
  assert 'uni_moe_jax is not installed' in served[2]


@pytest.mark.nightly
@pytest.mark.parametrize('batch', _BATCHES)
def test_class_probabilities_equal_those_of_the_model_with_experts(trained, served, expected, batch):
  pixels, served_arrays, _ = served
  task = _task(trained, 'shape')
  features = expected.inputs(task.type, {'pixels': pixels, 'id': np.zeros(len(pixels), np.uint32)})
  assert_close(served_arrays[f'shape{batch}'], expected.log_probabilities(features, task)[:batch, 0])


@pytest.mark.nightly
@pytest.mark.parametrize('batch', _BATCHES)
def test_captions_equal_those_of_the_evaluator_token_for_token(served, searched, batch):
  np.testing.assert_array_equal(served[1][f'tokens{batch}'], searched[:batch])


@pytest.mark.nightly
def test_search_options_of_the_evaluator_give_other_captions_than_greedy_search(searched, greedy):
  assert (searched != greedy.tokens[:, 0]).any()  # otherwise captions that ignore them would pass


@pytest.mark.nightly
@pytest.mark.parametrize('batch', _BATCHES)
def test_streamed_words_equal_the_greedy_captions(trained, served, greedy, batch):
  arrays, eot = served[1], trained[1].data.tokenizer.eot
  words, want = arrays[f'words{batch}'], greedy.tokens[:batch, 0]
  np.testing.assert_array_equal(words, want[:, :words.shape[1]])
  assert (want[:, words.shape[1]:] == eot).all()
  assert_close(arrays[f'first{batch}'].max(-1), greedy.log_p[:batch, 0, 0])


@pytest.mark.nightly
@pytest.mark.parametrize('batch', _BATCHES)
def test_pairs_have_the_scores_of_the_model_with_experts(trained, served, expected, batch):
  pixels, served_arrays, _ = served
  task, tokenizer = _task(trained, 'pair'), trained[1].data.tokenizer
  image = expected.inputs(task.type, {'pixels': pixels, 'id': np.zeros(len(pixels), np.uint32)})[:batch, 0]
  text = np.resize(expected.pairs(task.type, {**_texts(tokenizer), 'id': np.zeros(2, np.uint32)}),
                   (batch, image.shape[-1]))
  text_valid = served_arrays['text_valid']
  np.testing.assert_array_equal(text_valid, np.resize(_texts(tokenizer)['target_valid'], text_valid.shape))
  assert_close(served_arrays[f'image{batch}'], normalize(image), 'image')
  assert_close(served_arrays[f'text{batch}'], normalize(text), 'text')
  scale = np.exp(trained[2]['log_scale_image_retrieval'])
  assert_close(served_arrays[f'scores{batch}'], scale * expected.similarities(image, text), 'scores')


def _texts(tokenizer):
  rows = encode_texts(('a red star of moves', 'green disc'), tokenizer, 8)
  return dict(zip(('target', 'target_valid'), pad_tokens(rows, 8, 0)))


@pytest.mark.nightly
def test_encoded_entries_of_a_target_set_equal_the_stored_features(served, exported):
  assert_close(served[1]['names'], exported[1].features['shapes'])


@pytest.mark.nightly
def test_examples_have_the_same_answers_as_at_export(served, exported):
  lines = [line for line in served[2].splitlines() if 'export' in line]
  assert len(lines) == len(exported[1].answers) == 2
  assert all(line.endswith('as at export') for line in lines)


@pytest.mark.nightly
def test_a_changed_byte_in_any_file_is_detected(exported):
  folder, _ = exported
  load, rng = shipped.module(folder), np.random.default_rng(1)
  load.verify(folder)
  files = [p for p in sorted(folder.rglob('*')) if p.is_file() and '__pycache__' not in p.parts]
  files.remove(folder / 'README.md')  # to which others add a license
  assert {p.name for p in files} >= {'manifest.json', 'SHA256SUMS', 'load.py', 'params.safetensors', 'tokenizer.model'}
  sums = (folder / 'SHA256SUMS').read_bytes()
  positions = [(folder / 'SHA256SUMS', i) for i in (*range(64, 80), sums.index(b'\n'), len(sums) - 1)]
  for path, i in [(p, int(rng.integers(p.stat().st_size))) for p in files if p.stat().st_size] + positions:
    content = path.read_bytes()
    path.write_bytes(content[:i] + bytes([content[i] ^ (1 << int(rng.integers(8)))]) + content[i + 1:])
    with pytest.raises(ValueError, match='differs from the exported file'):
      load.verify(folder)
    path.write_bytes(content)
  load.verify(folder)


def test_a_truncated_list_of_files_is_refused(exported):
  folder, _ = exported
  load, sums = shipped.module(folder), (folder / 'SHA256SUMS').read_bytes()
  try:
    for end in [0, *(i + 1 for i, byte in enumerate(sums[:-1]) if byte == ord('\n'))]:
      (folder / 'SHA256SUMS').write_bytes(sums[:end])
      with pytest.raises(ValueError, match=r'SHA256SUMS does not list \S+: it is empty, truncated or changed'):
        load.verify(folder)
  finally:
    (folder / 'SHA256SUMS').write_bytes(sums)
  assert load.verify(folder) == json.loads((folder / 'manifest.json').read_text())


def test_a_folder_that_lacks_a_file_is_refused(exported):
  folder, _ = exported
  (folder / 'config').write_text('')  # additional files are ignored
  shipped.module(folder).verify(folder)
  (folder / 'tokenizer.model').rename(folder / 'renamed')
  try:
    with pytest.raises(ValueError, match='tokenizer.model differs from the exported file'):
      shipped.module(folder).Model(folder)
  finally:
    (folder / 'renamed').rename(folder / 'tokenizer.model')


def test_another_format_is_refused(exported, tmp_path):
  manifest = (exported[0] / 'manifest.json').read_text()
  (tmp_path / 'manifest.json').write_text(manifest.replace('"format": 3', '"format": 4'))
  with pytest.raises(ValueError, match=r'has format 4, but this loader reads format 3: use the load\.py of that'):
    shipped.module(exported[0]).Model(tmp_path)


def test_the_card_describes_model_and_provenance(trained, exported):
  folder, exported_contents = exported
  text = (folder / 'README.md').read_text()
  config = json.loads((trained[0] / 'config.json').read_text())
  for part in ('Trained with router attribute, 4 experts', 'merged permanently', '4 kernels', '2 layers, width 16',
               'products are full float32', 'with products in bfloat16 (here float32', '### shape', '### pair',
               '`classify`: pixels uint8[b, 1, 16, 16, 1]', 'bar, disc, star', '| captions | exact_match | 0.625 |',
               config['data'], 'seed: 0', 'step: 2', 'trained by commit',
               hashlib.sha256((folder / 'params.safetensors').read_bytes()).hexdigest()):
    assert part in text, part
  listed = {line.partition('  ')[2] for line in (folder / 'SHA256SUMS').read_text().splitlines()}
  assert listed >= {'manifest.json', 'load.py', 'texts.py', 'example.py', 'params.safetensors',
                    'target_sets.safetensors', 'tokenizer.model'}
  assert all(name in text for name in listed) and 'README.md' not in listed
  # Images, texts of names and of pairs, images of captions, words of captions.
  assert exported_contents.spec.num_experts == 4 and exported_contents.spec.router == 'attribute'


def test_no_file_names_folders_of_the_exporting_machine(trained, exported):
  # Programs could contain source locations, and the config folders of data.
  folders = [str(p).encode() for p in (pathlib.Path(artifact.__file__).parents[2], trained[0], tiny.data_dir())]
  for path in [p for p in sorted(exported[0].rglob('*')) if p.is_file() and '__pycache__' not in p.parts]:
    assert not [p for p in folders if p in path.read_bytes()], path


def test_the_manifest_has_the_weights_of_the_experts_in_every_merged_kernel(trained, exported):
  manifest, (_, _, params) = json.loads((exported[0] / 'manifest.json').read_text()), trained
  with_experts, merged = (merging.layer_params(spec, values, 1, ('ffn_in',))['ffn_in']['kernel'] for spec, values in (
      (_with_experts(trained), params), (exported[1].spec, exported[1].params)))
  conditions = {c: kernel for task in manifest['tasks'].values() for c, kernel in task['conditions'].items()}
  assert len(set(conditions.values())) == 4
  for condition, kernel in conditions.items():
    weights = manifest['mixtures'][condition]['1']['mlp']
    assert sum(weight > 0 for weight in weights) == 2 and sum(weights) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(np.tensordot(weights, with_experts, 1), merged[kernel], atol=2e-4)
  assert {s['condition'] for s in manifest['target_sets'].values()} <= set(manifest['mixtures'])
  pair = manifest['tasks']['pair']
  assert [*pair['input_conditions'], pair['text_condition']] == list(pair['conditions'])


def test_equal_programs_are_one_file(exported):
  # Attribute bits of images are the same in classification and in retrieval.
  manifest = json.loads((exported[0] / 'manifest.json').read_text())
  files = {task: manifest['tasks'][task]['programs']['encode']['file'] for task in ('shape', 'pair')}
  assert len(set(files.values())) == 1


def test_the_orbax_checkpoint_has_the_same_parameters(exported):
  folder, exported_contents = exported
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(folder / 'orbax', jax.tree.map(np.zeros_like, exported_contents.params))
  stored = loader.tensors(folder / 'params.safetensors')
  for path, x in by_path(restored).items():
    np.testing.assert_array_equal(stored[path], x)
  assert set(stored) == set(by_path(param_shapes(UniPerceiver(exported_contents.spec))))


@pytest.fixture(scope='module')
def dense(trained):
  """Contents of the export of one condition: images with baked targets."""
  return _contents(trained, tasks=['shape'], bake_targets=True)


def _dense_model(trained):
  """A dense model of the run's sizes."""
  return UniPerceiver(dataclasses.replace(_with_experts(trained), router='dense', router_names=()))


def _lowered(model, exported, name='classify'):
  params = by_path(param_shapes(model))
  return programs.programs(model, exported, 2, 3)[name].lowered(params), params


def _operations(exported) -> collections.Counter:
  return collections.Counter(re.findall(r'= "?((?:stablehlo|chlo|func)\.\w+)', exported.mlir_module()))


def _flops(exported, params) -> float:
  shapes = {'pixels': jax.ShapeDtypeStruct((3, 1, 16, 16, 1), jnp.uint8),
            'targets': jax.ShapeDtypeStruct((3, 16), jnp.float32)}
  return jax.jit(exported.call).lower(params, shapes).compile().cost_analysis()['flops']


def test_one_condition_gives_the_program_of_a_dense_model(trained, dense):
  models = UniPerceiver(dense.spec), _dense_model(trained)
  (merged, params), (plain, _) = (_lowered(model, dense.tasks[0]) for model in models)
  with_experts, _ = _lowered(UniPerceiver(_with_experts(trained)), dense.tasks[0])
  assert _operations(merged) == _operations(plain) and sum(_operations(merged).values()) > 100
  assert _operations(merged) != _operations(with_experts)
  assert _flops(merged, params) == _flops(plain, params) > 1e4


def test_one_condition_gives_the_parameters_and_the_file_size_of_a_dense_model(trained, dense, tmp_path):
  plain = by_path(param_shapes(_dense_model(trained)))
  merged = by_path(dense.params)
  assert {k: x.shape for k, x in merged.items()} == {k: x.shape for k, x in plain.items()}
  artifact.save(tmp_path / 'merged', merged)
  artifact.save(tmp_path / 'plain', {k: np.zeros(x.shape, x.dtype) for k, x in plain.items()})
  assert (tmp_path / 'merged').stat().st_size == (tmp_path / 'plain').stat().st_size
  assert sum(x.size for x in merged.values()) < sum(x.size for x in jax.tree.leaves(trained[2])) / 2


def test_one_condition_is_written_in_the_published_dense_layout(dense, tmp_path):
  # The run names temperature groups by task type; the file has only that of the exported task, by its published name.
  artifact.write(tmp_path / 'model', dense, {'name': 'mine'}, [], formats=['torch'])
  state, _ = torch_file.read(tmp_path / 'model/model.pth')
  assert 'fused_encoder.layers.1.self_attn.in_proj_weight' in state
  assert not any('expert' in k or 'gate' in k for k in state)
  back, _ = torch_layout.from_torch(state, dataclasses.replace(dense.spec, temperature_groups=('img_cls',)))
  kept = {k: x for k, x in dense.params.items() if not k.startswith('log_scale_')}
  jax.tree.map(np.testing.assert_array_equal, back,
               {**kept, 'log_scale_img_cls': dense.params['log_scale_image_classification']})


@pytest.mark.nightly
def test_a_run_starts_from_the_hub_with_the_parameters_of_the_run_bit_for_bit(trained, dense, tmp_path, monkeypatch):
  workdir, _, params = trained
  origin = workdir_lib.provenance(workdir, 2)
  (tmp_path / 'start').mkdir()
  trained_run.write_start(tmp_path / 'start', params, 2, origin)
  artifact.write(tmp_path / 'model', dense, origin, [],
                 write_start=lambda folder: trained_run.write_start(folder, params, 2, origin))
  assert f'{tmp_path}'.encode() not in (tmp_path / 'model/config.json').read_bytes()
  with hub_server.running(monkeypatch, tmp_path):
    monkeypatch.setenv('HF_TOKEN', hub_server.TOKEN)
    c = _config()
    c.train.init = hub.push(tmp_path / 'model', 'me/model')
    loaded = by_path(jax.device_get(train_run.read_init(train_run.build(c, jax.devices()[:1]))[0]))
  assert {path: x.tobytes() for path, x in loaded.items()} == {path: x.tobytes() for path, x in by_path(params).items()}
  next_config = {**origin['config'], 'train': {**origin['config']['train'], 'init': c.train.init}}
  workdir_lib.write_config(tmp_path / 'start', {**origin, 'config': next_config})
  assert workdir_lib.provenance(tmp_path / 'start', 1)['started from'] == c.train.init  # with its commit


def test_an_unknown_task_is_reported_with_near_names(trained):
  with pytest.raises(ValueError, match="no task 'shapes'; did you mean 'shape'"):
    _contents(trained, tasks=['shapes'])


def test_an_existing_folder_is_not_overwritten(exported):
  with pytest.raises(ValueError, match='exists; choose another'):
    artifact.write(exported[0], exported[1], {}, [])
