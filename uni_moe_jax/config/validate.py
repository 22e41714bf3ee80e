"""Checks across fields, and of a config against a mesh; `fields.py` checks types and bounds."""

import math
import re
from collections.abc import Mapping

from uni_moe_jax.config.fields import check_choice, check_not_negative, check_pattern, fail_if, short
from uni_moe_jax.config.metric_names import metric_names
from uni_moe_jax.config.schema import FREEZE, Config, check_placement
from uni_moe_jax.config.task_schema import TaskConfig
from uni_moe_jax.tasks.router_names import DENSE, DISPATCHED
from uni_moe_jax.tasks.task_types import TaskType

TOKEN_ROUTER_FIELDS = (
    'experts_per_condition', 'capacity_factor', 'balance_loss_weight', 'importance_loss_weight', 'z_loss_weight')

_NAME = r'[\w .:-]+'  # as of columns, after which `presets.own` names tasks
_OF_IMAGES = ('crop', 'random_flip', 'randaugment', 'random_erasing')  # fields of tasks on your own data or TFDS


def check_sections(c: Config) -> None:
  """Raise UsageError if names cannot be used or fields of the sections of a config contradict each other."""
  _check_names(c)
  _check_model(c)
  _check_moe(c)
  fail_if(c.tokenizer.type == 'clip' and not c.tokenizer.merges_path,
          "tokenizer.merges_path='' must be a path when config.tokenizer.type='clip'; give that of CLIP's "
          'bpe_simple_vocab_16e6.txt.gz.')
  _check_train(c)
  _check_preflight(c)


def nearest_multiple(value: int, unit: int) -> int:
  """The largest multiple of `unit` up to `value`, for the fix in a message; `unit` if there is none."""
  return max(unit, value - value % unit)


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int, unit: int | None = None) -> None:
  """unit: whose multiples fit, if not those of `divisor`."""
  fail_if(value % divisor, f'{name}={value} must be a multiple of {divisor_name}; try '
                           f'{nearest_multiple(value, unit or divisor)}.')


def _check_names(c: Config) -> None:
  groups = c.model.extra_temperature_groups
  for group in groups:
    fail_if(',' in group, f'model.extra_temperature_groups={(group,)!r} has a comma in a name; write several names as '
                          f'"{tuple(group.split(","))!r}".')
  of_tasks = {f'tasks.{name}.temperature': (t.temperature,) for name, t in c.tasks.items() if t.temperature}
  named = {'tasks': c.tasks, 'target_sets': c.target_sets, 'task_types': c.task_types,
           'model.extra_temperature_groups': groups, **of_tasks}
  for field, names in named.items():
    for name in names:
      fail_if(not re.fullmatch(_NAME, name),
              f"{field}: the name {name!r} becomes part of names of files and parameters; use letters, digits, '_' and "
              "'-'.")


def _check_model(c: Config) -> None:
  m = c.model
  unit = math.lcm(m.num_heads, 4)  # a width that only fits one of both would be refused, too
  _check_multiple('model.width', m.width, f'config.model.num_heads={m.num_heads}', m.num_heads, unit)
  _check_multiple('model.width', m.width, '4 (the image position table)', 4, unit)
  fail_if(m.stem == 'conv' and (m.patch_size < 2 or m.patch_size & (m.patch_size - 1)),
          f"model.patch_size={m.patch_size} must be a power of two from 2 on with config.model.stem='conv', whose "
          'convolutions each halve the image.')
  fail_if(m.stem == 'conv' and m.width < m.patch_size,
          f"model.width={m.width} must be at least config.model.patch_size={m.patch_size} with config.model.stem="
          "'conv': its first convolution has 2 · width / patch_size channels, and normalizing one gives a constant.")
  _check_multiple('model.image_size', m.image_size, f'config.model.patch_size={m.patch_size}', m.patch_size)
  fail_if(m.posemb == 'learned' and m.posemb_scale != 1,
          f"model.posemb_scale={m.posemb_scale} changes computed positions; with posemb='learned' set it to 1.")
  head_dim = m.width // m.num_heads
  fail_if(m.attention_impl == 'cudnn' and m.dtype != 'bfloat16',
          f"model.attention_impl='cudnn' needs config.model.dtype='bfloat16', not {m.dtype!r}; set it to 'auto'.")
  fail_if(m.attention_impl == 'cudnn' and (head_dim % 8 or head_dim > 128),
          "model.attention_impl='cudnn' needs heads whose size, config.model.width / config.model.num_heads, is a "
          f"multiple of 8 up to 128, not {head_dim}; set it to 'auto'.")
  for name in ('pixel_mean', 'pixel_std', 'video_mean', 'video_std'):
    number = len(getattr(m, name))
    fail_if(number != m.channels and (number or name.startswith('pixel')),
            f'model.{name} has {number} values for config.model.channels={m.channels}.')


