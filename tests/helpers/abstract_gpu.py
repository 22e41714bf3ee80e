"""GPUs that are not there: newer releases of JAX lower Triton kernels for the kind of a GPU."""

import contextlib

import jax

_NAMES = {'cuda': 'NVIDIA H100 80GB HBM3', 'rocm': 'gfx942'}


def tracing_for(platform: str) -> contextlib.AbstractContextManager:
  """Return a context in which functions are traced and lowered for one GPU of 'cuda' or 'rocm'."""
  device = jax.sharding.AbstractDevice(device_kind=_NAMES[platform], num_cores=None, platform='gpu')
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
      (1,), ('device',), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device))
