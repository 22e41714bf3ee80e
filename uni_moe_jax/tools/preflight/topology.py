"""Devices that are not there, and what one of them can do. Cheap to import: a mistyped topology is answered at once."""

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
  """One chip. Rates are peaks that its maker names; a roofline is a bound from below.

  Attributes:
    memory: bytes that a program may use, as libtpu's compiler says: a little less than the chip has.
    flops: bfloat16 products per second, multiply and add counting two. JAX multiplies float32 arrays on TPU in one bfloat16 pass
      by default, so that it is the peak of both.
    hbm: bytes per second between memory and processor.
    links: bytes per second that a chip can send over all its links together (half of what they carry both ways).
    source: where the figures stand.
  """
  memory: float | None
  flops: float | None
  hbm: float | None
  links: float | None
  source: str


_DOCS = 'https://docs.cloud.google.com/tpu/docs/'
CHIPS: Mapping[str, Chip] = {
    # Six links of 50 GB/s: Jouppi et al., 2023 (arXiv 2304.01433). Elsewhere half of the "bidirectional bandwidth per chip".
    'v4': Chip(30.75 * GIB, 275e12, 1200e9, 300e9, _DOCS + 'v4'),
    'v5e': Chip(15.75 * GIB, 197e12, 819e9, 200e9, _DOCS + 'v5e'),
    'v5p': Chip(95.74 * GIB, 459e12, 2765e9, 600e9, _DOCS + 'v5p'),
    'v6e': Chip(31.25 * GIB, 918e12, 1638e9, 400e9, _DOCS + 'v6e'),
    # Virtual devices of this machine share what it has: nothing is known of one of them.
    'cpu': Chip(None, None, None, None, ''),
}
# Without these, libtpu asks a metadata server that is not there, about hosts that are not there, and two cannot compile at once.
_WITHOUT_TPU = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
                'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
# The two cores of a v4 chip are one device for JAX; asked for nothing, libtpu gives them apart.
_MORE = {'v4': {'chip_config_name': 'megacore'}}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A named topology: 'v5e:16x16', 'v4:2x2x4', 'cpu:64'. chips: how many. chip: of which kind."""
  name: str
  generation: str
  chips: int
  chip: Chip

  @property
  def is_tpu(self) -> bool:
    return self.generation != 'cpu'


def parse(name: str) -> Topology:
  """The topology of a name.

  Raises:
    UsageError: unknown generation, or a shape that it cannot have.
  """
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
    raise UsageError(f'--topology={name!r}: a host has 2 × 2 chips, so that the first two sizes must be even.')
  return Topology(name, generation, math.prod(sizes), CHIPS[generation])


def prepare_environment(topology: Topology) -> None:
  """Settings that JAX and libtpu read when they are loaded: to be called before."""
  for name, value in _WITHOUT_TPU.items():
    os.environ[name] = value
  if not topology.is_tpu:
    flag = f'--xla_force_host_platform_device_count={topology.chips}'  # the last of two equal flags counts
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()


def devices(topology: Topology) -> list[Any]:
  """The devices, to compile for; TPUs cannot hold an array.

  Raises:
    UsageError: libtpu is not installed, or it knows no such topology.
  """
  import jax  # pylint: disable=g-import-not-at-top
  from jax.experimental import topologies  # pylint: disable=g-import-not-at-top
  if not topology.is_tpu:
    found = jax.devices('cpu')
    if len(found) < topology.chips:
      raise UsageError(f'--topology={topology.name!r}: this process was started with {len(found)} virtual devices; set '
                       f'XLA_FLAGS=--xla_force_host_platform_device_count={topology.chips} before JAX is loaded.')
    return found[:topology.chips]
  try:
    import libtpu  # noqa: F401  # pylint: disable=g-import-not-at-top
  except ModuleNotFoundError:
    raise UsageError(f"--topology={topology.name!r} needs libtpu, the compiler for TPUs: pip install -c constraints.txt "
                     "-e '.[preflight]'.") from None
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology.name, **_MORE.get(topology.generation, {})).devices
  except jax.errors.JaxRuntimeError as error:
    raise UsageError(f'--topology={topology.name!r}: libtpu knows no such slice ({str(error).splitlines()[0]}).') from None