def _check_moe(c: Config) -> None:
  moe = c.moe
  for name in TOKEN_ROUTER_FIELDS if moe.router not in DISPATCHED else ():
    fail_if(value := getattr(moe, name),
            f"moe.{name}={value} needs config.moe.router='token' or 'context'; {moe.router!r} routes no tokens. Set it "
            'to 0.')
  fail_if(moe.top_k > moe.num_experts, f'moe.top_k={moe.top_k} must be in 1…config.moe.num_experts={moe.num_experts}.')
  fail_if(moe.experts_per_condition and not moe.top_k <= moe.experts_per_condition <= moe.num_experts,
          f'moe.experts_per_condition={moe.experts_per_condition} must be in config.moe.top_k={moe.top_k}…config.moe.'
          f'num_experts={moe.num_experts}, or 0 for all.')
  check_placement(moe.placement, c.model.num_layers)


def _check_train(c: Config) -> None:
  t = c.train
  for axis, size in vars(c.mesh).items():
    fail_if(axis != 'fsdp' and size < 1 and size != -1,
            f'mesh.{axis}={size} must be at least 1, or -1 (the devices that the other axes leave).')
  _check_validation(c)
  one_task = t.mixture == 'one_task'
  fail_if(one_task and t.grad_accum_steps > 1,
          f"train.grad_accum_steps={t.grad_accum_steps} needs config.train.mixture='all_tasks', not 'one_task'.")
  end, schedule = c.optim.decay_steps, c.optim.schedule
  fail_if(end and schedule == 'constant', f"optim.decay_steps={end}: the schedule 'constant' has no end; set it to 0.")
  fail_if(schedule == 'published' and 0 < end < t.steps,
          f'optim.decay_steps={end} must be at least config.train.steps={t.steps}, or 0: the published cosine rises '
          'again past its end.')
  fail_if(c.optim.name == 'muon' and c.optim.unused_params != 'update',
          f"optim.unused_params={c.optim.unused_params!r} needs config.optim.name='adamw', not 'muon'.")
  _check_param_groups(c)


def _check_param_groups(c: Config) -> None:
  for i, group in enumerate(c.optim.param_groups):
    fail_if(len(group) != 3 and not (len(group) == 2 and group[1] == FREEZE),
            f'optim.param_groups: {short(group)} is neither (pattern, lr factor, weight decay) nor (pattern, '
            f"'{FREEZE}').")
    pattern, *numbers = group
    name = f'optim.param_groups[{i}]'
    fail_if(not isinstance(pattern, str),
            f"{name}[0]={short(pattern)} must be a string, a regular expression for parameters; for example '.*'.")
    check_pattern(f'{name}[0]', pattern)
    if len(numbers) == 2:
      check_not_negative(f'{name}[1]', numbers[0], 'a factor of the learning rate', 'give 1.0 for the rate itself')
      check_not_negative(f'{name}[2]', numbers[1], 'a weight decay', '0.0 is off')


