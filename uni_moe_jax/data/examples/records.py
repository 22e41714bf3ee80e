"""Records: one split of a source, as columns with random access."""

import dataclasses
import functools
import hashlib

import numpy as np

from uni_moe_jax.utils.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Records:
  """Records of one split, in memory.

  Attributes:
    columns: Arrays by name. Pixels are gray, uint8 [N, H, W] or [N, T, H, W]; texts and labels are unicode [N].
    classes: Label column → its class names in order. A label column holds class names; '' means no label.
  """
  columns: dict[str, np.ndarray]
  classes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    """Raises UsageError for a column of another type or shape. Python strings are converted to unicode."""
    columns = {name: _checked(name, np.asarray(column)) for name, column in self.columns.items()}
    if len(set((sizes := {name: len(column) for name, column in columns.items()}).values())) > 1:
      raise UsageError(f'columns of records must have the same length, got {sizes}.')
    if others := [(name, x) for name, names in self.classes.items() for x in names if not isinstance(x, str)]:
      raise UsageError(f'classes of {others[0][0]!r} of records have the name {others[0][1]!r}; names are strings.')
    object.__setattr__(self, 'columns', columns)

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


def _checked(name: str, column: np.ndarray) -> np.ndarray:
  """A valid column of records; other text is invisible to tokenizers, other pixels are not those of exported models."""
  problem = f'column {name!r} of records is {column.dtype} {list(column.shape)}'
  if name == 'pixels':
    # A last axis of one or three is of channels.
    if column.dtype != np.uint8 or column.ndim not in (3, 4) or column.ndim == 4 and column.shape[-1] in (1, 3):
      raise UsageError(f'{problem}; images are gray, uint8 [N, H, W] with values of 0 to 255, and videos uint8 '
                       '[N, T, H, W]. Convert them, or prepare files by `uni-moe prepare-data`.')
    return column
  if column.dtype.kind in 'OT':
    texts = column.ravel().tolist()
    if others := [item for item in texts if not isinstance(item, str)]:
      raise UsageError(f"column {name!r} of records has the item {others[0]!r}; texts and labels are strings, '' where "
                       'there is none.')
    column = np.array(texts, str).reshape(column.shape)
  if column.dtype.kind != 'U' or column.ndim != 1:
    raise UsageError(f'{problem}; texts and labels are strings [N]: convert them by `.astype(str)`.')
  return column
