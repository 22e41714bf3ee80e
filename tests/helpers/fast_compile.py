"""XLA options for tests, which compile far more than they compute: a program is ready in a fifth of the time."""

from uni_moe_jax.tools.bench import settings

OPTIONS = settings.quick_xla_options()
FLAGS = tuple(f'--{name}={str(value).lower()}' for name, value in OPTIONS.items())


def environment_flags(devices: int | None = None, *more: str) -> str:
  """Return a value of XLA_FLAGS with these options; `devices` is the number of virtual CPU devices."""
  count = () if devices is None else (f'--xla_force_host_platform_device_count={devices}',)
  return ' '.join((*count, *FLAGS, *more))
