"""The device mesh, and the one table from logical axis names to mesh axes.

Modules name the axes of their parameters by meaning ('embed', 'experts', …); only this table maps them to the mesh.
Batches are sharded over (replica, data, expert), so that no two groups of `model` devices have an example in common.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uni_moe_jax.utils.errors import UsageError

AXES = ('replica', 'data', 'expert', 'model')
BATCH_AXES = ('replica', 'data', 'expert')
AMPERE = 8.0  # its compute capability; NVIDIA GPUs before it run neither Triton kernels nor cuDNN's attention

# Logical axis of a parameter → mesh axis (None: not split). FSDP splits `embed` over `data`.
RULES = {
    'layers': None, 'experts': 'expert', 'embed': None, 'feature': None, 'qkv': None, 'heads': 'model',
    'head_dim': None, 'mlp': 'model', 'vocab': None, 'position': None, 'type': None, 'patch': None, 'frame': None,
    'space': None, 'attribute': None, 'router_table': None, 'gate_experts': None, 'prompt': None, 'class': None,
}


def mesh_shape(requested: dict[str, int], devices: int) -> dict[str, int]:
  """Infers the one axis of `AXES` that is -1. Raises UsageError unless the mesh covers the number of devices."""
  shape = {axis: int(requested[axis]) for axis in AXES}
  free = [a for a, n in shape.items() if n == -1]
  if len(free) > 1:
    raise UsageError(f'config.mesh: {" and ".join(free)} are both -1; at most one axis can be inferred.')
  if bad := {a: n for a, n in shape.items() if n < 1 and n != -1}:
    raise UsageError(f'config.mesh: {bad} must be positive, or -1 for one inferred axis.')
  known = math.prod(n for n in shape.values() if n != -1)
  if free:
    if devices % known:
      raise UsageError(f'config.mesh: {known} (the fixed axes of {shape}) does not divide {devices} devices; lower '
                       'them.')
    shape[free[0]] = devices // known
  elif known != devices:
    raise UsageError(f'config.mesh={shape} needs {known} devices, there are {devices}; set one axis to -1.')
  return shape


def make_mesh(requested: dict[str, int], devices=None) -> Mesh:
  """Mesh over the axes of `AXES`; see `mesh_shape`."""
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(requested, len(devices))
  # On TPU, neighbors on an axis are neighbors in the machine; elsewhere the order is that of `devices`.
  sizes = [shape[a] for a in AXES]
  slices = len({getattr(d, 'slice_index', 0) for d in devices}) if devices[0].platform == 'tpu' else 1
  if slices == 1:
    return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)
  if shape['replica'] % slices:
    raise UsageError(f'config.mesh.replica={shape["replica"]} must be a multiple of {slices}, the number of TPU '
                     f'slices, between which links are slower; try {slices}.')
  sizes[0] //= slices
  return Mesh(mesh_utils.create_hybrid_device_mesh(
      sizes, [slices, 1, 1, 1], devices, allow_split_physical_axes=True), AXES)


def platform(mesh: Mesh | None) -> str:
  """'cpu', 'gpu' or 'tpu': the type of the mesh's devices, which may be absent. None: of this process's devices."""
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def compute_capability(device: Any) -> float | None:
  """That of an NVIDIA GPU. None: another device; AMD's are no numbers."""
  capability = str(getattr(device, 'compute_capability', ''))
  return float(capability) if re.fullmatch(r'\d+(\.\d+)?', capability) else None


def on_one_cpu(mesh: Mesh | None) -> bool:
  """Whether one CPU has all arrays: then what is fastest there runs, elsewhere what accelerators run.

  Meshes of CPU devices serve tests of what pods do. mesh: None, on one device of this process.
  """
  return (mesh is None or mesh.size == 1) and platform(mesh) == 'cpu'


def batch_shards(shape: Mapping[str, int]) -> int:
  """Number of shards of a batch on a mesh of this shape."""
  return math.prod(shape[a] for a in BATCH_AXES)


def local_shards(mesh: Mesh) -> tuple[int, ...]:
  """Batch shards on devices of this process. If `model` spans processes, several have the same shard."""
  indices = batch_sharding(mesh, 0).addressable_devices_indices_map((batch_shards(mesh.shape),)).values()
  return tuple(sorted({index.start or 0 for index, in indices}))


def rules(fsdp: bool) -> tuple[tuple[str, str | None], ...]:
  """The table as flax takes it."""
  return tuple({**RULES, **({'embed': 'data'} if fsdp else {})}.items())


def param_shardings(boxed, mesh: Mesh, fsdp: bool):
  """Shardings of parameters from the logical axis names in their boxes. boxed: `jax.eval_shape(init)`."""
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules(fsdp))


def named_spec(names: tuple[str | None, ...]) -> PartitionSpec:
  """Layout of an array with these logical axes (or None) while it is used, without FSDP's split."""
  return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def as_used(x: jax.Array, names: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
  """Lays out a parameter for its use: gathers it over FSDP's axis and leaves it split over the others."""
  return _constrained(x, mesh, named_spec(names))


def shard_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Shards examples [B, …] over the batch axes. B need not be divisible, since XLA pads."""
  return _constrained(x, mesh, PartitionSpec(BATCH_AXES, *([None] * (x.ndim - 1))))


def pad_batch(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Pads examples [B, …] with zeros (a mask with False) until B is a multiple of the batch shards."""
  missing = -x.shape[0] % batch_shards(mesh.shape)
  return jnp.pad(x, ((0, missing), *([(0, 0)] * (x.ndim - 1)))) if missing else x


def replicate(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Gathers an array to every device."""
  return _constrained(x, mesh, PartitionSpec())


def _constrained(x: jax.Array, mesh: Mesh | None, spec: PartitionSpec) -> jax.Array:
  return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def on_every_device(tree: Any, mesh: Mesh) -> Any:
  """Arrays of this host, which are those of all processes, on every device.

  `jax.device_put` would gather the arrays of all processes on each device to compare them, bit for bit.
  """
  def put(x):
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])
  return jax.tree.map(put, tree)


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
  """Sharding of a batch leaf whose shard axis is `axis`: 0, or 1 after an axis of micro-steps."""
  return NamedSharding(mesh, PartitionSpec(*([None] * axis), BATCH_AXES))
