"""What the processes of a run must agree on, so that none takes a step that another does not take."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uni_moe_jax import sharding


class AnyProcess:
  """Whether a flag is up in any process, told to all at the same call; without waiting for the step that runs.

  With several processes the answer is that to the call before: by then its sum, which queues behind a step, is there.
  """

  def __init__(self, mesh: Mesh):
    self._split = NamedSharding(mesh, PartitionSpec(sharding.AXES))
    self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))
    self._devices, self._here = mesh.size, len(mesh.local_devices)
    self._several = len({d.process_index for d in mesh.devices.flat}) > 1
    self._asked = None

  def __call__(self, flag: bool) -> bool:
    """To be called by every process, as often as by the others."""
    if not self._several:
      return flag
    flags = jax.make_array_from_process_local_data(self._split, np.full(self._here, flag), (self._devices,))
    before, self._asked = self._asked, self._any(flags)
    return before is not None and bool(before)


def check_same_data(fingerprint: str) -> None:
  """Raises ValueError, in every process, where one reads other data or has another tokenizer. fingerprint: hex."""
  if jax.process_count() == 1:
    return
  prints = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(fingerprint), np.uint8))
  others = [str(i) for i, p in enumerate(prints) if (p != prints[0]).any()]
  if others:
    raise ValueError(f'process {", ".join(others)} of {len(prints)} reads other data than process 0, or another tokenizer: make '
                     'config.data.dir the same prepared data for all, or build it anew there (launch/prepare_data.py).')
