"""Peak rates of devices, FLOP/s, by which the products of a step are measured."""

import re
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from uni_moe_jax.parallel import sharding

# FLOP/s of dense bfloat16 products with float32 sums, by JAX's `device_kind`. Data sheets of NVIDIA, most of
# which give the rate with sparsity, twice this one, and of Google, whose source is in preflight/topology.py.
PEAKS = {
    r'NVIDIA A10': 125e12,  # A10 datasheet
    r'NVIDIA A100.*GB( PCIe)?': 312e12,  # A100 datasheet: the same for SXM and PCIe
    r'NVIDIA L4': 121e12,  # L4 datasheet: 242 with sparsity
    r'NVIDIA L40S': 362e12,  # L40S datasheet: 733 with sparsity
    r'NVIDIA H100 80GB HBM3': 989e12,  # H100 datasheet, SXM: 1,979 with sparsity
    r'NVIDIA H100 PCIe': 756e12,  # H100 datasheet: 1,513 with sparsity
    r'NVIDIA H100 NVL': 835e12,  # H100 datasheet: 1,671 with sparsity
    r'NVIDIA H200': 989e12,  # H200 datasheet, SXM: 1,979 with sparsity
    r'NVIDIA H200 NVL': 835e12,  # H200 datasheet: 1,671 with sparsity
    r'TPU v4': 275e12,
    r'TPU v5( lite|e)': 197e12,
    r'TPU v5p?': 459e12,
    r'TPU v6( lite|e)': 918e12,
}
_SIDE, _CALLS = 1024, 5  # of the square matrices whose product shows the rate of CPU cores


def of_kind(device_kind: str) -> float | None:
  """The vendor's peak; None for a device that the table lacks, or a part of a card."""
  return next((rate for pattern, rate in PEAKS.items() if re.fullmatch(pattern, device_kind)), None)


def of_mesh(mesh: Mesh, matmul: Callable[[jax.Array, jax.Array], jax.Array]) -> float | None:
  """The peak of all devices together; of CPU cores, what each process measures on its own for `matmul` of float32."""
  if sharding.platform(mesh) == 'cpu':
    return _measured(mesh.local_devices[0], matmul) * jax.process_count()  # devices of a process share its cores
  rate = of_kind(mesh.devices.flat[0].device_kind)
  return rate and rate * mesh.size


def _measured(device: jax.Device, matmul: Callable[[jax.Array, jax.Array], jax.Array]) -> float:
  """The best rate of a few products, in a fraction of a second."""
  product, x, seconds = jax.jit(matmul), jax.device_put(np.ones((_SIDE, _SIDE), np.float32), device), []
  for _ in range(_CALLS):
    started = time.perf_counter()
    product(x, x).block_until_ready()
    seconds.append(time.perf_counter() - started)
  return 2.0 * _SIDE**3 / min(seconds)
