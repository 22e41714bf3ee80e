"""Records: one split of a source, as columns with random access."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Records:
  """Records of one split, in memory.

  Attributes:
    columns: Arrays by name. Pixels are gray, uint8 [N, H, W] or [N, T, H, W]; texts and labels are unicode [N].
    classes: Label column → its class names in order. A label column holds class names; '' means no label.
  """
  columns: dict[str, np.ndarray]
  classes: dict[str, tuple[str, ...]]
  fingerprint: str  # see `npz_records.fingerprint`

  @property
  def size(self) -> int:
    return len(next(iter(self.columns.values())))