def _check_validation(c: Config) -> None:
  """Raise UsageError if evaluations during training, or the choice of a checkpoint, cannot be as the fields say."""
  t, during = c.train, {name: e for name, e in c.evaluators.items() if e.during_training}
  for name, e in during.items():
    fail_if(e.split.startswith('test'),
            f'evaluators.{name}.split={e.split!r} with during_training=True would choose a checkpoint by the test '
            'data; give a validation split, or set during_training=False.')
  fail_if(t.evaluate_every and not during,
          f'train.evaluate_every={t.evaluate_every} needs an evaluator with during_training=True; set it for one of '
          f'{", ".join(map(repr, c.evaluators)) or "config.evaluators, which is empty"}, or evaluate_every=0.')
  if t.evaluate_every:
    _check_multiple('train.evaluate_every', t.evaluate_every, f'config.train.log_every={t.log_every}', t.log_every)
  if not t.best_metric:
    return
  losses = ['loss/total', *(f'loss/{name}' for name, task in c.tasks.items() if task.batch_size)]
  measured = [f'eval/{name}/{metric}' for name, e in during.items() if e.task in c.tasks
              for metric in metric_names(e.type, c.tasks[e.task].type)]
  check_choice('train.best_metric', t.best_metric, (*losses, *measured))
  fail_if(t.best_metric in measured and not t.evaluate_every,
          f'train.best_metric={t.best_metric!r} needs config.train.evaluate_every; set it to a divisor of '
          f'config.train.checkpoint_every={t.checkpoint_every}.')
  unit = 'evaluate_every' if t.best_metric in measured else 'log_every'  # a checkpoint is compared by what is logged
  _check_multiple('train.checkpoint_every', t.checkpoint_every, f'config.train.{unit}={getattr(t, unit)}',
                  getattr(t, unit))


def _check_preflight(c: Config) -> None:
  for name, lengths in c.preflight.target_lengths.items():
    field = f'preflight.target_lengths.{name}'
    check_choice(field, name, c.target_sets)
    longest = c.target_sets[name].max_len
    pairs = isinstance(lengths, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in lengths)
    fail_if(not pairs or not lengths or any(not 2 <= tokens <= longest or number < 1 for tokens, number in lengths),
            f'{field}={lengths!r} must contain (tokens, entries) pairs, tokens in 2…config.target_sets.{name}.max_len='
            f'{longest}, entries at least 1; for example (({longest}, 1000),).')
  for name, frames in c.preflight.num_frames.items():
    check_choice(f'preflight.num_frames.{name}', name, c.tasks)
    fail_if(type(frames) is not int or not 1 <= frames <= c.model.max_num_frames,
            f'preflight.num_frames.{name}={frames!r} must be a whole number in '
            f'1…config.model.max_num_frames={c.model.max_num_frames}.')


