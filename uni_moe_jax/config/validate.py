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
from uni_moe_jax.tasks import task_types as kinds_lib
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import Kind
from uni_moe_jax.utils.suggest import nearest

MIXTURES = ('mixed', 'sampled')
SCORINGS = ('exact', 'sampled')
SCHEDULES = ('cosine', 'constant', 'published')
WITHOUT_GRADIENT = ('update', 'settonone', 'zerograd')
# The names of routers and of grouped products live in moe/; here they are data, so that a config is checked without jax.
MERGED = ('dense', 'attribute', 'task', 'modality')
DISPATCHED = ('token', 'context')
GROUPED = ('auto', 'xla', 'loop', 'buffers', 'ragged', 'megablox', 'triton')
# Evaluator → whether it can ask a kind.
EVALUATIONS = {
    'classification': lambda kind: kind.has_classes,
    'retrieval': lambda kind: kind.target == 'pair',
    'mlm': lambda kind: kind.readout == 'picks',
    'caption': lambda kind: kind.readout == 'queries',
    'glue': lambda kind: kind.readout == 'slot' and not kind.visual,
    'vqa': lambda kind: kind.readout == 'slot' and kind.visual,
}
CROPS = ('short', 'area', 'jitter')


def resolve(c: ml_collections.ConfigDict) -> Plan:
  """Checks the whole config; returns the plan.

  Raises:
    ValueError: the first field that is wrong: its name, its value, the bound and the fix.
  """
  field_types.check(c)
  _check_model(c)
  _check_tokenizer(c)
  _check_train(c)
  families = {**kinds_lib.families(), **{name: _own_family(name, bits) for name, bits in c.families.items()}}
  kinds = {**kinds_lib.KINDS, **{name: _own_kind(name, row) for name, row in c.kinds.items()}}
  for name in c.kinds:
    kinds_lib.check_kind(kinds[name], families)
  sets = tuple(_resolve_set(name, s, families) for name, s in c.sets.items())
  trained = {name for name, t in c.tasks.items() if t.batch != 0}
  if not trained and not (c.train.init and c.evaluators):
    raise ValueError('config.tasks has no task with batch > 0; add one with config.task(…). To evaluate another run as it is, '
                     'name it in config.train.init and give config.evaluators.')
  shapes: dict[str, set[tuple[int, ...]]] = {}
  for name in trained:
    shapes.setdefault(c.tasks[name].kind, set()).add(_shape(c.tasks[name]))
  headed = [name for name, t in c.tasks.items() if t.head]
  if len(headed) > 1:
    raise ValueError(f'config.tasks: {" and ".join(headed)} both have head=True; one task at most has a linear head.')
  by_name = {s.name: s for s in sets}
  resolved = tuple(_resolve_task(name, t, kinds, by_name, c, shapes) for name, t in c.tasks.items())
  tasks = tuple(t for t in resolved if t.name in trained)
  probes = tuple(t for t in resolved if t.name not in trained)
  temperatures = tuple(sorted({t.temperature for t in tasks} | set(c.model.temperatures)))
  for t in probes:  # of pairs only the order matters, which needs no scale
    if t.temperature not in temperatures and t.kind.target != 'pair':
      raise ValueError(f'config.tasks.{t.name}.temperature={t.temperature!r}: no trained task has this group, so that its '
                       f'scale would be unknown; {nearest(t.temperature, temperatures)}.')
  _check_declared(c)
  used = {name for name in by_name if c.train.encode_all_sets} | {t.target_set for t in tasks}
  for t in probes:
    if t.target_set and t.target_set not in used and by_name[t.target_set].label_prompts:
      raise ValueError(f'config.sets.{t.target_set}.label_prompts=True: no trained task names this set, so that they would '
                       f'stay zero; train a task with it, or set it to False.')
  evaluations = tuple(_resolve_evaluation(name, e, resolved, by_name) for name, e in c.evaluators.items())
  probed = {t.target_set for t in probes} - used
  return Plan(
      kinds=tuple(kinds.values()), tasks=tasks, sets=tuple(s for s in sets if s.name in used), probes=probes,
      probe_sets=tuple(s for s in sets if s.name in probed),
      evaluations=evaluations, temperatures=temperatures, encode_all_sets=c.train.encode_all_sets,
      answer_sets=tuple(s for s in sets if s.name in {e.answers for e in evaluations} - used - probed))


