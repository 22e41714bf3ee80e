"""The eight attribute bits of a token, the router input of attribute routing.

Uni-Perceiver-MoE, section 3.3 and table 1. Bits are computed from the declaration of a task type (`task_types.py`), and
never written as literals.

bit      0             1             2             3             4       5     6       7
meaning  input visual  input text    target visual target text   visual  text  target  causal
         (of the task) (of the task) (of the task) (of the task) (token) (token side)  (token mask)
"""

import dataclasses
from collections.abc import Hashable

from uni_moe_jax.utils.errors import UsageError

NUM_ATTRIBUTES = 8

Bits = tuple[int, ...]  # eight


def bits(task_bits: tuple[int, ...], *, modality: str, side: str, causal: bool) -> Bits:
  """Attribute bits of a segment's tokens: of their task, then their own. side: 'input' or 'target'."""
  visual = int(modality == 'visual')
  return (*task_bits, visual, 1 - visual, int(side == 'target'), int(causal))


def task_bits(inputs: tuple[str, ...], targets: tuple[str, ...]) -> tuple[int, ...]:
  """Bits 0-3 of a task: the modalities of its input and its target, in any order."""
  return tuple(int(m in side) for side in (inputs, targets) for m in ('visual', 'text'))


def union(*rows: tuple[int, ...]) -> tuple[int, ...]:
  """Bitwise OR of rows of equal length: a target family has the bits of all its task types."""
  return tuple(max(column) for column in zip(*rows, strict=True))


def to_string(row: Bits) -> str:
  """'10011000' for (1, 0, 0, 1, 1, 0, 0, 0)."""
  return ''.join(map(str, row))


def check_bits(row: Hashable) -> None:
  """Raises UsageError unless a row is a tuple of eight bits."""
  if not isinstance(row, tuple) or len(row) != NUM_ATTRIBUTES or not set(row) <= {0, 1}:
    got = f'{row!r} of {len(row)}' if isinstance(row, tuple) else repr(row)
    raise UsageError(f'attribute bits of a condition must be a tuple of {NUM_ATTRIBUTES} zeros and ones, got {got}.')


@dataclasses.dataclass(frozen=True)
class Condition:
  """The input of data-independent routers; one per array of a sequence."""
  bits: Bits  # attribute routing
  task: str  # name that the task router embeds: of task types or of target sets
  modality: str  # 'visual' or 'text' (modality routing)

  def __post_init__(self):
    check_bits(self.bits)

  @property
  def is_target(self) -> bool:
    """Whether the tokens are on the target side (bit 6)."""
    return bool(self.bits[6])

  def __str__(self) -> str:
    return f'{to_string(self.bits)} ({self.task}, {self.modality})'
