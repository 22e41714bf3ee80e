"""Task kinds: one declarative row each. Layout, attributes, targets, readout and loss follow from it.

A *kind* is a row of `TASK_TYPES` (or of a config's `kinds`); a *task* is a named instance of a kind in a config. A
new kind is a new row: neither the model nor the trainer names any of them.
"""

import dataclasses
import functools

from uni_moe_jax.tasks import attributes
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

MODALITIES = ('visual', 'text')
MASKS = ('full', 'two_stream')
READOUTS = ('cls', 'masked', 'queries', 'slot')
TARGETS = ('names', 'words', 'pair')


@dataclasses.dataclass(frozen=True)
class Segment:
  """A run of tokens with one modality and one mask kind; one array in the encoder.

  Attributes:
    modality: 'visual' or 'text'.
    mask: 'full' (sees every token of every full segment) or 'two_stream' (a caption, [words | queries]: word
      i sees full segments and words <= i; query i sees full segments, words < i and itself).
  """
  modality: str
  mask: str = 'full'


@dataclasses.dataclass(frozen=True)
class TaskType:
  """One row of the table of task kinds.

  Attributes:
    name: key of the row.
    inputs: input segments in order. The prefix `spe` is token 0 of the first.
    target: a target family ('names', 'words' or one that a config declares) or 'pair': the sample's own text,
      encoded as target, against the texts of the batch.
    readout: which hidden states are matched with targets. 'cls': token 0; 'masked': given positions of the
      text segment; 'queries': the second half of the two-stream segment; 'slot': one given position per sample.
    router_task: the embedding that the task router looks up.
  """
  name: str
  inputs: tuple[Segment, ...]
  target: str
  readout: str
  router_task: str

  @property
  def task_bits(self) -> tuple[int, int, int, int]:
    return attributes.task_bits(tuple(s.modality for s in self.inputs), ('text',))

  @property
  def conditions(self) -> tuple[Condition, ...]:
    """One condition per input segment, in order."""
    return tuple(
        Condition(attributes.bits(self.task_bits, modality=s.modality, side='input',
                                  causal=s.mask == 'two_stream'), self.router_task, s.modality)
        for s in self.inputs)

  @property
  def pair_condition(self) -> Condition:
    """Condition of the paired text, encoded on the target side."""
    row = attributes.bits(self.task_bits, modality='text', side='target', causal=False)
    return Condition(row, self.router_task, 'text')

  @property
  def has_classes(self) -> bool:
    """Whether a sample has one of the entries of a target set as its label: classes, or answers."""
    return self.readout in ('cls', 'slot') and self.target != 'pair'

  @property
  def visual(self) -> bool:
    return any(s.modality == 'visual' for s in self.inputs)

  @property
  def text_index(self) -> int | None:
    """Index of the (only) text segment."""
    return next((i for i, s in enumerate(self.inputs) if s.modality == 'text'), None)

  @property
  def two_stream(self) -> bool:
    return any(s.mask == 'two_stream' for s in self.inputs)


_IMAGE = (Segment('visual'),)
_TEXT = (Segment('text'),)
_CAPTION = (Segment('visual'), Segment('text', 'two_stream'))

TASK_TYPES: dict[str, TaskType] = {k.name: k for k in (
    TaskType('image_classification', _IMAGE, 'names', 'cls', 'classification'),
    TaskType('video_classification', _IMAGE, 'names', 'cls', 'classification'),
    TaskType('text_mlm', _TEXT, 'words', 'masked', 'mlm'),
    TaskType('image_caption', _CAPTION, 'words', 'queries', 'caption'),
    TaskType('video_caption', _CAPTION, 'words', 'queries', 'caption'),
    TaskType('image_retrieval', _IMAGE, 'pair', 'cls', 'retrieval'),
    TaskType('video_retrieval', _IMAGE, 'pair', 'cls', 'retrieval'),
    TaskType('text_classification', _TEXT, 'words', 'slot', 'text_classification'),
    TaskType('vqa', (Segment('visual'), Segment('text')), 'words', 'slot', 'vqa'),
)}