def _choose(field: str, value, choices) -> None:
  if value not in choices:
    raise ValueError(f'config.{field}={value!r} is unknown; {nearest(value, choices)}.')


def _at_least(c: ml_collections.ConfigDict, section: str, bounds: dict[str, float]) -> None:
  for name, bound in bounds.items():
    if c[section][name] < bound:
      raise ValueError(f'config.{section}.{name}={c[section][name]} must be at least {bound}.')


def _above_zero(c: ml_collections.ConfigDict, section: str, *names: str) -> None:
  for name in names:
    if c[section][name] <= 0:
      raise ValueError(f'config.{section}.{name}={c[section][name]} must be above 0.')


def _divides(part: str, b: int, whole: str, a: int) -> None:
  if a % b:
    raise ValueError(f'config.{whole}={a} must be a multiple of config.{part}={b}; try {max(b, a - a % b)}.')


def _check_model(c: ml_collections.ConfigDict) -> None:
  m, moe = c.model, c.moe
  _at_least(c, 'model', dict(layers=1, width=4, heads=1, hidden=1, image_size=1, patch=1, channels=1, max_frames=1,
                             max_text=1, layer_scale=0.0, drop_path=0.0, prompts=0, prefix_prompts=0, position_std=0.0, temporal_std=0.0))
  _above_zero(c, 'model', 'temperature')
  _divides('model.heads', m.heads, 'model.width', m.width)
  _divides('model.patch', m.patch, 'model.image_size', m.image_size)
  if m.width % 4:
    raise ValueError(f'config.model.width={m.width} must be a multiple of 4 (the spatial table); try {m.width // 4 * 4}.')
  if not 0 <= m.drop_path < 1:
    raise ValueError(f'config.model.drop_path={m.drop_path} must be in [0, 1).')
  for name in ('pixel_mean', 'pixel_std', 'video_mean', 'video_std'):
    if len(m[name]) != m.channels and not (name.startswith('video') and not m[name]):
      raise ValueError(f'config.model.{name} has {len(m[name])} values for config.model.channels={m.channels}.')
    if name.endswith('std') and any(v <= 0 for v in m[name]):
      raise ValueError(f'config.model.{name}={m[name]} must hold numbers above 0.')
  _choose('model.spatial', m.spatial, ('sincos', 'stored', 'learnt'))
  _choose('model.prompt_sides', m.prompt_sides, ('shared', 'separate', 'inputs'))
  _choose('model.position_init', m.position_init, ('normal', 'sincos'))
  _choose('model.query_key_init', m.query_key_init, ('independent', 'equal'))
  _choose('model.dtype', m.dtype, ('float32', 'bfloat16'))
  _choose('moe.router', moe.router, (*MERGED, *DISPATCHED))
  _choose('moe.grouped', moe.grouped, GROUPED)
  of_tokens = dict(capacity=0.0, balance_loss=0.0, importance_loss=0.0, z_loss=0.0)
  _at_least(c, 'moe', dict(num_experts=1, noise_std=0.0, **of_tokens))
  for name in of_tokens if moe.router in MERGED else ():
    if moe[name]:
      raise ValueError(f"config.moe.{name}={moe[name]} needs config.moe.router='token' or 'context'; kernels of "
                       f'{moe.router!r} merge. Set it to 0.')
  if not 1 <= moe.top_k <= moe.num_experts:
    raise ValueError(f'config.moe.top_k={moe.top_k} must be in 1…config.moe.num_experts={moe.num_experts}.')
  if isinstance(moe.placement, str):
    _choose('moe.placement', moe.placement, ('all', 'odd', 'four', 'none'))
  elif any(not 0 <= i < m.layers for i in moe.placement):
    raise ValueError(f'config.moe.placement={moe.placement} has an index outside 0…{m.layers - 1}.')
  for part in moe.parts:
    _choose('moe.parts', part, ('attention', 'ffn'))


