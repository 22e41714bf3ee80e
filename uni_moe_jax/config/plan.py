"""The static facts of a run, as `resolve.resolve` finds them: what data, trainer and evaluators share."""

import dataclasses

from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import TaskType

VOCABULARY = 'vocabulary'  # as a set's values: every word id


@dataclasses.dataclass(frozen=True)
class TaskSpec:
  """A checked task; fields as in `config.task`. `group` is the batch_size it is encoded with."""
  name: str
  type: TaskType
  group: str
  source: str
  split: str
  batch_size: int
  loss_weight: float
  sampling_weight: float
  temperature: str
  target_set: str
  label_column: str
  caption_templates: tuple[str, ...]
  template: str
  max_len: int
  max_predictions: int
  label_smoothing: float
  max_shift: int
  linear_head: bool = False
  train_fraction: float = 1.0
  shots: int = 0
  num_frames: int = 0
  crop: str = 'resize_crop'
  random_flip: bool = False
  randaugment: float = 0.0
  random_erasing: float = 0.0
  mixup_alpha: float = 0.0
  cutmix_alpha: float = 0.0

  @property
  def mixes(self) -> bool:
    """Whether neighbours of a batch_size are mixed, so that an example has two labels."""
    return bool(self.mixup_alpha or self.cutmix_alpha)


@dataclasses.dataclass(frozen=True)
class SetSpec:
  """A checked target set; fields as in `config.target_set`."""
  name: str
  entries: str | tuple[str | tuple[str, ...], ...]
  condition: Condition
  softmax: str
  num_sampled: int
  max_len: int
  label_prompts: bool = False

  @property
  def is_vocabulary(self) -> bool:
    return self.entries == VOCABULARY


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A checked evaluator; fields as in `config.evaluator`."""
  name: str
  type: str
  task: TaskSpec
  split: str
  num_examples: int
  batch_size: int
  beam_size: int
  length_penalty: float
  constrain_to: str
  num_views: int = 1
  num_crops: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static facts of a run.

  Attributes:
    task_types: every known row, those of the config last.
    tasks: that are trained. Tasks of a group lie in the group's batch in this order.
    sets: target sets of trained tasks; with `encode_all_sets` every set.
    probes: tasks that are only evaluated. probe_sets: sets that only they use.
    evaluations: what is measured.
    temperatures: groups that exist.
    encode_all_sets: whether a step of one task encodes every set.
    answer_sets: sets whose texts only evaluators need, as the captions that may be given; the model never encodes them.
  """
  task_types: tuple[TaskType, ...]
  tasks: tuple[TaskSpec, ...]
  sets: tuple[SetSpec, ...]
  probes: tuple[TaskSpec, ...]
  probe_sets: tuple[SetSpec, ...]
  evaluations: tuple[Evaluation, ...]
  temperatures: tuple[str, ...]
  encode_all_sets: bool = False
  answer_sets: tuple[SetSpec, ...] = ()

  @property
  def groups(self) -> dict[str, tuple[TaskSpec, ...]]:
    """Tasks by group, in order."""
    out: dict[str, tuple[TaskSpec, ...]] = {}
    for t in self.tasks:
      out[t.group] = (*out.get(t.group, ()), t)
    return out

  def only(self, task_name: str) -> 'Plan':
    """The plan of a step that holds one task, with the sets that it needs."""
    chosen = next(t for t in self.tasks if t.name == task_name)
    if not chosen.sampling_weight:  # its weight is how often it is drawn: it counts once
      chosen = dataclasses.replace(chosen, loss_weight=1.0)
    sets = tuple(s for s in self.sets if self.encode_all_sets or s.name == chosen.target_set)
    return dataclasses.replace(self, tasks=(chosen,), sets=sets)
