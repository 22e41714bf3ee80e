"""Task types: one declarative row each. Layout, attributes, targets, readout and loss follow from it.

A *task type* is a row of `TASK_TYPES` (or of `config.task_types`); a *task* is a named instance of it in a config. A
new task type is a new row: neither the model nor the trainer names any of them.
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


@dataclasses.dataclass(frozen=True)
class Segment:
  """A run of tokens with one modality and one mask; one array in the encoder."""
  modality: str  # 'visual' or 'text'
  mask: str = 'full'  # or 'two_stream', a caption; see `model/masks.py`


@dataclasses.dataclass(frozen=True)
class TaskType:
  """One row of the table of task types."""
  name: str  # key of the row
  inputs: tuple[Segment, ...]  # in order; the readout token `spe` is token 0 of the first
  # A target family ('names', 'words' or one of `config.target_families`), or 'pair': the sample's own text, encoded as
  # target, against the texts of the batch.
  target: str
  # Hidden states that are matched with targets. 'cls': token 0; 'masked': given positions of the text segment;
  # 'queries': the second half of the two-stream segment; 'slot': one given position per sample.
  readout: str
  router_task: str  # name that the task router embeds

  @property
  def task_bits(self) -> tuple[int, ...]:
    return attributes.task_bits(tuple(s.modality for s in self.inputs), ('text',))

  @property
  def conditions(self) -> tuple[Condition, ...]:
    """One condition per input segment, in order."""
    return tuple(
        Condition(attributes.bits(self.task_bits, modality=s.modality, side='input', causal=s.mask == 'two_stream'),
                  self.router_task, s.modality)
        for s in self.inputs)

  @property
  def pair_condition(self) -> Condition:
    """Condition of the paired text, encoded on the target side."""
    return family_condition(self.router_task, self.task_bits)

  @property
  def has_classes(self) -> bool:
    """Whether a sample's label is an entry of a target set: a class, or an answer."""
    return self.readout in ('cls', 'slot') and self.target != 'pair'

  @property
  def visual(self) -> bool:
    return any(s.modality == 'visual' for s in self.inputs)

  @property
  def text_index(self) -> int | None:
    return next((i for i, s in enumerate(self.inputs) if s.modality == 'text'), None)

  @property
  def two_stream(self) -> bool:
    return any(s.mask == 'two_stream' for s in self.inputs)


_IMAGE = (Segment('visual'),)
_TEXT = (Segment('text'),)
_CAPTION = (Segment('visual'), Segment('text', 'two_stream'))

TASK_TYPES: dict[str, TaskType] = {t.name: t for t in (
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
  """Condition of each built-in target family: bits 0-3 are the OR over its built-in task types.

  They follow from `TASK_TYPES` alone: a task type of a config must not change them, because trained routers depend on
  them. See `check_task_type`.
  """
  bits: dict[str, tuple[int, ...]] = {}
  for t in TASK_TYPES.values():
    if t.target != 'pair':
      bits[t.target] = attributes.union(bits.get(t.target, t.task_bits), t.task_bits)
  return {name: family_condition(name, task_bits) for name, task_bits in bits.items()}


def family_condition(name: str, task_bits: tuple[int, ...]) -> Condition:
  """Condition of texts that serve as targets: of a target family, or paired with inputs."""
  return Condition(attributes.bits(task_bits, modality='text', side='target', causal=False), name, 'text')


def router_tasks() -> tuple[str, ...]:
  """Names that the task router embeds, in the order of its table (video shares those of image)."""
  return tuple(dict.fromkeys([t.router_task for t in TASK_TYPES.values()] + list(families())))


def check_task_type(t: TaskType, known_families: dict[str, Condition]) -> None:
  """Raises UsageError if a task type is malformed or would change the frozen bits of a target family."""
  def fail(message: str) -> None:
    raise UsageError(f'task type {t.name!r}{message}')

  if not t.inputs:
    fail(' has no input segment; give at least one.')
  reads_text = t.readout in ('masked', 'slot')
  for malformed, message in (
      (t.readout not in READOUTS, f': readout {t.readout!r} is not one of {READOUTS}.'),
      *(error for s in t.inputs for error in (
          (s.modality not in MODALITIES, f': modality {s.modality!r} is not one of {MODALITIES}.'),
          (s.mask not in MASKS, f': mask {s.mask!r} is not one of {MASKS}.'),
          (s.mask == 'two_stream' and s.modality != 'text',
           f": mask 'two_stream' is for words; a {s.modality} segment must have mask 'full'."))),
      (sum(s.modality == 'text' for s in t.inputs) > 1, ' has two text segments; join them by a template into one.'),
      (t.inputs[0].mask != 'full', ": the first segment contains the readout token and must have mask 'full'."),
      (t.readout == 'queries' and not t.two_stream, ": readout 'queries' needs a segment with mask 'two_stream'."),
      (reads_text and t.text_index is None, f': readout {t.readout!r} needs a text segment.'),
      (reads_text and t.two_stream, f": readout {t.readout!r} needs a text segment with mask 'full'; a two-stream "
                                    'segment is read at its queries.'),
      (t.target == 'pair' and t.readout != 'cls', f": target 'pair' needs readout 'cls', not {t.readout!r}.")):
    if malformed:
      fail(message)
  if t.target == 'pair':
    return
  if t.target not in known_families:
    fail(f': target family {t.target!r} is not declared; {nearest(t.target, [*known_families, "pair"])}.')
  frozen = known_families[t.target].bits[:4]
  if attributes.union(frozen, t.task_bits) != frozen:
    fail(f' with task bits {t.task_bits} would change the frozen bits {frozen} of target family {t.target!r}: declare '
         'a new family for it, so that trained routers stay valid.')
