"""The least time of a program on a chip, by its compute, its memory traffic and its interconnect."""

import dataclasses

from uni_moe_jax.tools.preflight.cost import Cost
from uni_moe_jax.tools.preflight.topology import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds that one device needs for each resource at its peak."""
  compute: float
  memory: float
  interconnect: float

  @property
  def seconds(self) -> float:
    """Of the program, if the three overlap perfectly."""
    return max(self.compute, self.memory, self.interconnect)

  @property
  def bound(self) -> str:
    """The limiting resource."""
    return max(('compute', 'memory', 'interconnect'), key=lambda name: getattr(self, name))


def roofline(cost: Cost, chip: Chip) -> Roofline | None:
  """Return the roofline of a cost per device; None if the peaks of the chip are unknown."""
  if chip.flops is None:
    return None
  return Roofline(cost.flops / chip.flops, cost.bytes / chip.hbm, sum(cost.sent.values()) / chip.links)
