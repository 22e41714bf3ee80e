"""Work directories: a checkpoint of a run that was not trained, and the metrics of one that was."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import pytest

from tests.helpers import small_model
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.io import storage
from uni_moe_jax.train import manifest, workdir
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.train.metrics_log import TIMINGS
from uni_moe_jax.train.step import TrainState

Folder = str | os.PathLike[str]


def save(
    folder: Folder, config: ml_collections.ConfigDict, step: int, devices: int = 1,
    change: Callable[[TrainState], TrainState] = lambda state: state) -> Any:
  """Save a checkpoint with parameters that are nowhere zero. Return them. change: applied to the state."""
  run = train_run.build(config, jax.devices()[:devices])
  params = small_model.params(run.spec.model.spec)
  workdir.claim_workdir(folder, config, run.data.fingerprint, class_digests=run.class_digests)
  workdir.copy_tokenizer(folder, run.data.tokenizer_file)
  with Checkpoints(folder, 1) as checkpoints:
    checkpoints.save(step, change(run.state_from(params)))
  return params


def save_best_and_newest(folder: Folder, config: ml_collections.ConfigDict) -> Any:
  """Save parameters as step 2, the best by loss/total, and twice them as step 4, the newest. Return them."""
  config.train.best_metric = 'loss/total'
  params = save(folder, config, step=2)
  run = train_run.build(config, jax.devices()[:1])
  with Checkpoints(folder, 2) as checkpoints:
    checkpoints.add_metrics(2, {'loss/total': 1.})
    checkpoints.save(4, run.state_from(jax.tree.map(lambda x: 2 * x, params)), {'loss/total': 2.})
  return params


def load(config: ml_collections.ConfigDict, folder: Folder) -> tuple[train_run.Run, Predictor, Any]:
  """Return (run, predictor, parameters) of a work directory, on one device."""
  run = train_run.build(config, jax.devices()[:1])
  with Checkpoints(folder, 1) as checkpoints:
    params, _ = train_run.read_params(run, checkpoints)
  return run, run.predictor(params), params


def state(run: train_run.Run, folder: Folder, step: int | None = None) -> tuple[int, TrainState]:
  """Return (step, state) of a checkpoint of a run, by default the newest."""
  with Checkpoints(folder, None) as checkpoints:
    return step or checkpoints.latest(), checkpoints.restore(run.abstract_state(), step)


def on_host(checkpoints: Checkpoints, step: int | None = None) -> Any:
  """A saved step (default: the newest), whatever it has, as nested dictionaries of arrays on the host."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  tree = checkpoints._saved_tree(checkpoints.latest() if step is None else step)
  shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)
  return jax.device_get(checkpoints.restore(shapes, step))


# Fields that are numbers of a step, its arguments, or of no concern to it.
_OUTSIDE_STEPS = ('steps', 'evaluate_every', 'best_metric', 'checkpoint_every', 'keep_every', 'max_to_keep')


def share_steps(patch: pytest.MonkeyPatch) -> None:
  """Compile one step for runs with the same one from now on, which takes longer than to train a tiny run."""
  programs, make = {}, train_run.Run.step_fn

  def step_fn(run, task=None):
    config = json.loads(run.config.to_json_best_effort())
    train = {name: value for name, value in config['train'].items() if name not in _OUTSIDE_STEPS}
    key = json.dumps({**config, 'train': train, 'evaluators': None})
    step = make(run, task)
    step._jitted = programs.setdefault((key, run.mesh, task), step._jitted)
    return step

  patch.setattr(train_run.Run, 'step_fn', step_fn)


def copy(source: storage.Path, target: storage.Path) -> None:
  """Copy a folder between disks and buckets."""
  for name in storage.files_in(source):
    storage.make_folder((target / name).parent)
    (target / name).write_bytes((source / name).read_bytes())


def largest_file(checkpoint: storage.Path) -> str:
  """Return the name of the largest file of a checkpoint's arrays."""
  sizes = {name: size for name, (size, _) in storage.files_in(checkpoint).items() if '/d/' in name}
  return max(sizes, key=sizes.get)


def flip_bit(file: storage.Path) -> None:
  """Flip a bit in the middle of a file or object."""
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  storage.write_bytes(file, bytes(content))


def alter(checkpoint: storage.Path) -> None:
  """Flip a bit of a checkpoint's arrays in a bucket, as if on the way there: the manifest has the digest of that."""
  flip_bit(checkpoint / largest_file(checkpoint))
  manifest.write(checkpoint, checkpoint, manifest.metrics(checkpoint), manifest.array_sums(checkpoint), {})


def lines(folder: Folder) -> list[dict[str, float]]:
  """Return the lines of metrics.jsonl without the speed, in which equal runs differ."""
  texts = (storage.path(folder) / 'metrics.jsonl').read_text().splitlines()
  return [{k: v for k, v in json.loads(text).items() if k not in TIMINGS} for text in texts]