def _check_tokenizer(c: ml_collections.ConfigDict) -> None:
  _choose('tokenizer.kind', c.tokenizer.kind, ('sentencepiece', 'clip'))
  _at_least(c, 'tokenizer', dict(vocab_size=1))
  if c.tokenizer.kind == 'clip' and not c.tokenizer.merges:
    raise ValueError("config.tokenizer.merges='' must be a path when config.tokenizer.kind='clip'; give that of CLIP's "
                     'bpe_simple_vocab_16e6.txt.gz.')


def _check_train(c: ml_collections.ConfigDict) -> None:
  _at_least(c, 'train', dict(steps=1, accum=1, log_every=1, save_every=1, keep=1, max_bad_steps=1, interference_every=0, watchdog=0.0))
  _at_least(c, 'optim', dict(learning_rate=0.0, warmup=0, clip=0.0, final=0.0, gate_factor=0.0, b1=0.0, b2=0.0))
  _above_zero(c, 'optim', 'eps')
  for name in ('b1', 'b2'):
    if c.optim[name] >= 1:
      raise ValueError(f'config.optim.{name}={c.optim[name]} must be in [0, 1).')
  for axis, size in c.mesh.items():
    if axis != 'fsdp' and size < 1 and size != -1:
      raise ValueError(f'config.mesh.{axis}={size} must be at least 1, or -1 (what the other axes leave).')
  _choose('train.mixture', c.train.mixture, MIXTURES)
  if c.train.keep_best:
    _choose('train.keep_best', c.train.keep_best, ('loss/total', *(f'loss/{name}' for name, t in c.tasks.items() if t.batch)))
    _divides('train.log_every', c.train.log_every, 'train.save_every', c.train.save_every)  # a checkpoint needs a logged loss
  _choose('train.contrastive', c.train.contrastive, ('mean', 'sum'))
  _choose('train.twins', c.train.twins, ('masked', 'negatives'))
  _choose('optim.schedule', c.optim.schedule, SCHEDULES)
  _choose('optim.without_gradient', c.optim.without_gradient, WITHOUT_GRADIENT)
  if not 0 < c.optim.layer_decay <= 1:
    raise ValueError(f'config.optim.layer_decay={c.optim.layer_decay} must be in (0, 1]; 1 is off.')
  if not 0 <= c.train.ema < 1:
    raise ValueError(f'config.train.ema={c.train.ema} must be in [0, 1); 0 is off.')
  if c.train.mixture == 'sampled' and c.train.accum > 1:
    raise ValueError(f"config.train.accum={c.train.accum} needs config.train.mixture='mixed', not 'sampled'.")
  if c.train.mixture == 'sampled' and c.train.interference_every:
    raise ValueError(f"config.train.interference_every={c.train.interference_every} needs config.train.mixture='mixed': it "
                     'compares the tasks of one step. Set it to 0, and ask launch/interference.py.')
  try:
    re.compile(c.train.interference_parameters)
  except re.error as e:
    raise ValueError(f'config.train.interference_parameters={c.train.interference_parameters!r} is not a regular '
                     f'expression: {e}.') from None
  for rule in c.optim.rules:
    frozen = len(rule) == 2 and rule[1] == FREEZE
    if not frozen and len(rule) != 3:
      raise ValueError(f"config.optim.rules: {rule!r} is neither (pattern, lr factor, weight decay) nor (pattern, '{FREEZE}').")
    try:
      re.compile(rule[0])
    except re.error as e:
      raise ValueError(f'config.optim.rules: {rule[0]!r} is not a regular expression: {e}.') from None


def _check_declared(c: ml_collections.ConfigDict) -> None:
  for name, entries in c.declared.entries.items():
    _choose(f'declared.entries.{name}', name, c.sets)
    longest = c.sets[name].length
    whole = isinstance(entries, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in entries)
    if not whole or not entries or any(not 2 <= tokens <= longest or number < 1 for tokens, number in entries):
      raise ValueError(f'config.declared.entries.{name}={entries!r} must hold (tokens, entries) pairs, tokens in 2…config.sets.'
                       f'{name}.length={longest}, entries at least 1; for example (({longest}, 1000),).')
  for name, frames in c.declared.frames.items():
    _choose(f'declared.frames.{name}', name, c.tasks)
    if type(frames) is not int or not 1 <= frames <= c.model.max_frames:
      raise ValueError(f'config.declared.frames.{name}={frames!r} must be in 1…config.model.max_frames={c.model.max_frames}, a '
                       'whole number.')


