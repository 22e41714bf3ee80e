"""From a config to a plan: the one place where a run's configuration is checked.

`resolve(config)` checks every field before any device work and returns a `Plan`: the static facts (kinds, tasks, target
sets, groups) that data, trainer and evaluators share.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import ml_collections

from uni_moe_jax.config import field_types
from uni_moe_jax.config.plan import VOCABULARY, Evaluation, Plan, SetSpec, TaskSpec
from uni_moe_jax.config.schema import FREEZE
from uni_moe_jax.tasks import task_types
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import TaskType
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

MIXTURES = ('all_tasks', 'one_task')
SOFTMAXES = ('full', 'sampled')
SCHEDULES = ('cosine', 'constant', 'published')
WITHOUT_GRADIENT = ('update', 'settonone', 'zerograd')
# The names of routers and of grouped products live in moe/; here they are data, so that a config is checked without jax.
MERGED = ('dense', 'attribute', 'task', 'modality')
DISPATCHED = ('token', 'context')
GROUPED = ('auto', 'xla', 'tiled', 'batched', 'ragged', 'megablox', 'triton')
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


def resolve(c: ml_collections.ConfigDict) -> Plan:
  """Checks the whole config; returns the plan.

  Raises:
    UsageError: the first field that is wrong: its name, its value, the bound and the fix.
  """
  field_types.check(c)
  _check_model(c)
  _check_tokenizer(c)
  _check_train(c)
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
  _check_declared(c)
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


def _choose(field: str, value, choices) -> None:
  if value not in choices:
    raise UsageError(f'config.{field}={value!r} is unknown; {nearest(value, choices)}.')


def _at_least(c: ml_collections.ConfigDict, section: str, bounds: dict[str, float]) -> None:
  for name, bound in bounds.items():
    if c[section][name] < bound:
      raise UsageError(f'config.{section}.{name}={c[section][name]} must be at least {bound}.')


def _above_zero(c: ml_collections.ConfigDict, section: str, *names: str) -> None:
  for name in names:
    if c[section][name] <= 0:
      raise UsageError(f'config.{section}.{name}={c[section][name]} must be above 0.')


def _divides(part: str, b: int, whole: str, a: int) -> None:
  if a % b:
    raise UsageError(f'config.{whole}={a} must be a multiple of config.{part}={b}; try {max(b, a - a % b)}.')


def _check_model(c: ml_collections.ConfigDict) -> None:
  m, moe = c.model, c.moe
  _at_least(c, 'model', dict(num_layers=1, width=4, num_heads=1, mlp_dim=1, image_size=1, patch_size=1, channels=1, max_num_frames=1,
                             max_text_len=1, layer_scale_init=0.0, drop_path=0.0, num_deep_prompts=0, num_prefix_prompts=0, text_posemb_std=0.0, temporal_posemb_std=0.0))
  _above_zero(c, 'model', 'temperature_init')
  _divides('model.num_heads', m.num_heads, 'model.width', m.width)
  _divides('model.patch_size', m.patch_size, 'model.image_size', m.image_size)
  if m.width % 4:
    raise UsageError(f'config.model.width={m.width} must be a multiple of 4 (the spatial table); try {m.width // 4 * 4}.')
  if not 0 <= m.drop_path < 1:
    raise UsageError(f'config.model.drop_path={m.drop_path} must be in [0, 1).')
  for name in ('pixel_mean', 'pixel_std', 'video_mean', 'video_std'):
    if len(m[name]) != m.channels and not (name.startswith('video') and not m[name]):
      raise UsageError(f'config.model.{name} has {len(m[name])} values for config.model.channels={m.channels}.')
    if name.endswith('std') and any(v <= 0 for v in m[name]):
      raise UsageError(f'config.model.{name}={m[name]} must hold numbers above 0.')
  _choose('model.posemb', m.posemb, ('sincos2d', 'frozen', 'learned'))
  _choose('model.prompt_sharing', m.prompt_sharing, ('shared', 'separate', 'inputs'))
  _choose('model.text_posemb_init', m.text_posemb_init, ('normal', 'sincos'))
  _choose('model.dtype', m.dtype, ('float32', 'bfloat16'))
  _choose('moe.router', moe.router, (*MERGED, *DISPATCHED))
  _choose('moe.gmm', moe.gmm, GROUPED)
  of_tokens = dict(capacity_factor=0.0, balance_loss_weight=0.0, importance_loss_weight=0.0, z_loss_weight=0.0)
  _at_least(c, 'moe', dict(num_experts=1, noise_std=0.0, **of_tokens))
  for name in of_tokens if moe.router in MERGED else ():
    if moe[name]:
      raise UsageError(f"config.moe.{name}={moe[name]} needs config.moe.router='token' or 'context'; kernels of "
                       f'{moe.router!r} merge. Set it to 0.')
  if not 1 <= moe.top_k <= moe.num_experts:
    raise UsageError(f'config.moe.top_k={moe.top_k} must be in 1…config.moe.num_experts={moe.num_experts}.')
  if isinstance(moe.placement, str):
    _choose('moe.placement', moe.placement, ('all', 'every_2', 'every_4', 'none'))
  elif any(not 0 <= i < m.num_layers for i in moe.placement):
    raise UsageError(f'config.moe.placement={moe.placement} has an index outside 0…{m.num_layers - 1}.')
  for part in moe.sublayers:
    _choose('moe.sublayers', part, ('attention', 'mlp'))


def _check_tokenizer(c: ml_collections.ConfigDict) -> None:
  _choose('tokenizer.type', c.tokenizer.type, ('sentencepiece', 'clip'))
  _at_least(c, 'tokenizer', dict(vocab_size=1))
  if c.tokenizer.type == 'clip' and not c.tokenizer.merges_path:
    raise UsageError("config.tokenizer.merges_path='' must be a path when config.tokenizer.type='clip'; give that of CLIP's "
                     'bpe_simple_vocab_16e6.txt.gz.')


def _check_train(c: ml_collections.ConfigDict) -> None:
  _at_least(c, 'train', dict(
      steps=1, grad_accum_steps=1, log_every=1, checkpoint_every=1, max_to_keep=1, max_nonfinite_steps=1, interference_every=0,
      hang_timeout=0.0))
  _at_least(c, 'optim', dict(
      learning_rate=0.0, warmup_steps=0, grad_clip_norm=0.0, final_lr_fraction=0.0, router_lr_multiplier=0.0, b1=0.0, b2=0.0))
  _above_zero(c, 'optim', 'eps')
  for name in ('b1', 'b2'):
    if c.optim[name] >= 1:
      raise UsageError(f'config.optim.{name}={c.optim[name]} must be in [0, 1).')
  for axis, size in c.mesh.items():
    if axis != 'fsdp' and size < 1 and size != -1:
      raise UsageError(f'config.mesh.{axis}={size} must be at least 1, or -1 (what the other axes leave).')
  _choose('train.mixture', c.train.mixture, MIXTURES)
  if c.train.best_metric:
    _choose('train.best_metric', c.train.best_metric, ('loss/total', *(f'loss/{name}' for name, t in c.tasks.items() if t.batch_size)))
    _divides('train.log_every', c.train.log_every, 'train.checkpoint_every', c.train.checkpoint_every)  # a checkpoint needs a logged loss
  _choose('train.contrastive_reduction', c.train.contrastive_reduction, ('mean', 'sum'))
  _choose('optim.schedule', c.optim.schedule, SCHEDULES)
  _choose('optim.unused_params', c.optim.unused_params, WITHOUT_GRADIENT)
  if not 0 < c.optim.layerwise_lr_decay <= 1:
    raise UsageError(f'config.optim.layerwise_lr_decay={c.optim.layerwise_lr_decay} must be in (0, 1]; 1 is off.')
  if not 0 <= c.train.ema_decay < 1:
    raise UsageError(f'config.train.ema_decay={c.train.ema_decay} must be in [0, 1); 0 is off.')
  if c.train.mixture == 'one_task' and c.train.grad_accum_steps > 1:
    raise UsageError(f"config.train.grad_accum_steps={c.train.grad_accum_steps} needs config.train.mixture='all_tasks', not 'one_task'.")
  if c.train.mixture == 'one_task' and c.train.interference_every:
    raise UsageError(f"config.train.interference_every={c.train.interference_every} needs config.train.mixture='all_tasks': it "
                     'compares the tasks of one step. Set it to 0, and ask launch/interference.py.')
  try:
    re.compile(c.train.interference_parameters)
  except re.error as e:
    raise UsageError(f'config.train.interference_parameters={c.train.interference_parameters!r} is not a regular '
                     f'expression: {e}.') from None
  for rule in c.optim.param_groups:
    frozen = len(rule) == 2 and rule[1] == FREEZE
    if not frozen and len(rule) != 3:
      raise UsageError(f"config.optim.param_groups: {rule!r} is neither (pattern, lr factor, weight decay) nor (pattern, '{FREEZE}').")
    try:
      re.compile(rule[0])
    except re.error as e:
      raise UsageError(f'config.optim.param_groups: {rule[0]!r} is not a regular expression: {e}.') from None


def _check_declared(c: ml_collections.ConfigDict) -> None:
  for name, entries in c.preflight.target_lengths.items():
    _choose(f'preflight.target_lengths.{name}', name, c.target_sets)
    longest = c.target_sets[name].max_len
    whole = isinstance(entries, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in entries)
    if not whole or not entries or any(not 2 <= tokens <= longest or number < 1 for tokens, number in entries):
      raise UsageError(f'config.preflight.target_lengths.{name}={entries!r} must hold (tokens, entries) pairs, tokens in 2…config.target_sets.'
                       f'{name}.max_len={longest}, entries at least 1; for example (({longest}, 1000),).')
  for name, frames in c.preflight.num_frames.items():
    _choose(f'preflight.num_frames.{name}', name, c.tasks)
    if type(frames) is not int or not 1 <= frames <= c.model.max_num_frames:
      raise UsageError(f'config.preflight.num_frames.{name}={frames!r} must be in 1…config.model.max_num_frames={c.model.max_num_frames}, a '
                       'whole number.')


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
  _choose(f'target_sets.{name}.family', s.family, families)
  _choose(f'target_sets.{name}.softmax', s.softmax, SOFTMAXES)
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
  _choose(f'{field}.crop', t.crop, CROPS)
  for part, most in (('num_frames', c.model.max_num_frames), ('randaugment', 10), ('random_erasing', 1), ('mixup_alpha', math.inf), ('cutmix_alpha', math.inf)):
    if not 0 <= t[part] <= most:
      raise UsageError(f'config.{field}.{part}={t[part]} must be in 0…{most}.')
  if (t.mixup_alpha or t.cutmix_alpha) and not (kind.visual and kind.readout == 'cls' and kind.target != 'pair'):
    raise UsageError(f'config.{field}: mixup_alpha={t.mixup_alpha}, cutmix_alpha={t.cutmix_alpha} mix pictures and their classes; task type {kind.name!r} has '
                     'none. Set them to 0.')


def _resolve_task(name: str, t, kinds: dict[str, TaskType], sets: dict[str, SetSpec], c, shapes) -> TaskSpec:
  field = f'tasks.{name}'
  _choose(f'{field}.type', t.type, kinds)
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
    _choose(f'{field}.target_set', t.target_set, sets)
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
  _choose(f'evaluators.{name}.type', e.type, EVALUATIONS)
  by_name = {t.name: t for t in tasks}
  _choose(f'evaluators.{name}.task', e.task, by_name)
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
    _choose(field, e.constrain_to, sets)
    if sets[e.constrain_to].is_vocabulary:
      raise UsageError(f"config.{field}={e.constrain_to!r} is the vocabulary, so that any word may be said; set it to '', or to a "
                       'set of texts.')
  if min(e.num_views, e.num_crops) < 1 or e.num_views * e.num_crops > 1 and not (e.type == 'classification' and task_spec.num_frames):
    raise UsageError(f'config.evaluators.{name}: num_views={e.num_views}, num_crops={e.num_crops} must be at least 1, and are for the '
                     "classification of clips of files (a task with frames); set them to 1.")
  return Evaluation(name, e.type, task_spec, e.split, e.num_examples, e.batch_size, e.beam_size, e.length_penalty, e.constrain_to, e.num_views, e.num_crops)


def check_trains(plan: Plan) -> None:
  """Raises UsageError where a plan only evaluates."""
  if not plan.tasks:
    raise UsageError('config.tasks: every task has batch_size=0, so that there is nothing to train; evaluate what '
                     'config.train.init names: python launch/evaluate.py --config=… --workdir=….')


def check_mesh(c: ml_collections.ConfigDict, mesh: Mapping[str, int]) -> None:
  """Raises UsageError where an axis of the mesh does not divide what it splits. mesh: size per axis."""
  split = [('model', 'model.num_heads', c.model.num_heads), ('model', 'model.mlp_dim', c.model.mlp_dim)]
  if c.moe.router != 'dense':
    split.append(('expert', 'moe.num_experts', c.moe.num_experts))
  if c.mesh.fsdp:
    split.append(('data', 'model.width', c.model.width))
  for axis, field, size in split:
    if size % mesh[axis]:
      raise UsageError(f'config.mesh.{axis}={mesh[axis]} must divide config.{field}={size}, which it splits; try '
                       f'{math.gcd(size, mesh[axis])}.')


def check_batches(plan: Plan, shards: int, accum: int) -> None:
  """Raises UsageError where a task's micro-batch does not divide over the batch shards of the mesh."""
  for t in plan.tasks:
    micro = t.batch_size // accum
    if micro % shards:
      unit = shards * accum
      raise UsageError(f'config.tasks.{t.name}.batch_size={t.batch_size} must be a multiple of {unit} ({shards} batch shards of '
                       f'the mesh × {accum} micro-steps); try {max(unit, t.batch_size - t.batch_size % unit)}.')
    if t.mixes and micro // shards % 2:
      unit = 2 * shards * accum
      raise UsageError(f'config.tasks.{t.name}.batch_size={t.batch_size} must be a multiple of {unit} for mixup or cutmix, which mix pairs '
                       f'of a shard ({shards} batch shards × {accum} micro-steps × 2); try {max(unit, t.batch_size - t.batch_size % unit)}.')


def check_halves(plan: Plan, shards: int, accum: int) -> None:
  """Raises UsageError where a task's micro-batch on a shard has no halves, which the interference metric compares."""
  unit = 2 * shards * accum
  for t in plan.tasks:
    if t.batch_size % unit:
      raise UsageError(f'config.tasks.{t.name}.batch_size={t.batch_size} must be a multiple of {unit} for config.train.'
                       f'interference_every > 0, which halves it ({shards} batch shards × {accum} micro-steps × 2); try '
                       f'{max(unit, t.batch_size - t.batch_size % unit)}, or interference_every=0.')
