"""Accelerators that are not there: JAX traces and lowers some kernels for the kind of a GPU or TPU."""

import contextlib

import jax

_NAMES = {'cuda': 'NVIDIA H100 80GB HBM3', 'rocm': 'gfx942', 'tpu': 'TPU v5 lite'}


def tracing_for(platform: str) -> contextlib.AbstractContextManager:
  """Return a context in which functions are traced and lowered for one device of 'cuda', 'rocm' or 'tpu'."""
  tpu = platform == 'tpu'
  device = jax.sharding.AbstractDevice(
      device_kind=_NAMES[platform], num_cores=1 if tpu else None, platform='tpu' if tpu else 'gpu')
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
      (1,), ('device',), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device))