def _own_family(name: str, bits) -> Condition:
  if name in kinds_lib.families():
    raise ValueError(f'config.families.{name}: a built-in family has this name, and its row is frozen; choose another.')
  if isinstance(bits, str) or len(bits) != 4 or any(b not in (0, 1) for b in bits):
    raise ValueError(f'config.families.{name}={bits!r} must be four bits: input visual, input text, target visual, '
                     'target text; for example (1, 0, 0, 1).')
  return kinds_lib.family_condition(name, tuple(bits))


def _own_kind(name: str, row) -> Kind:
  if name in kinds_lib.KINDS:
    raise ValueError(f'config.kinds.{name}: a built-in kind has this name; choose another.')
  fields = {f.name for f in dataclasses.fields(Kind)} - {'name'}
  if set(row) != fields:
    wrong = sorted(set(row) ^ fields)
    raise ValueError(f'config.kinds.{name}: {", ".join(wrong)} missing or unknown; give {", ".join(sorted(fields))}.')
  if any(isinstance(s, str) or len(s) not in (1, 2) for s in row.inputs):
    raise ValueError(f"config.kinds.{name}.inputs={row.inputs!r} must hold (modality, mask) pairs, for example "
                     "(('visual', 'full'),).")
  return Kind(name, tuple(kinds_lib.Segment(*s) for s in row.inputs), row.target, row.readout, row.router_task)


def _resolve_set(name: str, s, families: dict[str, Condition]) -> SetSpec:
  _choose(f'sets.{name}.family', s.family, families)
  _choose(f'sets.{name}.scoring', s.scoring, SCORINGS)
  if s.length < 2 or s.samples < 0:
    raise ValueError(f'config.sets.{name}: length={s.length} must be at least 2 tokens, samples={s.samples} at least 0.')
  if s.scoring == 'sampled' and (s['values'] != VOCABULARY or s.samples < 1):
    raise ValueError(f"config.sets.{name}: scoring 'sampled' needs values='{VOCABULARY}' and samples ≥ 1, not "
                     f'values={s["values"]!r}, samples={s.samples}.')
  if s.label_prompts and s['values'] == VOCABULARY:
    raise ValueError(f'config.sets.{name}.label_prompts=True is for sets of texts: the words of a vocabulary have a learnt '
                     'row each already; set it to False.')
  values = s['values'] if isinstance(s['values'], str) else tuple(v if isinstance(v, str) else tuple(v) for v in s['values'])
  return SetSpec(name, values, families[s.family], s.scoring, s.samples, s.length, s.label_prompts)


def _shape(t) -> tuple[int, ...]:
  """What the arrays of a task's examples depend on, beside its kind: tokens, picks; frames and labels of pictures and clips."""
  of_files = (t.frames, 2 if t.mixup or t.cutmix else 1) if t.frames or t.mixup or t.cutmix else ()
  return t.length, t.picks, *of_files


def _check_pictures(name: str, t, kind: Kind, c) -> None:
  field = f'tasks.{name}'
  _choose(f'{field}.crop', t.crop, CROPS)
  for part, most in (('frames', c.model.max_frames), ('randaugment', 10), ('erasing', 1), ('mixup', math.inf), ('cutmix', math.inf)):
    if not 0 <= t[part] <= most:
      raise ValueError(f'config.{field}.{part}={t[part]} must be in 0…{most}.')
  if (t.mixup or t.cutmix) and not (kind.visual and kind.readout == 'first' and kind.target != 'pair'):
    raise ValueError(f'config.{field}: mixup={t.mixup}, cutmix={t.cutmix} mix pictures and their classes; kind {kind.name!r} has '
                     'none. Set them to 0.')


