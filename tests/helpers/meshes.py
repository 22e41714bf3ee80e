"""Loss and gradients of one step, on a mesh or on one device: what the tests of parallelism compare."""

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
EXPERTS, KEPT, BATCH = 8, 2, 8
ROOM_FOR_ALL = EXPERTS / KEPT  # a capacity that drops nothing


@dataclasses.dataclass(frozen=True)
class Case:
  """What is computed: the router, the tasks of the step, and fields of the config that differ."""
  router: str
  tasks: tuple[str, ...]
  num_layers: int = 2
  remat: bool = False
  capacity_factor: float = 0.0
  grad_accum_steps: int = 1
  dtype: str = 'float32'
  drop_path: float = 0.0


@dataclasses.dataclass(frozen=True)
class Found:
  """loss, gradients by path (numpy); by how much a router's last kept expert was ahead, at least (one device only)."""
  loss: float
  gradients: dict[str, np.ndarray]
  margin: float


def run(case: Case, mesh: str, devices=None) -> train_run.Run:
  """A run of the tiny data on a mesh of these devices, by default the first that there are."""
  c = tiny.config(*case.tasks, data_dir=tiny.data_dir())
  c.tokenizer.path = tiny.tokenizer_file()
  for task in c.tasks.values():
    task.batch_size = BATCH * case.grad_accum_steps
  c.model.update(dict(num_layers=case.num_layers, remat=case.remat, dtype=case.dtype, drop_path=case.drop_path))
  # Much noise: each expert is chosen by something.
  c.moe.update(dict(router=case.router, num_experts=EXPERTS, top_k=KEPT, noise_std=8.0, capacity_factor=case.capacity_factor, gmm='batched'))
  c.train.grad_accum_steps = case.grad_accum_steps
  c.mesh.update({**dict(replica=1, data=1, expert=1, model=1, fsdp=False), **MESHES[mesh]})
  needed = math.prod(c.mesh[axis] for axis in sharding.AXES)
  return train_run.build(c, (jax.devices() if devices is None else devices)[:needed])


@functools.cache
def lowered(case: Case, mesh: str) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
  """The compiled function, and the arguments that it takes."""
  return _compile(run(case, mesh))


@functools.cache
def found(case: Case, mesh: str) -> Found:
  """What a mesh computes."""
  return of_run(run(case, mesh)) if mesh == ONE else evaluate(*lowered(case, mesh))


def of_run(r: train_run.Run) -> Found:
  """What a run computes, with the margins of its routers where it has one device."""
  margins = [math.inf]
  with _watched(margins) if r.mesh.size == 1 else contextlib.nullcontext():
    compiled, arguments = _compile(r)
  result = evaluate(compiled, arguments)
  jax.effects_barrier()
  return dataclasses.replace(result, margin=min(margins))


def differences(a: Found, b: Found) -> dict[str, float]:
  """‖a - b‖ / ‖b‖ of the gradient of every parameter; both sides must be finite."""
  assert a.gradients.keys() == b.gradients.keys()
  norm = np.linalg.norm
  apart = {path: float(norm(a.gradients[path] - g) / max(norm(g), 1e-30)) for path, g in b.gradients.items()}
  # Slots without a choice may hold NaN. If one gets out it must not pass: max() does not see it.
  broken = sorted(path for path, x in apart.items() if not math.isfinite(x))
  assert not broken, f'not finite: {broken}'
  return apart


def _compile(r: train_run.Run):
  def gradients(params, batch, sets, key):
    output = step.gradients(r.spec, params, batch, sets, jax.random.wrap_key_data(key))
    return output.grads, output.loss

  whole = sharding.replicated(r.mesh)
  params = jax.tree_util.tree_map_with_path(
      lambda path, v, where: jax.make_array_from_callback(v.shape, where, _sharper(path, np.asarray(v)).__getitem__),
      small_model.params(r.spec.model.spec), r.shardings.params)
  key = jax.device_put(np.asarray(jax.random.key_data(jax.random.key(3))), whole)
  arguments = params, r.put_batch(next(r.mixture().iterate(0, 1))[1]), r.target_sets(), key
  jitted = small_model.jit(gradients, out_shardings=(r.shardings.params, whole))
  return jitted.lower(*arguments).compile(), arguments


def _sharper(path, value: np.ndarray) -> np.ndarray:
  """Temperatures at which an answer is wrong by much or not at all: where losses are even, their gradients cancel to rounding."""
  return np.float32(math.log(15.0)) if 'log_scale' in jax.tree_util.keystr(path) else value


def evaluate(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> Found:
  """Runs what `lowered` gave, or with other arguments."""
  def whole(x):  # of several processes, each has a part
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
  grads, loss = compiled(*arguments)
  return Found(float(loss), {path: whole(g) for path, g in by_path(grads).items()}, math.inf)


@contextlib.contextmanager
def _watched(margins: list[float]):
  """Everything that is traced inside notes, when it runs, how close its routers' decisions were."""
  keep = routers.keep_top_k

  def watched(logits, top_k):
    order = jnp.sort(logits, axis=-1)
    ahead = (order[..., -top_k] - order[..., -top_k - 1]).min()
    jax.debug.callback(lambda m: margins.append(float(m)), ahead)
    return keep(logits, top_k)

  with mock.patch.object(routers, 'keep_top_k', watched):
    yield
