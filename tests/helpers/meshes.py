"""Loss and gradients of one training step on a mesh or on one device, which the tests of parallelism compare."""

import contextlib
import dataclasses
import functools
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tests.helpers import small_model, tiny
from uni_moe_jax.moe import routers
from uni_moe_jax.parallel import sharding
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import step
from uni_moe_jax.utils.tree_paths import by_path

ONE = 'one'
MESHES = {
    ONE: dict(),
    'data': dict(data=8),
    'fsdp': dict(data=8, fsdp=True),
    'expert': dict(expert=8),
    'mixed': dict(data=2, expert=2, model=2),
    'replica': dict(replica=2, data=4),
}
NUM_EXPERTS, TOP_K, BATCH = 8, 2, 8
NO_DROP_CAPACITY = NUM_EXPERTS / TOP_K  # capacity factor that drops no token


@dataclasses.dataclass(frozen=True)
class Case:
  """A training step: its router, its tasks and fields of the config."""
  router: str
  tasks: tuple[str, ...]
  num_layers: int = 2
  remat: bool = False
  capacity_factor: float = 0.0
  grad_accum_steps: int = 1
  dtype: str = 'float32'
  drop_path: float = 0.0
  negatives: str | int = 'global'


@dataclasses.dataclass(frozen=True)
class StepResult:
  """Loss, gradients by path (NumPy), and the smallest lead of a router's last kept expert (on one device only)."""
  loss: float
  gradients: dict[str, np.ndarray]
  margin: float


def run(case: Case, mesh: str, devices=None) -> train_run.Run:
  """Return a run of the tiny data on a mesh of the given devices (default: the first ones)."""
  c = tiny.config(*case.tasks, data_dir=tiny.data_dir())
  c.tokenizer.path = tiny.tokenizer_file()
  for task in c.tasks.values():
    task.batch_size = BATCH * case.grad_accum_steps
  c.model.update(dict(num_layers=case.num_layers, remat=case.remat, dtype=case.dtype, drop_path=case.drop_path))
  # With much noise every expert is used.
  c.moe.update(dict(router=case.router, num_experts=NUM_EXPERTS, top_k=TOP_K, noise_std=8.0, gmm='batched',
                    capacity_factor=case.capacity_factor))
  c.train.update(dict(grad_accum_steps=case.grad_accum_steps, negatives=case.negatives))
  c.mesh.update({**dict(replica=1, data=1, expert=1, model=1, fsdp=False), **MESHES[mesh]})
  needed = math.prod(c.mesh[axis] for axis in sharding.AXES)
  return train_run.build(c, (jax.devices() if devices is None else devices)[:needed])


@functools.cache
def compiled(case: Case, mesh: str) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
  """Return the compiled function and its arguments."""
  return _compile(run(case, mesh))


@functools.cache
def result(case: Case, mesh: str) -> StepResult:
  """Return loss and gradients of a step on a mesh."""
  return run_step(run(case, mesh)) if mesh == ONE else evaluate(*compiled(case, mesh))


def run_step(r: train_run.Run) -> StepResult:
  """Return loss and gradients of a step of a run, on one device with the margins of its routers."""
  margins = [math.inf]
  with _watched(margins) if r.mesh.size == 1 else contextlib.nullcontext():
    step_result = evaluate(*_compile(r))
  jax.effects_barrier()
  return dataclasses.replace(step_result, margin=min(margins))


def differences(a: StepResult, b: StepResult) -> dict[str, float]:
  """Return ‖a - b‖ / ‖b‖ of the gradient of every parameter. Both must be finite."""
  assert a.gradients.keys() == b.gradients.keys()
  norm = np.linalg.norm
  distances = {path: float(norm(a.gradients[path] - g) / max(norm(g), 1e-30)) for path, g in b.gradients.items()}
  # Empty expert slots may hold NaN. max() would ignore one that reaches the gradients.
  broken = sorted(path for path, x in distances.items() if not math.isfinite(x))
  assert not broken, f'not finite: {broken}'
  return distances


def _compile(r: train_run.Run):
  def gradients(params, batch, sets, key):
    output = step.gradients(r.spec, params, batch, sets, jax.random.wrap_key_data(key))
    return output.grads, output.loss

  replicated = sharding.replicated(r.mesh)
  params = jax.tree_util.tree_map_with_path(
      lambda path, v, where: jax.make_array_from_callback(v.shape, where, _sharper(path, np.asarray(v)).__getitem__),
      small_model.params(r.spec.model.spec), r.shardings.params)
  key = jax.device_put(np.asarray(jax.random.key_data(jax.random.key(3))), replicated)
  arguments = params, r.put_batch(next(r.mixture().iterate(0, 1))[1]), r.target_sets(), key
  jitted = small_model.jit(gradients, out_shardings=(r.shardings.params, replicated))
  return jitted.lower(*arguments).compile(), arguments


def _sharper(path, value: np.ndarray) -> np.ndarray:
  """Return sharp temperatures: with uniform losses, gradients would cancel to rounding errors."""
  return np.float32(math.log(15.0)) if 'log_scale' in jax.tree_util.keystr(path) else value


def evaluate(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> StepResult:
  """Run the function of `compiled` with its arguments or others."""
  def gather(x):  # each of several processes has a part
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
  grads, loss = compiled(*arguments)
  return StepResult(float(loss), {path: gather(g) for path, g in by_path(grads).items()}, math.inf)


@contextlib.contextmanager
def _watched(margins: list[float]):
  """Make what is traced inside record, when it runs, how close the decisions of its routers were."""
  keep = routers.keep_top_k

  def watched(logits, top_k):
    order = jnp.sort(logits, axis=-1)
    ahead = (order[..., -top_k] - order[..., -top_k - 1]).min()
    jax.debug.callback(lambda m: margins.append(float(m)), ahead)
    return keep(logits, top_k)

  with mock.patch.object(routers, 'keep_top_k', watched):
    yield
