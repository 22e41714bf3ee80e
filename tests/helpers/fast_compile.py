"""XLA options for tests, which compile far more than they compute: a program is ready in a fifth of the time."""

import importlib.metadata

OPTIONS: dict[str, int | bool] = {'xla_backend_optimization_level': 0}
# An option that the installed XLA does not have would end the process. Asked without importing JAX.
if tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 11):
  OPTIONS['xla_cpu_use_fusion_emitters'] = False
FLAGS = tuple(f'--{name}={str(value).lower()}' for name, value in OPTIONS.items())


def environment_flags(devices: int | None = None, *more: str) -> str:
  """Return a value of XLA_FLAGS with these options; `devices` is the number of virtual CPU devices."""
  count = () if devices is None else (f'--xla_force_host_platform_device_count={devices}',)
  return ' '.join((*count, *FLAGS, *more))
