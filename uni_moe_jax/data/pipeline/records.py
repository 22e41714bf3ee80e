"""Where records come from: every source gives one split as columns that can be read at random."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Records:
  """Randomly accessible records of one split, in memory; every column has the leading axis N.

  Attributes:
    columns: arrays by name. Pixels are uint8 [N, H, W] or [N, T, H, W] (grey), or the same with a
      last axis of 3; texts and labels are numpy unicode arrays [N].
    classes: label column -> its class names in order. A label column holds class *names*; '' is no
      label.
    fingerprint: hex sha256 of what the columns hold.
  """
  columns: dict[str, np.ndarray]
  classes: dict[str, tuple[str, ...]]
  fingerprint: str
