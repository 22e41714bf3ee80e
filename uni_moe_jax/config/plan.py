"""The plan of a run: its checked config, and the facts that data, trainer and evaluators share."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from uni_moe_jax.config import schema, validate
from uni_moe_jax.config.fields import check_choice, fail_if, short
from uni_moe_jax.config.schema import Config, ModelConfig
from uni_moe_jax.config.task_schema import VOCABULARY, EvaluatorConfig, TargetSetConfig, TaskConfig
from uni_moe_jax.tasks import task_types
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import TaskType
from uni_moe_jax.utils.suggest import nearest

# Evaluator type → whether it can evaluate a task type.
EVALUATIONS: dict[str, Callable[[TaskType], bool]] = {
    'classification': lambda t: t.has_classes,
    'retrieval': lambda t: t.target == 'pair',
    'mlm': lambda t: t.readout == 'masked',
    'caption': lambda t: t.readout == 'queries',
    'glue': lambda t: t.readout == 'slot' and not t.visual,
    'vqa': lambda t: t.readout == 'slot' and t.visual,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec(TaskConfig):
  """A checked task. group: name of the tasks that are encoded as one batch."""
  name: str
  type: TaskType
  group: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSpec(TargetSetConfig):
  """A checked target set and the condition of its texts."""
  name: str
  condition: Condition

  @property
  def is_vocabulary(self) -> bool:
    return self.entries == VOCABULARY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(EvaluatorConfig):
  """A checked evaluator and its task."""
  name: str
  task: TaskSpec
  reranker: TaskSpec | None = None  # of `rerank_by`


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static facts of a run.

  Attributes:
    task_types: all known task types, those of the config last.
    tasks: trained tasks. Tasks of a group are concatenated in the group's batch in this order.
    sets: target sets of trained tasks; with `encode_all_sets` every set.
    probes: tasks that are only evaluated. probe_sets: sets that only they use.
    evaluations: evaluations of the run.
    temperatures: temperature groups.
    encode_all_sets: whether a step of one task encodes every set.
    config: the checked config.
  """
  task_types: tuple[TaskType, ...]
  tasks: tuple[TaskSpec, ...]
  sets: tuple[SetSpec, ...]
  probes: tuple[TaskSpec, ...]
  probe_sets: tuple[SetSpec, ...]
  evaluations: tuple[Evaluation, ...]
  temperatures: tuple[str, ...]
  encode_all_sets: bool = False
  config: Config | None = dataclasses.field(default=None, compare=False, repr=False)

  @property
  def groups(self) -> dict[str, tuple[TaskSpec, ...]]:
    """Tasks by group, in order."""
    names = dict.fromkeys(t.group for t in self.tasks)
    return {name: tuple(t for t in self.tasks if t.group == name) for name in names}

  @property
  def conditions(self) -> tuple[Condition, ...]:
    """Conditions of all input segments, paired texts and target sets, probes included."""
    out = []
    for t in (*self.tasks, *self.probes):
      out += [*t.type.conditions, *([t.type.pair_condition] if t.type.target == 'pair' else [])]
    return tuple(dict.fromkeys(out + [s.condition for s in (*self.sets, *self.probe_sets)]))

  @property
  def router_tasks(self) -> tuple[str, ...]:
    """Names in the task router's table: built-in ones, then those of the config."""
    own = [t.router_task for t in self.task_types] + [t.target for t in self.task_types if t.target != 'pair']
    own += [s.condition.task for s in (*self.sets, *self.probe_sets)]
    return tuple(dict.fromkeys([*task_types.router_tasks(), *own]))

  def task_slices(self, divisor: int) -> dict[str, slice]:
    """{task: its slice of its group's batch}, with batch sizes divided by `divisor`, shards · micro-steps."""
    slices = {}
    for tasks in self.groups.values():
      start = 0
      for t in tasks:
        slices[t.name] = slice(start, start + t.batch_size // divisor)
        start = slices[t.name].stop
    return slices

  def only(self, task_name: str) -> 'Plan':
    """The plan of a step of one task, with the sets that the step needs."""
    chosen = next(t for t in self.tasks if t.name == task_name)
    if not chosen.sampling_weight:  # the loss weight is the sampling weight: the loss has weight 1
      chosen = dataclasses.replace(chosen, loss_weight=1.0)
    sets = tuple(s for s in self.sets if self.encode_all_sets or s.name == chosen.target_set)
    return dataclasses.replace(self, tasks=(chosen,), sets=sets)

  def check_trains(self) -> None:
    """Raise UsageError if the plan only evaluates."""
    fail_if(not self.tasks,
            'tasks: every task has batch_size=0, so there is nothing to train; evaluate the run in config.train.init '
            'with uni-moe evaluate --config=… --workdir=….')

  def check_batches(self, shards: int, accum: int) -> None:
    """Raise UsageError if a task's micro-batch does not divide over the batch shards of the mesh."""
    for t in self.tasks:
      _check_multiple(t, shards * accum, f'({shards} batch shards of the mesh × {accum} micro-steps)')
      if t.mixes:
        _check_multiple(t, 2 * shards * accum, 'for mixup or CutMix, which mix pairs of a shard '
                        f'({shards} batch shards × {accum} micro-steps × 2)')


def _check_multiple(t: TaskSpec, unit: int, reason: str) -> None:
  fail_if(t.batch_size % unit, f'tasks.{t.name}.batch_size={t.batch_size} must be a multiple of {unit} {reason}; try '
                               f'{validate.nearest_multiple(t.batch_size, unit)}.')


def make_plan(c: ml_collections.ConfigDict) -> Plan:
  """Check the whole config and return its plan.

  Raises:
    UsageError: the first field that is wrong: its name, its value, the bound and the fix.
  """
  config = schema.parse_config(c)
  validate.check_sections(config)
  families = {**task_types.families(), **{name: _own_family(name, x) for name, x in config.target_families.items()}}
  types = {**task_types.TASK_TYPES, **{name: _own_task_type(name, x) for name, x in config.task_types.items()}}
  for name in config.task_types:
    task_types.check_task_type(types[name], families)
  sets = {name: _set_spec(name, s, families) for name, s in config.target_sets.items()}
  fail_if(not any(t.batch_size for t in config.tasks.values()) and not (config.train.init and config.evaluators),
          'tasks has no task with batch_size > 0; add one with config.task(…). To evaluate another run as it is, set '
          'config.train.init to its work directory and add config.evaluators.')
  with_head = [name for name, t in config.tasks.items() if t.linear_head]
  fail_if(len(with_head) > 1, f'tasks: {" and ".join(with_head)} both have linear_head=True; one task at most has a '
                              'linear head.')
  every = [_task_spec(name, t, types, sets, config) for name, t in config.tasks.items()]
  tasks, probes = tuple(t for t in every if t.batch_size), tuple(t for t in every if not t.batch_size)
  temperatures = tuple(sorted({t.temperature for t in tasks} | set(config.model.extra_temperature_groups)))
  used = set(sets) if config.train.encode_all_sets else {t.target_set for t in tasks}
  for t in probes:
    # Retrieval only orders candidates, which needs no scale.
    fail_if(t.temperature not in temperatures and t.type.target != 'pair',
            f'tasks.{t.name}.temperature={t.temperature!r}: no trained task has this group, so its scale would be '
            f'unknown; {nearest(t.temperature, temperatures)}.')
    fail_if(t.target_set and t.target_set not in used and sets[t.target_set].label_prompts,
            f'target_sets.{t.target_set}.label_prompts=True: no trained task uses this set, so its prompts would '
            'stay zero; train a task with it, or set it to False.')
  evaluations = tuple(
      _evaluation(name, e, every, sets, temperatures, config.model) for name, e in config.evaluators.items())
  probed = {t.target_set for t in probes} - used
  return Plan(task_types=tuple(types.values()), tasks=tasks, sets=_named(used, sets), probes=probes,
              probe_sets=_named(probed, sets), evaluations=evaluations, temperatures=temperatures,
              encode_all_sets=config.train.encode_all_sets, config=config)


def _named(names: set[str], sets: Mapping[str, SetSpec]) -> tuple[SetSpec, ...]:
  return tuple(s for name, s in sets.items() if name in names)


def _own_family(name: str, bits: Any) -> Condition:
  field = f'target_families.{name}'
  fail_if(name in task_types.families(),
          f'{field}: a built-in family has this name, and its bits are frozen; choose another.')
  fail_if(not isinstance(bits, (tuple, list)) or len(bits) != 4 or any(b not in (0, 1) for b in bits),
          f'{field}={short(bits)} must be four bits: input visual, input text, target visual, target text; for example '
          '(1, 0, 0, 1).')
  return task_types.family_condition(name, tuple(bits))


def _own_task_type(name: str, values: Any) -> TaskType:
  field, expected = f'task_types.{name}', {f.name for f in dataclasses.fields(TaskType)} - {'name'}
  fail_if(name in task_types.TASK_TYPES, f'{field}: a built-in task type has this name; choose another.')
  fail_if(not isinstance(values, ml_collections.ConfigDict),
          f'{field}={short(values)} must be a section with {", ".join(sorted(expected))}.')
  wrong = set(values) ^ expected
  fail_if(wrong, f'{field}: {", ".join(sorted(wrong))} missing or unknown; give {", ".join(sorted(expected))}.')
  is_segment = lambda s: isinstance(s, (tuple, list)) and len(s) in (1, 2) and all(isinstance(x, str) for x in s)
  fail_if(not isinstance(values.inputs, (tuple, list)) or not all(map(is_segment, values.inputs)),
          f'{field}.inputs={short(values.inputs)} must be a tuple of (modality, mask) pairs, for example '
          "(('visual', 'full'),).")
  for key in sorted(expected - {'inputs'}):
    fail_if(not isinstance(values[key], str), f'{field}.{key}={short(values[key])} must be a string, such as '
                                              f'{getattr(task_types.TASK_TYPES["vqa"], key)!r}.')
  return TaskType(**{**values, 'name': name, 'inputs': tuple(task_types.Segment(*s) for s in values.inputs)})


def _set_spec(name: str, s: TargetSetConfig, families: Mapping[str, Condition]) -> SetSpec:
  field = f'target_sets.{name}'
  check_choice(f'{field}.family', s.family, families)
  spec = SetSpec(**vars(s), name=name, condition=families[s.family])
  fail_if(s.softmax == 'sampled' and (not spec.is_vocabulary or s.num_sampled < 2),
          f"{field}: softmax='sampled' needs entries='{VOCABULARY}' and num_sampled ≥ 2, not entries={s.entries!r}, "
          f'num_sampled={s.num_sampled}.')
  fail_if(s.label_prompts and spec.is_vocabulary, f'{field}.label_prompts=True is for sets of texts: each word of the '
                                                  'vocabulary already has a learned embedding; set it to False.')
  return spec


def _array_shape(t: TaskConfig, is_visual: bool) -> tuple[int | str, ...]:
  """What the array shapes of a task of one type depend on: tokens, predictions, frames, labels.

  The frames of embedded videos are not known before they are read; its name stands for them.
  """
  of_files = (t.num_frames, 2 if t.mixes else 1) if t.num_frames or t.mixes else ()
  in_memory = (t.source,) if is_visual and ':' not in t.source else ()
  return t.max_len, t.max_predictions, *of_files, *in_memory


def _task_spec(
    name: str, t: TaskConfig, types: Mapping[str, TaskType], sets: Mapping[str, SetSpec], c: Config) -> TaskSpec:
  check_choice(f'tasks.{name}.type', t.type, types)
  task_type = types[t.type]
  validate.check_task(name, t, task_type, c)
  _check_target_set(name, t, task_type, sets)
  # Tasks of a type share a batch only if their arrays have the same shapes.
  shape = functools.partial(_array_shape, is_visual=task_type.visual)
  shapes = {shape(other) for other in c.tasks.values() if other.type == t.type and other.batch_size}
  group = t.type if len(shapes) <= 1 else '/'.join(map(str, (t.type, *shape(t))))
  return TaskSpec(**{**vars(t), 'name': name, 'type': task_type, 'group': group,
                     'temperature': t.temperature or t.type})


def _check_target_set(name: str, t: TaskConfig, task_type: TaskType, sets: Mapping[str, SetSpec]) -> None:
  field = f'tasks.{name}.target_set'
  if task_type.target == 'pair':
    fail_if(t.target_set,
            f"{field}={t.target_set!r}: task type {t.type!r} is matched with its own texts; set it to ''.")
  else:
    check_choice(field, t.target_set, sets)
    chosen = sets[t.target_set]
    fail_if(chosen.family != task_type.target,
            f'{field}={t.target_set!r} is of family {chosen.family!r}, but task type {t.type!r} chooses among '
            f'{task_type.target!r}.')
    fail_if(task_type.readout in ('masked', 'queries') and not chosen.is_vocabulary,
            f'{field}={t.target_set!r}: task type {t.type!r} predicts words; its set must have '
            f"entries='{VOCABULARY}'.")
  fail_if(t.linear_head and not (task_type.has_classes and not sets[t.target_set].is_vocabulary),
          f'tasks.{name}.linear_head=True needs a task type that chooses among the entries of a set; {t.type!r} with '
          f'target_set={t.target_set!r} does not.')


def why_not_rerank(reranker: TaskSpec, task: TaskSpec, beam_size: int, beam_size_name: str) -> str:
  """Return why a task cannot rerank the captions of `task`, to follow its name in a message, or ''.

  beam_size_name: of the field or argument.
  """
  same = lambda t: (t.type.visual, t.num_frames)
  if reranker.type.target != 'pair' or same(reranker) != same(task):
    return (f' is of task type {reranker.type.name!r}; it must be a retrieval task that reads what '
            f'config.tasks.{task.name} reads.')
  return f' chooses among the captions of a beam; set {beam_size_name} to 2 or more.' if beam_size == 1 else ''


def _evaluation(
    name: str, e: EvaluatorConfig, tasks: list[TaskSpec], sets: Mapping[str, SetSpec], temperatures: Sequence[str],
    m: ModelConfig) -> Evaluation:
  field, by_name = f'evaluators.{name}', {t.name: t for t in tasks}
  check_choice(f'{field}.type', e.type, EVALUATIONS)
  check_choice(f'{field}.task', e.task, by_name)
  task, valid = by_name[e.task], [t.name for t in tasks if EVALUATIONS[e.type](t.type)]
  fail_if(e.task not in valid,
          f'{field}.task={e.task!r} is of task type {task.type.name!r}, which evaluator {e.type!r} cannot evaluate; '
          f'choices: {", ".join(valid) or "none"}.')
  for field_name, only in (('rerank_by', 'caption'), ('max_len', 'caption'), ('num_draws', 'retrieval')):
    value = getattr(e, field_name)
    fail_if(value and e.type != only, f'{field}.{field_name}={value!r} is for evaluators of type {only!r}, not '
                                      f'{e.type!r}; set it to {getattr(EvaluatorConfig, field_name)!r}.')
  reranker = None
  if e.rerank_by:
    check_choice(f'{field}.rerank_by', e.rerank_by, by_name)
    reranker = by_name[e.rerank_by]
    problem = why_not_rerank(reranker, task, e.beam_size, f'config.{field}.beam_size')
    fail_if(problem, f'{field}.rerank_by={e.rerank_by!r}{problem}')
    if reranker.temperature not in temperatures:  # batch_size=0 alone must be enough to leave a task out
      reranker = None
  fail_if(e.max_len > m.max_text_len,
          f'{field}.max_len={e.max_len} is above config.model.max_text_len={m.max_text_len}.')
  fail_if(e.num_views * e.num_crops > 1 and not (e.type == 'classification' and task.num_frames),
          f'{field}: num_views={e.num_views}, num_crops={e.num_crops} are for the classification of videos of files (a '
          'task with num_frames > 0); set them to 1.')
  return Evaluation(**{**vars(e), 'name': name, 'task': task, 'reranker': reranker,
                       'rerank_by': '' if reranker is None else e.rerank_by})
