"""Records: one split of a source, as columns with random access."""

import dataclasses
import functools
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Records:
  """Records of one split, in memory.

  Attributes:
    columns: Arrays by name. Pixels are gray, uint8 [N, H, W] or [N, T, H, W]; texts and labels are unicode [N].
    classes: Label column → its class names in order. A label column holds class names; '' means no label.
  """
  columns: dict[str, np.ndarray]
  classes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

  @property
  def size(self) -> int:
    return len(next(iter(self.columns.values())))

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hex sha256 of names, shapes and values, which does not depend on how they are stored."""
    digest = hashlib.sha256()

    def put(part: bytes) -> None:
      digest.update(len(part).to_bytes(8, 'little'))
      digest.update(part)

    for name in sorted(self.columns):
      column = np.ascontiguousarray(self.columns[name])
      is_text = column.dtype.kind == 'U'
      put(f'{name} {"text" if is_text else column.dtype.name} {column.shape}'.encode())
      # A unicode array is padded to its longest item; padding is not content.
      put('\0'.join(column.ravel().tolist()).encode() if is_text else column.data)
    for name in sorted(self.classes):
      put('\0'.join((name, *self.classes[name])).encode())
    return digest.hexdigest()
