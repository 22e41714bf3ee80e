"""The static facts of a run, as `resolve.resolve` finds them: what data, trainer and evaluators share."""

import dataclasses

from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import Kind

VOCABULARY = 'vocabulary'  # as a set's values: every word id


@dataclasses.dataclass(frozen=True)
class TaskSpec:
  """A checked task; fields as in `config.task`. `group` is the batch it is encoded with."""
  name: str
  kind: Kind
  group: str
  source: str
  split: str
  batch: int
  weight: float
  sampling: float
  temperature: str
  target_set: str
  label: str
  captions: tuple[str, ...]
  template: str
  length: int
  picks: int
  smoothing: float
  shift: int
  head: bool = False
  subset: float = 1.0
  per_class: int = 0
  frames: int = 0
  crop: str = 'short'
  flip: bool = False
  randaugment: float = 0.0
  erasing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0

  @property
  def mixes(self) -> bool:
    """Whether neighbours of a batch are mixed, so that an example has two labels."""
    return bool(self.mixup or self.cutmix)


@dataclasses.dataclass(frozen=True)
class SetSpec:
  """A checked target set; fields as in `config.target_set`."""
  name: str
  values: str | tuple[str | tuple[str, ...], ...]
  condition: Condition
  scoring: str
  samples: int
  length: int
  label_prompts: bool = False

  @property
  def is_vocabulary(self) -> bool:
    return self.values == VOCABULARY


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A checked evaluator; fields as in `config.evaluator`."""
  name: str
  kind: str
  task: TaskSpec
  split: str
  number: int
  batch: int
  beams: int
  penalty: float
  answers: str
  views: int = 1
  crops: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static facts of a run.

  Attributes:
    kinds: every known row, those of the config last.
    tasks: that are trained. Tasks of a group lie in the group's batch in this order.
    sets: target sets of trained tasks; with `encode_all_sets` every set.
    probes: tasks that are only evaluated. probe_sets: sets that only they use.
    evaluations: what is measured.
    temperatures: groups that exist.
    encode_all_sets: whether a step of one task encodes every set.
    answer_sets: sets whose texts only evaluators need, as the captions that may be given; the model never encodes them.
  """
  kinds: tuple[Kind, ...]
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
    if not chosen.sampling:  # its weight is how often it is drawn: it counts once
      chosen = dataclasses.replace(chosen, weight=1.0)
    sets = tuple(s for s in self.sets if self.encode_all_sets or s.name == chosen.target_set)
    return dataclasses.replace(self, tasks=(chosen,), sets=sets)
