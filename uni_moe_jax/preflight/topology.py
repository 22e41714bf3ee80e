"""Topologies of absent devices, and the peaks of a chip. Cheap to import."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip. Rates are the manufacturer's peaks, per second."""
  memory: float | None  # bytes that libtpu lets a program use, slightly less than the chip has
  # In bfloat16; multiply and add count as two. It is the peak of float32 too: by default JAX multiplies float32 arrays
  # on TPU in one bfloat16 pass.
  flops: float | None
  hbm: float | None  # bytes between memory and processor
  links: float | None  # bytes that a chip can send over all its links together (half of the bidirectional bandwidth)
  source: str  # of the figures


_DOCS = 'https://docs.cloud.google.com/tpu/docs/'
CHIPS: Mapping[str, Chip] = {
    # v4: six links of 50 GB/s, Jouppi et al., 2023 (arXiv 2304.01433). Others: half a chip's bidirectional bandwidth.
    'v4': Chip(30.75 * GIB, 275e12, 1200e9, 300e9, _DOCS + 'v4'),
    'v5e': Chip(15.75 * GIB, 197e12, 819e9, 200e9, _DOCS + 'v5e'),
    'v5p': Chip(95.74 * GIB, 459e12, 2765e9, 600e9, _DOCS + 'v5p'),
    'v6e': Chip(31.25 * GIB, 918e12, 1638e9, 400e9, _DOCS + 'v6e'),
    # Virtual devices share the memory and cores of this machine, so the peaks of one are unknown.
    'cpu': Chip(None, None, None, None, ''),
}
# Without these, libtpu queries an absent metadata server for absent hosts, and two processes cannot compile at once.
_ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
                'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
# The two cores of a v4 chip are one device for JAX; by default libtpu returns them as two.
_OPTIONS = {'v4': {'chip_config_name': 'megacore'}}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A named topology: 'v5e:16x16', 'v4:2x2x4', 'cpu:64'."""
  name: str
  generation: str
  chips: int  # their number
  chip: Chip

  @property
  def is_tpu(self) -> bool:
    return self.generation != 'cpu'


def parse(name: str) -> Topology:
  """Parse the name of a topology; raises UsageError for an unknown generation, or a shape that it does not have."""
  generation, _, shape = name.partition(':')
  if generation not in CHIPS:
    raise UsageError(f'--topology={name!r}: {generation!r} is unknown; {nearest(generation, CHIPS)}.')
  axes = {'cpu': 1, 'v5e': 2, 'v6e': 2}.get(generation, 3)
  example = {1: '64', 2: '16x16', 3: '4x4x4'}[axes]
  if not re.fullmatch('x'.join([r'[1-9]\d*'] * axes), shape):
    raise UsageError(f'--topology={name!r} must give {axes} size{"s" * (axes > 1)} of chips, for example '
                     f'{generation}:{example}.')
  sizes = [int(n) for n in shape.split('x')]
  if generation != 'cpu' and (sizes[0] % 2 or sizes[1] % 2):
    raise UsageError(f'--topology={name!r}: a host has 2 × 2 chips, so the first two sizes must be even.')
  return Topology(name, generation, math.prod(sizes), CHIPS[generation])


def prepare_environment(topology: Topology) -> None:
  """Set the environment variables that JAX and libtpu read when they are imported; call it before."""
  os.environ.update(_ENVIRONMENT)
  if not topology.is_tpu:
    flag = f'--xla_force_host_platform_device_count={topology.chips}'  # the last of two equal flags counts
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()


def devices(topology: Topology) -> list[Any]:
  """Return the devices to compile for; absent TPUs cannot hold arrays.

  Raises:
    UsageError: libtpu is not installed, or does not support the topology.
  """
  import jax  # pylint: disable=g-import-not-at-top
  from jax.experimental import topologies  # pylint: disable=g-import-not-at-top
  if not topology.is_tpu:
    virtual = jax.devices('cpu')
    if len(virtual) < topology.chips:
      raise UsageError(f'--topology={topology.name!r}: this process was started with {len(virtual)} virtual devices; '
                       f'set XLA_FLAGS=--xla_force_host_platform_device_count={topology.chips} before JAX is imported.')
    return virtual[:topology.chips]
  try:
    import libtpu  # noqa: F401  # pylint: disable=g-import-not-at-top
  except ModuleNotFoundError:
    raise UsageError(f"--topology={topology.name!r} needs libtpu, the compiler for TPUs: "
                     "pip install -c constraints.txt -e '.[preflight]'.") from None
  try:
    return topologies.get_topology_desc(
        platform='tpu', topology_name=topology.name, **_OPTIONS.get(topology.generation, {})).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    raise UsageError(f'--topology={topology.name!r} is not supported by libtpu ({reason}).') from None
