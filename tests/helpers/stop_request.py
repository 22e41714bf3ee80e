"""Stops of a training loop at a step, without a signal."""

from uni_moe_jax.train import loop


class StopAfterThreeSteps(loop.Stop):
  """Requests to stop after three steps, as a signal during the third one would."""

  def __init__(self):
    self.reads = 0

  @property
  def requested(self) -> bool:
    self.reads += 1
    return self.reads > 3