def _resolve_task(name: str, t, kinds: dict[str, Kind], sets: dict[str, SetSpec], c, shapes) -> TaskSpec:
  field = f'tasks.{name}'
  _choose(f'{field}.kind', t.kind, kinds)
  kind = kinds[t.kind]
  if t.batch < 0 or t.batch % c.train.accum:
    raise ValueError(f'config.{field}.batch={t.batch} must be a positive multiple of config.train.accum='
                     f'{c.train.accum}; try {max(c.train.accum, t.batch - t.batch % c.train.accum)}.')
  if t.length < 0 or t.picks < 0:
    raise ValueError(f'config.{field}: length={t.length} and picks={t.picks} must be at least 0.')
  if t.weight < 0 or not 0 <= t.smoothing < 1 or t.shift < 0:
    raise ValueError(f'config.{field}: weight={t.weight} must be at least 0, smoothing={t.smoothing} in [0, 1), shift='
                     f'{t.shift} at least 0.')
  if not 0 < t.subset <= 1 or t.per_class < 0 or t.per_class and not t.label:
    raise ValueError(f'config.{field}: subset={t.subset} must be in (0, 1], per_class={t.per_class} at least 0, and above 0 '
                     'only with a label.')
  if t.sampling < 0 or c.train.mixture == 'sampled' and t.batch and (t.sampling or t.weight) <= 0:
    raise ValueError(f"config.{field}: sampling={t.sampling}, weight={t.weight}: a sampled mixture draws tasks by sampling, or "
                     'by weight where that is 0; give one that is above 0, or batch=0 to leave the task out.')
  if kind.target == 'pair':
    if t.target_set:
      raise ValueError(f'config.{field}.target_set={t.target_set!r}: kind {kind.name!r} is matched with its own texts; '
                       "set it to ''.")
  else:
    _choose(f'{field}.target_set', t.target_set, sets)
    family = sets[t.target_set].condition.task
    if family != kind.target:
      raise ValueError(f'config.{field}.target_set={t.target_set!r} is of family {family!r}, but kind {kind.name!r} '
                       f'chooses among {kind.target!r}.')
    if kind.readout in ('picks', 'queries') and not sets[t.target_set].is_vocabulary:
      raise ValueError(f'config.{field}.target_set={t.target_set!r}: kind {kind.name!r} predicts words; its set must '
                       f"have values='{VOCABULARY}'.")
  if (kind.text_index is not None or kind.target == 'pair') and t.length < 2:
    raise ValueError(f'config.{field}.length={t.length} must be at least 2 tokens.')
  if t.length > c.model.max_text:
    raise ValueError(f'config.{field}.length={t.length} is above config.model.max_text={c.model.max_text}.')
  if kind.readout == 'picks' and not 1 <= t.picks <= t.length:
    raise ValueError(f'config.{field}.picks={t.picks} must be in 1…length={t.length}.')
  if kind.readout == 'slot' and t.template.count('<spe>') != 1:
    raise ValueError(f"config.{field}.template={t.template!r} must hold exactly one '<spe>' slot.")
  if t.head and (kind.readout not in ('first', 'slot') or not t.target_set or sets[t.target_set].is_vocabulary):
    raise ValueError(f'config.{field}.head=True needs a kind that chooses among the entries of a set; {kind.name!r} with '
                     f'target_set={t.target_set!r} does not.')
  if (kind.two_stream or kind.target == 'pair') and not t.captions:
    raise ValueError(f"config.{field}.captions is empty; give at least one template, for example ('{{caption}}',).")
  _check_pictures(name, t, kind, c)
  # Tasks of one kind share a batch only if their arrays have one shape.
  group = kind.name if len(shapes.get(t.kind, ())) <= 1 else '/'.join(map(str, (kind.name, *_shape(t))))
  return TaskSpec(
      name=name, kind=kind, group=group, source=t.source, split=t.split, batch=t.batch, weight=t.weight,
      sampling=t.sampling, temperature=t.temperature or kind.name, target_set=t.target_set, label=t.label,
      captions=tuple(t.captions), template=t.template, length=t.length, picks=t.picks, smoothing=t.smoothing,
      shift=t.shift, head=t.head, subset=t.subset, per_class=t.per_class,
      frames=t.frames, crop=t.crop, flip=t.flip, randaugment=t.randaugment, erasing=t.erasing, mixup=t.mixup, cutmix=t.cutmix)