def check_task(name: str, t: TaskConfig, task_type: TaskType, c: Config) -> None:
  """Raise UsageError if fields of a task contradict each other or those of other sections."""
  field, accum, m = f'tasks.{name}', c.train.grad_accum_steps, c.model
  pair = task_type.target == 'pair'
  fail_if(name == 'total', f'{field}: loss/total in the log is the sum of all tasks; choose another name.')
  fail_if(t.batch_size < 0 or t.batch_size % accum,
          f'{field}.batch_size={t.batch_size} must be a positive multiple of config.train.grad_accum_steps={accum}; '
          f'try {nearest_multiple(t.batch_size, accum)}.')
  if pair and c.train.negatives != 'global':
    divisor = f'config.train.negatives={c.train.negatives} times config.train.grad_accum_steps={accum}'
    _check_multiple(f'{field}.batch_size', t.batch_size, divisor, c.train.negatives * accum)
  fail_if(t.shots and not t.label_column,
          f'{field}.shots={t.shots} needs a label_column; set shots=0, and train_fraction instead.')
  fail_if(c.train.mixture == 'one_task' and t.batch_size and (t.sampling_weight or t.loss_weight) <= 0,
          f"{field}: sampling_weight={t.sampling_weight}, loss_weight={t.loss_weight}, but mixture='one_task' draws "
          'tasks by sampling_weight, or by loss_weight if that is 0; set one above 0, or batch_size=0 to leave the '
          'task out.')
  fail_if((task_type.text_index is not None or pair) and t.max_len < 2,
          f'{field}.max_len={t.max_len} must be at least 2 tokens.')
  for field_name, limit in (('max_len', 'max_text_len'), ('num_frames', 'max_num_frames')):
    value, most = getattr(t, field_name), getattr(m, limit)
    fail_if(value > most, f'{field}.{field_name}={value} is above config.model.{limit}={most}.')
  fail_if(task_type.readout == 'masked' and not 1 <= t.max_predictions <= t.max_len,
          f'{field}.max_predictions={t.max_predictions} must be in 1…max_len={t.max_len}.')
  fail_if(task_type.readout == 'slot' and t.template.count('<spe>') != 1,
          f"{field}.template={t.template!r} must contain exactly one '<spe>' slot.")
  fail_if(t.word_dropout and task_type.readout != 'slot',
          f'{field}.word_dropout={t.word_dropout} leaves out words of a template; task type {task_type.name!r} has '
          'none. Set it to 0.')
  for field_name in ('max_shift', 'max_affine'):
    value = getattr(t, field_name)
    fail_if(value and not task_type.visual,
            f'{field}.{field_name}={value} moves images; task type {task_type.name!r} has none. Set it to 0.')
  fail_if((task_type.two_stream or pair) and not t.caption_templates,
          f"{field}.caption_templates is empty; give at least one template, for example ('{{caption}}',).")
  fail_if(t.frame_stride and not t.num_frames,
          f'{field}.frame_stride={t.frame_stride} needs config.{field}.num_frames > 0; set it to 0.')
  fail_if(t.min_crop_area != TaskConfig.min_crop_area and t.crop != 'random_resized_crop',
          f"{field}.min_crop_area={t.min_crop_area} needs config.{field}.crop='random_resized_crop', not {t.crop!r}.")
  fail_if(t.mirrored_words and not t.random_flip,
          f'{field}.mirrored_words={t.mirrored_words} needs config.{field}.random_flip=True.')
  fail_if(any(len(pair) != 2 for pair in t.mirrored_words),
          f"{field}.mirrored_words={t.mirrored_words} must contain pairs of words, for example (('left', 'right'),).")
  fail_if(t.single_answer and not task_type.has_classes,
          f'{field}.single_answer=True is for task types with answers; {task_type.name!r} has none. Set it to False.')
  for field_name in (*_OF_IMAGES, 'single_answer'):
    value, off = getattr(t, field_name), getattr(TaskConfig, field_name)
    fail_if(value != off and field_name in _OF_IMAGES and not task_type.visual,
            f'{field}.{field_name}={value!r} is for images and videos; task type {task_type.name!r} has none. Set it '
            f'to {off!r}.')
    fail_if(value != off and ':' not in t.source,
            f"{field}.{field_name}={value!r} is for your own data and TFDS ('own:NAME', 'tfds:NAME'), and {t.source!r} "
            f'is embedded. Set it to {off!r}.')
  fail_if(t.mixes and not (task_type.visual and task_type.readout == 'cls' and not pair),
          f'{field}: mixup_alpha={t.mixup_alpha}, cutmix_alpha={t.cutmix_alpha} mix images and their classes; task '
          f'type {task_type.name!r} has none. Set them to 0.')


def check_mesh(c: Config, mesh: Mapping[str, int]) -> None:
  """Raise UsageError if an axis does not divide the dimension that it splits. mesh: size per axis."""
  split = [('model', 'model.num_heads', c.model.num_heads), ('model', 'model.mlp_dim', c.model.mlp_dim)]
  split += [('expert', 'moe.num_experts', c.moe.num_experts)] if c.moe.router != DENSE else []
  split += [('data', 'model.width', c.model.width)] if c.mesh.fsdp else []
  for axis, field, size in split:
    fail_if(size % mesh[axis], f'mesh.{axis}={mesh[axis]} must divide config.{field}={size}, which it splits; try '
                               f'{math.gcd(size, mesh[axis])}.')