@functools.cache
def families() -> dict[str, Condition]:
  """Condition of each built-in target family: bits 0-3 are the OR over the built-in kinds that use it.

  They are frozen here, over `TASK_TYPES` alone: a kind that a config adds must never move an existing row, because
  a trained router has learnt it. See `check_task_type`.
  """
  rows: dict[str, tuple[int, ...]] = {}
  for kind in TASK_TYPES.values():
    if kind.target != 'pair':
      rows[kind.target] = attributes.union(rows.get(kind.target, kind.task_bits), kind.task_bits)
  return {name: family_condition(name, row) for name, row in rows.items()}


def family_condition(name: str, task_bits: tuple[int, int, int, int]) -> Condition:
  """Condition of a set of texts that serve as targets."""
  row = attributes.bits(task_bits, modality='text', side='target', causal=False)
  return Condition(row, name, 'text')


def router_tasks() -> tuple[str, ...]:
  """Names that the task router has an embedding for, in the order of its table (video equals image)."""
  return tuple(dict.fromkeys([k.router_task for k in TASK_TYPES.values()] + list(families())))


def check_task_type(kind: TaskType, known_families: dict[str, Condition]) -> None:
  """Raises UsageError if a row is malformed or would change the frozen bits of a family."""
  if not kind.inputs:
    raise UsageError(f'kind {kind.name!r} has no input segment; give at least one.')
  if kind.readout not in READOUTS:
    raise UsageError(f'kind {kind.name!r}: readout {kind.readout!r} is not one of {READOUTS}.')
  for s in kind.inputs:
    if s.modality not in MODALITIES:
      raise UsageError(f'kind {kind.name!r}: modality {s.modality!r} is not one of {MODALITIES}.')
    if s.mask not in MASKS:
      raise UsageError(f'kind {kind.name!r}: mask {s.mask!r} is not one of {MASKS}.')
    if s.mask == 'two_stream' and s.modality != 'text':
      raise UsageError(f"kind {kind.name!r}: mask 'two_stream' is for words; a {s.modality} segment must have mask "
                       "'full'.")
  if sum(s.modality == 'text' for s in kind.inputs) > 1:
    raise UsageError(f'kind {kind.name!r} has two text segments; join them by a template into one.')
  if kind.inputs[0].mask != 'full':
    raise UsageError(f"kind {kind.name!r}: the first segment holds the prefix and must have mask 'full'.")
  if kind.readout == 'queries' and not kind.two_stream:
    raise UsageError(f"kind {kind.name!r}: readout 'queries' needs a segment with mask 'two_stream'.")
  if kind.readout in ('masked', 'slot') and kind.text_index is None:
    raise UsageError(f'kind {kind.name!r}: readout {kind.readout!r} needs a text segment.')
  if kind.readout in ('masked', 'slot') and kind.two_stream:
    raise UsageError(f"kind {kind.name!r}: readout {kind.readout!r} needs a text segment with mask 'full'; a two-stream "
                     "one is read at its queries.")
  if kind.target == 'pair':
    if kind.readout != 'cls':
      raise UsageError(f"kind {kind.name!r}: target 'pair' needs readout 'cls', not {kind.readout!r}.")
    return
  if kind.target not in known_families:
    raise UsageError(f'kind {kind.name!r}: target family {kind.target!r} is not declared;'
                     f' {nearest(kind.target, [*known_families, "pair"])}.')
  frozen = known_families[kind.target].bits[:4]
  if attributes.union(frozen, kind.task_bits) != frozen:
    raise UsageError(
        f'kind {kind.name!r} with task bits {kind.task_bits} would change the frozen bits {frozen} of target '
        f'family {kind.target!r}: declare a new family for it, so that trained rows never move.')