def _resolve_evaluation(name: str, e, tasks: tuple[TaskSpec, ...], sets: dict[str, SetSpec]) -> Evaluation:
  _choose(f'evaluators.{name}.kind', e.kind, EVALUATIONS)
  by_name = {t.name: t for t in tasks}
  _choose(f'evaluators.{name}.task', e.task, by_name)
  task_spec, wanted = by_name[e.task], EVALUATIONS[e.kind]
  if not wanted(task_spec.kind):
    fitting = [t.name for t in tasks if wanted(t.kind)]
    raise ValueError(f'config.evaluators.{name}.task={e.task!r} is of kind {task_spec.kind.name!r}, which evaluator '
                     f'{e.kind!r} cannot ask; choices: {", ".join(fitting) or "none"}.')
  if e.number < 0 or e.batch < 1 or e.beams < 1 or e.penalty < 0:
    raise ValueError(f'config.evaluators.{name}: number={e.number} must be at least 0, batch={e.batch} at least 1, beams='
                     f'{e.beams} at least 1, penalty={e.penalty} at least 0.')
  if e.answers:
    field = f'evaluators.{name}.answers'
    if e.kind != 'caption':
      raise ValueError(f"config.{field}={e.answers!r} is for evaluators of kind 'caption', not {e.kind!r}; set it to ''.")
    _choose(field, e.answers, sets)
    if sets[e.answers].is_vocabulary:
      raise ValueError(f"config.{field}={e.answers!r} is the vocabulary, so that any word may be said; set it to '', or to a "
                       'set of texts.')
  if min(e.views, e.crops) < 1 or e.views * e.crops > 1 and not (e.kind == 'classification' and task_spec.frames):
    raise ValueError(f'config.evaluators.{name}: views={e.views}, crops={e.crops} must be at least 1, and are for the '
                     "classification of clips of files (a task with frames); set them to 1.")
  return Evaluation(name, e.kind, task_spec, e.split, e.number, e.batch, e.beams, e.penalty, e.answers, e.views, e.crops)


def check_trains(plan: Plan) -> None:
  """Raises ValueError where a plan only evaluates."""
  if not plan.tasks:
    raise ValueError('config.tasks: every task has batch=0, so that there is nothing to train; evaluate what '
                     'config.train.init names: python launch/evaluate.py --config=… --workdir=….')


def check_mesh(c: ml_collections.ConfigDict, mesh: Mapping[str, int]) -> None:
  """Raises ValueError where an axis of the mesh does not divide what it splits. mesh: size per axis."""
  split = [('model', 'model.heads', c.model.heads), ('model', 'model.hidden', c.model.hidden)]
  if c.moe.router != 'dense':
    split.append(('expert', 'moe.num_experts', c.moe.num_experts))
  if c.mesh.fsdp:
    split.append(('data', 'model.width', c.model.width))
  for axis, field, size in split:
    if size % mesh[axis]:
      raise ValueError(f'config.mesh.{axis}={mesh[axis]} must divide config.{field}={size}, which it splits; try '
                       f'{math.gcd(size, mesh[axis])}.')


def check_batches(plan: Plan, shards: int, accum: int) -> None:
  """Raises ValueError where a task's micro-batch does not divide over the batch shards of the mesh."""
  for t in plan.tasks:
    micro = t.batch // accum
    if micro % shards:
      unit = shards * accum
      raise ValueError(f'config.tasks.{t.name}.batch={t.batch} must be a multiple of {unit} ({shards} batch shards of '
                       f'the mesh × {accum} micro-steps); try {max(unit, t.batch - t.batch % unit)}.')
    if t.mixes and micro // shards % 2:
      unit = 2 * shards * accum
      raise ValueError(f'config.tasks.{t.name}.batch={t.batch} must be a multiple of {unit} for mixup or cutmix, which mix pairs '
                       f'of a shard ({shards} batch shards × {accum} micro-steps × 2); try {max(unit, t.batch - t.batch % unit)}.')


def check_halves(plan: Plan, shards: int, accum: int) -> None:
  """Raises ValueError where a task's micro-batch on a shard has no halves, which the interference metric compares."""
  unit = 2 * shards * accum
  for t in plan.tasks:
    if t.batch % unit:
      raise ValueError(f'config.tasks.{t.name}.batch={t.batch} must be a multiple of {unit} for config.train.'
                       f'interference_every > 0, which halves it ({shards} batch shards × {accum} micro-steps × 2); try '
                       f'{max(unit, t.batch - t.batch % unit)}, or interference_every=0.')
