"""The static facts of a run, as `resolve.resolve` finds them: what data, trainer and evaluators share."""

import dataclasses
import math

import ml_collections

from uni_moe_jax.config import field_types, validate
from uni_moe_jax.config.validate import choose
from uni_moe_jax.tasks import task_types
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import TaskType
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

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

  def task_slices(self, divisor: int = 1) -> dict[str, slice]:
    """{task: its rows in its group's batch}, where every batch size is divided by `divisor`, shards · micro-steps."""
    slices = {}
    for tasks in self.groups.values():
      start = 0
      for t in tasks:
        slices[t.name] = slice(start, start + t.batch_size // divisor)
        start = slices[t.name].stop
    return slices

  def only(self, task_name: str) -> 'Plan':
    """The plan of a step that holds one task, with the sets that it needs."""
    chosen = next(t for t in self.tasks if t.name == task_name)
    if not chosen.sampling_weight:  # its weight is how often it is drawn: it counts once
      chosen = dataclasses.replace(chosen, loss_weight=1.0)
    sets = tuple(s for s in self.sets if self.encode_all_sets or s.name == chosen.target_set)
    return dataclasses.replace(self, tasks=(chosen,), sets=sets)

  def check_trains(self) -> None:
    """Raises UsageError where a plan only evaluates."""
    if not self.tasks:
      raise UsageError('config.tasks: every task has batch_size=0, so that there is nothing to train; evaluate what '
                       'config.train.init names: python launch/evaluate.py --config=… --workdir=….')

  def check_batches(self, shards: int, accum: int) -> None:
    """Raises UsageError where a task's micro-batch does not divide over the batch shards of the mesh."""
    for t in self.tasks:
      micro = t.batch_size // accum
      if micro % shards:
        unit = shards * accum
        raise UsageError(f'config.tasks.{t.name}.batch_size={t.batch_size} must be a multiple of {unit} ({shards} batch shards of '
                         f'the mesh × {accum} micro-steps); try {max(unit, t.batch_size - t.batch_size % unit)}.')
      if t.mixes and micro // shards % 2:
        unit = 2 * shards * accum
        raise UsageError(f'config.tasks.{t.name}.batch_size={t.batch_size} must be a multiple of {unit} for mixup or cutmix, which mix pairs '
                         f'of a shard ({shards} batch shards × {accum} micro-steps × 2); try {max(unit, t.batch_size - t.batch_size % unit)}.')

  def check_halves(self, shards: int, accum: int) -> None:
    """Raises UsageError where a task's micro-batch on a shard has no halves, which the interference metric compares."""
    unit = 2 * shards * accum
    for t in self.tasks:
      if t.batch_size % unit:
        raise UsageError(f'config.tasks.{t.name}.batch_size={t.batch_size} must be a multiple of {unit} for config.train.'
                         f'interference_every > 0, which halves it ({shards} batch shards × {accum} micro-steps × 2); try '
                         f'{max(unit, t.batch_size - t.batch_size % unit)}, or interference_every=0.')


SOFTMAXES = ('full', 'sampled')
# Evaluator → whether it can ask a kind.
EVALUATIONS = {
    'classification': lambda kind: kind.has_classes,
    'retrieval': lambda kind: kind.target == 'pair',
    'mlm': lambda kind: kind.readout == 'masked',
    'caption': lambda kind: kind.readout == 'queries',
    'glue': lambda kind: kind.readout == 'slot' and not kind.visual,
    'vqa': lambda kind: kind.readout == 'slot' and kind.visual,
}
CROPS = ('resize_crop', 'random_resized_crop', 'jittered_crop')


def make_plan(c: ml_collections.ConfigDict) -> Plan:
  """Checks the whole config; returns the plan.

  Raises:
    UsageError: the first field that is wrong: its name, its value, the bound and the fix.
  """
  field_types.check(c)
  validate.check_sections(c)
  families = {**task_types.families(), **{name: _own_family(name, bits) for name, bits in c.target_families.items()}}
  kinds = {**task_types.TASK_TYPES, **{name: _own_kind(name, row) for name, row in c.task_types.items()}}
  for name in c.task_types:
    task_types.check_task_type(kinds[name], families)
  sets = tuple(_resolve_set(name, s, families) for name, s in c.target_sets.items())
  trained = {name for name, t in c.tasks.items() if t.batch_size != 0}
  if not trained and not (c.train.init and c.evaluators):
    raise UsageError('config.tasks has no task with batch_size > 0; add one with config.task(…). To evaluate another run as it is, '
                     'name it in config.train.init and give config.evaluators.')
  shapes: dict[str, set[tuple[int, ...]]] = {}
  for name in trained:
    shapes.setdefault(c.tasks[name].type, set()).add(_shape(c.tasks[name]))
  headed = [name for name, t in c.tasks.items() if t.linear_head]
  if len(headed) > 1:
    raise UsageError(f'config.tasks: {" and ".join(headed)} both have linear_head=True; one task at most has a linear head.')
  by_name = {s.name: s for s in sets}
  resolved = tuple(_resolve_task(name, t, kinds, by_name, c, shapes) for name, t in c.tasks.items())
  tasks = tuple(t for t in resolved if t.name in trained)
  probes = tuple(t for t in resolved if t.name not in trained)
  temperatures = tuple(sorted({t.temperature for t in tasks} | set(c.model.extra_temperature_groups)))
  for t in probes:  # of pairs only the order matters, which needs no scale
    if t.temperature not in temperatures and t.type.target != 'pair':
      raise UsageError(f'config.tasks.{t.name}.temperature={t.temperature!r}: no trained task has this group, so that its '
                       f'scale would be unknown; {nearest(t.temperature, temperatures)}.')
  validate.check_preflight(c)
  used = {name for name in by_name if c.train.encode_all_sets} | {t.target_set for t in tasks}
  for t in probes:
    if t.target_set and t.target_set not in used and by_name[t.target_set].label_prompts:
      raise UsageError(f'config.target_sets.{t.target_set}.label_prompts=True: no trained task names this set, so that they would '
                       f'stay zero; train a task with it, or set it to False.')
  evaluations = tuple(_resolve_evaluation(name, e, resolved, by_name) for name, e in c.evaluators.items())
  probed = {t.target_set for t in probes} - used
  return Plan(
      task_types=tuple(kinds.values()), tasks=tasks, sets=tuple(s for s in sets if s.name in used), probes=probes,
      probe_sets=tuple(s for s in sets if s.name in probed),
      evaluations=evaluations, temperatures=temperatures, encode_all_sets=c.train.encode_all_sets,
      answer_sets=tuple(s for s in sets if s.name in {e.constrain_to for e in evaluations} - used - probed))


def _own_family(name: str, bits) -> Condition:
  if name in task_types.families():
    raise UsageError(f'config.target_families.{name}: a built-in family has this name, and its row is frozen; choose another.')
  if isinstance(bits, str) or len(bits) != 4 or any(b not in (0, 1) for b in bits):
    raise UsageError(f'config.target_families.{name}={bits!r} must be four bits: input visual, input text, target visual, '
                     'target text; for example (1, 0, 0, 1).')
  return task_types.family_condition(name, tuple(bits))


def _own_kind(name: str, row) -> TaskType:
  if name in task_types.TASK_TYPES:
    raise UsageError(f'config.task_types.{name}: a built-in kind has this name; choose another.')
  fields = {f.name for f in dataclasses.fields(TaskType)} - {'name'}
  if set(row) != fields:
    wrong = sorted(set(row) ^ fields)
    raise UsageError(f'config.task_types.{name}: {", ".join(wrong)} missing or unknown; give {", ".join(sorted(fields))}.')
  if any(isinstance(s, str) or len(s) not in (1, 2) for s in row.inputs):
    raise UsageError(f"config.task_types.{name}.inputs={row.inputs!r} must hold (modality, mask) pairs, for example "
                     "(('visual', 'full'),).")
  return TaskType(name, tuple(task_types.Segment(*s) for s in row.inputs), row.target, row.readout, row.router_task)


def _resolve_set(name: str, s, families: dict[str, Condition]) -> SetSpec:
  choose(f'target_sets.{name}.family', s.family, families)
  choose(f'target_sets.{name}.softmax', s.softmax, SOFTMAXES)
  if s.max_len < 2 or s.num_sampled < 0:
    raise UsageError(f'config.target_sets.{name}: max_len={s.max_len} must be at least 2 tokens, num_sampled={s.num_sampled} at least 0.')
  if s.softmax == 'sampled' and (s.entries != VOCABULARY or s.num_sampled < 1):
    raise UsageError(f"config.target_sets.{name}: softmax='sampled' needs entries='{VOCABULARY}' and num_sampled ≥ 1, not "
                     f'entries={s.entries!r}, num_sampled={s.num_sampled}.')
  if s.label_prompts and s.entries == VOCABULARY:
    raise UsageError(f'config.target_sets.{name}.label_prompts=True is for sets of texts: the words of a vocabulary have a learnt '
                     'row each already; set it to False.')
  entries = s.entries if isinstance(s.entries, str) else tuple(v if isinstance(v, str) else tuple(v) for v in s.entries)
  return SetSpec(name, entries, families[s.family], s.softmax, s.num_sampled, s.max_len, s.label_prompts)


def _shape(t) -> tuple[int, ...]:
  """What the arrays of a task's examples depend on, beside its kind: tokens, picks; frames and labels of pictures and clips."""
  of_files = (t.num_frames, 2 if t.mixup_alpha or t.cutmix_alpha else 1) if t.num_frames or t.mixup_alpha or t.cutmix_alpha else ()
  return t.max_len, t.max_predictions, *of_files


def _check_pictures(name: str, t, kind: TaskType, c) -> None:
  field = f'tasks.{name}'
  choose(f'{field}.crop', t.crop, CROPS)
  for part, most in (('num_frames', c.model.max_num_frames), ('randaugment', 10), ('random_erasing', 1), ('mixup_alpha', math.inf), ('cutmix_alpha', math.inf)):
    if not 0 <= t[part] <= most:
      raise UsageError(f'config.{field}.{part}={t[part]} must be in 0…{most}.')
  if (t.mixup_alpha or t.cutmix_alpha) and not (kind.visual and kind.readout == 'cls' and kind.target != 'pair'):
    raise UsageError(f'config.{field}: mixup_alpha={t.mixup_alpha}, cutmix_alpha={t.cutmix_alpha} mix pictures and their classes; task type {kind.name!r} has '
                     'none. Set them to 0.')


def _resolve_task(name: str, t, kinds: dict[str, TaskType], sets: dict[str, SetSpec], c, shapes) -> TaskSpec:
  field = f'tasks.{name}'
  choose(f'{field}.type', t.type, kinds)
  kind = kinds[t.type]
  if t.batch_size < 0 or t.batch_size % c.train.grad_accum_steps:
    raise UsageError(f'config.{field}.batch_size={t.batch_size} must be a positive multiple of config.train.grad_accum_steps='
                     f'{c.train.grad_accum_steps}; try {max(c.train.grad_accum_steps, t.batch_size - t.batch_size % c.train.grad_accum_steps)}.')
  if t.max_len < 0 or t.max_predictions < 0:
    raise UsageError(f'config.{field}: length={t.max_len} and picks={t.max_predictions} must be at least 0.')
  if t.loss_weight < 0 or not 0 <= t.label_smoothing < 1 or t.max_shift < 0:
    raise UsageError(f'config.{field}: weight={t.loss_weight} must be at least 0, smoothing={t.label_smoothing} in [0, 1), shift='
                     f'{t.max_shift} at least 0.')
  if not 0 < t.train_fraction <= 1 or t.shots < 0 or t.shots and not t.label_column:
    raise UsageError(f'config.{field}: subset={t.train_fraction} must be in (0, 1], per_class={t.shots} at least 0, and above 0 '
                     'only with a label.')
  if t.sampling_weight < 0 or c.train.mixture == 'one_task' and t.batch_size and (t.sampling_weight or t.loss_weight) <= 0:
    raise UsageError(f"config.{field}: sampling={t.sampling_weight}, weight={t.loss_weight}: a sampled mixture draws tasks by sampling, or "
                     'by weight where that is 0; give one that is above 0, or batch_size=0 to leave the task out.')
  if kind.target == 'pair':
    if t.target_set:
      raise UsageError(f'config.{field}.target_set={t.target_set!r}: task type {kind.name!r} is matched with its own texts; '
                       "set it to ''.")
  else:
    choose(f'{field}.target_set', t.target_set, sets)
    family = sets[t.target_set].condition.task
    if family != kind.target:
      raise UsageError(f'config.{field}.target_set={t.target_set!r} is of family {family!r}, but task type {kind.name!r} '
                       f'chooses among {kind.target!r}.')
    if kind.readout in ('masked', 'queries') and not sets[t.target_set].is_vocabulary:
      raise UsageError(f'config.{field}.target_set={t.target_set!r}: task type {kind.name!r} predicts words; its set must '
                       f"have entries='{VOCABULARY}'.")
  if (kind.text_index is not None or kind.target == 'pair') and t.max_len < 2:
    raise UsageError(f'config.{field}.max_len={t.max_len} must be at least 2 tokens.')
  if t.max_len > c.model.max_text_len:
    raise UsageError(f'config.{field}.max_len={t.max_len} is above config.model.max_text_len={c.model.max_text_len}.')
  if kind.readout == 'masked' and not 1 <= t.max_predictions <= t.max_len:
    raise UsageError(f'config.{field}.max_predictions={t.max_predictions} must be in 1…max_len={t.max_len}.')
  if kind.readout == 'slot' and t.template.count('<spe>') != 1:
    raise UsageError(f"config.{field}.template={t.template!r} must hold exactly one '<spe>' slot.")
  if t.linear_head and (kind.readout not in ('cls', 'slot') or not t.target_set or sets[t.target_set].is_vocabulary):
    raise UsageError(f'config.{field}.linear_head=True needs a kind that chooses among the entries of a set; {kind.name!r} with '
                     f'target_set={t.target_set!r} does not.')
  if (kind.two_stream or kind.target == 'pair') and not t.caption_templates:
    raise UsageError(f"config.{field}.caption_templates is empty; give at least one template, for example ('{{caption}}',).")
  _check_pictures(name, t, kind, c)
  # Tasks of one kind share a batch only if their arrays have one shape.
  group = kind.name if len(shapes.get(t.type, ())) <= 1 else '/'.join(map(str, (kind.name, *_shape(t))))
  return TaskSpec(
      name=name, type=kind, group=group, source=t.source, split=t.split, batch_size=t.batch_size, loss_weight=t.loss_weight,
      sampling_weight=t.sampling_weight, temperature=t.temperature or kind.name, target_set=t.target_set, label_column=t.label_column,
      caption_templates=tuple(t.caption_templates), template=t.template, max_len=t.max_len, max_predictions=t.max_predictions, label_smoothing=t.label_smoothing,
      max_shift=t.max_shift, linear_head=t.linear_head, train_fraction=t.train_fraction, shots=t.shots,
      num_frames=t.num_frames, crop=t.crop, random_flip=t.random_flip, randaugment=t.randaugment, random_erasing=t.random_erasing, mixup_alpha=t.mixup_alpha, cutmix_alpha=t.cutmix_alpha)


def _resolve_evaluation(name: str, e, tasks: tuple[TaskSpec, ...], sets: dict[str, SetSpec]) -> Evaluation:
  choose(f'evaluators.{name}.type', e.type, EVALUATIONS)
  by_name = {t.name: t for t in tasks}
  choose(f'evaluators.{name}.task', e.task, by_name)
  task_spec, wanted = by_name[e.task], EVALUATIONS[e.type]
  if not wanted(task_spec.type):
    fitting = [t.name for t in tasks if wanted(t.type)]
    raise UsageError(f'config.evaluators.{name}.task={e.task!r} is of task type {task_spec.type.name!r}, which evaluator '
                     f'{e.type!r} cannot ask; choices: {", ".join(fitting) or "none"}.')
  if e.num_examples < 0 or e.batch_size < 1 or e.beam_size < 1 or e.length_penalty < 0:
    raise UsageError(f'config.evaluators.{name}: num_examples={e.num_examples} must be at least 0, batch_size={e.batch_size} at least 1, beam_size='
                     f'{e.beam_size} at least 1, length_penalty={e.length_penalty} at least 0.')
  if e.constrain_to:
    field = f'evaluators.{name}.constrain_to'
    if e.type != 'caption':
      raise UsageError(f"config.{field}={e.constrain_to!r} is for evaluators of type 'caption', not {e.type!r}; set it to ''.")
    choose(field, e.constrain_to, sets)
    if sets[e.constrain_to].is_vocabulary:
      raise UsageError(f"config.{field}={e.constrain_to!r} is the vocabulary, so that any word may be said; set it to '', or to a "
                       'set of texts.')
  if min(e.num_views, e.num_crops) < 1 or e.num_views * e.num_crops > 1 and not (e.type == 'classification' and task_spec.num_frames):
    raise UsageError(f'config.evaluators.{name}: num_views={e.num_views}, num_crops={e.num_crops} must be at least 1, and are for the '
                     "classification of clips of files (a task with frames); set them to 1.")
  return Evaluation(name, e.type, task_spec, e.split, e.num_examples, e.batch_size, e.beam_size, e.length_penalty, e.constrain_to, e.num_views, e.num_crops)
