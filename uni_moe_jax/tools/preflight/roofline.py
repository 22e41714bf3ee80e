"""The least time that a program can take on a chip: what rules it, its products, its memory or its links."""

import dataclasses

from uni_moe_jax.tools.preflight.cost import Cost
from uni_moe_jax.tools.preflight.topology import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds that one device needs at least for each, as if all of it went at its peak."""
  compute: float
  memory: float
  interconnect: float

  @property
  def seconds(self) -> float:
    """Of the whole, if the three overlap perfectly."""
    return max(self.compute, self.memory, self.interconnect)

  @property
  def bound(self) -> str:
    """Which of them rules."""
    return max(('compute', 'memory', 'interconnect'), key=lambda name: getattr(self, name))


def roofline(work: Cost, device: Chip) -> Roofline | None:
  """Of a program's cost on one device; None where nothing is known of the device."""
  if device.flops is None:
    return None
  return Roofline(work.flops / device.flops, work.bytes / device.hbm, sum(work.sent.values()) / device.links)
