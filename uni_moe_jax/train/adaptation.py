"""Fine-tuning recipes: fine-tune or prompt-tune a trained run on one task, or evaluate it as it is.

A recipe is config alone. Model, experts, tokenizer, data and task types are those of the run; the task is one of the
run's own or of `TRANSFER`. `configs/finetune.py`, `prompt_tune.py` and `zero_shot.py` are these functions by name.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets, schema
from uni_moe_jax.config.plan import Plan, make_plan
from uni_moe_jax.config.task_schema import VOCABULARY
from uni_moe_jax.io import storage
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

SHOTS, TRAIN_FRACTION = 10, 0.01  # data=few: ten examples per class; 1 % for tasks without classes
BATCH_SIZE = 32  # of tasks that the run only evaluates

Edit = Callable[[ml_collections.ConfigDict], None]


def digits(c: ml_collections.ConfigDict) -> None:
  """Classifies handwritten digits."""
  c.target_sets.digits = config.target_set('digits/name', family='names')
  c.tasks.digits = config.task(
      'image_classification', 'digits', batch_size=BATCH_SIZE, target_set='digits', label_column='name',
      label_smoothing=0.1)
  c.evaluators.digits = config.evaluator('classification', 'digits', split='test')


def video_caption(c: ml_collections.ConfigDict) -> None:
  """Captions videos."""
  c.target_sets.vocabulary = config.target_set(VOCABULARY, family='words', softmax='sampled', num_sampled=512)
  c.tasks.video_caption = config.task(
      'video_caption', 'videos', batch_size=BATCH_SIZE, target_set='vocabulary', caption_templates=('{name}',),
      max_len=presets.NAME_TOKENS, label_smoothing=0.1)
  for split, novelty in presets.UNSEEN:
    c.evaluators[f'video caption, {novelty}'] = config.evaluator('caption', 'video_caption', split=split,
                                                                 num_examples=400)


def video_name(c: ml_collections.ConfigDict) -> None:
  """Retrieves the name of a video among 400."""
  c.tasks.video_name = config.task(
      'video_retrieval', 'videos', batch_size=BATCH_SIZE, caption_templates=('{name}',), max_len=presets.NAME_TOKENS)
  for split, novelty in presets.UNSEEN:
    c.evaluators[f'video name, {novelty}'] = config.evaluator(
        'retrieval', 'video_name', split=split, num_examples=400, num_draws=presets.DRAWS)


# Tasks that no config trains on: a run is adapted to them.
TRANSFER: dict[str, Edit] = {'digits': digits, 'video_caption': video_caption, 'video_name': video_name}


def finetune(arg: str = '') -> ml_collections.ConfigDict:
  """Trains every parameter, lower layers more slowly. arg: run=RUN,task=TASK[,data=few|all] (all)."""
  return _config_of(arg, 'finetune', train_all, 'all')


def prompt_tune(arg: str = '') -> ml_collections.ConfigDict:
  """Trains prompts, norms and a linear head. arg: run=RUN,task=TASK[,data=few|all] (few)."""
  return _config_of(arg, 'prompt_tune', train_prompts, 'few', linear_head=True)


def zero_shot(arg: str, own: Mapping[str, Edit] | None = None) -> ml_collections.ConfigDict:
  """Trains nothing: evaluates the run on the task. arg: run=RUN,task=TASK.

  own: more tasks by name, as in `TRANSFER`. Their types may be new to the run: a row in `config.task_types`.
  """
  return _config_of(arg, 'zero_shot', train_nothing, own=own)


def train_all(c: ml_collections.ConfigDict) -> None:
  """Trains every parameter of the run that `c` starts from, lower layers more slowly."""
  c.optim.update(dict(learning_rate=5e-4, warmup_steps=10, layerwise_lr_decay=0.8))
  c.train.update(dict(steps=200, log_every=10, checkpoint_every=100))


def train_prompts(c: ml_collections.ConfigDict) -> None:
  """Trains prompts, norms and linear heads, see `presets.prompt_tune`.

  Targets have no prompts, so that the embeddings of names that are not among a few examples do not change
  (docs/results/embedded.md).
  """
  c.optim.update(dict(learning_rate=5e-3, warmup_steps=10))
  c.train.update(dict(steps=200, log_every=10, checkpoint_every=100))
  presets.prompt_tune(c, sharing='inputs')


def train_nothing(c: ml_collections.ConfigDict) -> None:
  """Only evaluates the run."""
  for t in c.tasks.values():
    t.batch_size, t.linear_head = 0, False
    # A task type unlike those of the run has no learned scale. The order of single answers does not depend on the
    # scale, but sums of log-probabilities (beams, length penalty) and perplexities do: theirs is arbitrary.
    t.temperature = t.temperature or c.model.extra_temperature_groups[0]


# Argument `mode` of configs/own.py and configs/benchmark.py.
MODES: dict[str, Edit] = {'finetune': train_all, 'prompts': train_prompts, 'zero_shot': train_nothing}


# Configs of an adaptation study. The first three have the same few examples; the last shows the gain of all examples.
RECIPES: dict[str, str] = {
    'zero-shot': 'zero_shot:run={run},task={task}',
    'prompts': 'prompt_tune:run={run},task={task},data=few',
    'finetune': 'finetune:run={run},task={task},data=few',
    'finetune-all': 'finetune:run={run},task={task},data=all',
}


def _config_of(
    arg: str, file: str, recipe: Edit, data: str = '', linear_head: bool = False, own: Mapping[str, Edit] | None = None
) -> ml_collections.ConfigDict:
  """A config that starts from a run and has one task.

  Args:
    arg, file: of the config. recipe: what trains. own: tasks beside those of `TRANSFER` and of the run.
    data: 'few' or 'all' by default; '': the config trains nothing.
    linear_head: a task that chooses among classes gets a linear head.

  Raises:
    UsageError: an argument is unknown or missing, or there is no such run or task.
  """
  a = config.arguments(arg, file, dict(run='', task='', **(dict(data=data) if data else {})), dict(data=('few', 'all')),
                       required=('run', 'task'))
  transfer = {**TRANSFER, **(own or {})}
  c, plan = start_from(a.run, f'{file}:{arg}')
  run_config = workdir.load_config(a.run).copy_and_resolve_references()
  if a.task in run_config.tasks and (run_config.tasks[a.task].batch_size or a.task not in transfer):
    _copy_task(c, run_config, a.task)
  elif a.task in transfer:
    transfer[a.task](c)
  else:
    raise UsageError(f'{file}:{arg}: task {a.task!r} is unknown; {nearest(a.task, [*transfer, *run_config.tasks])}.')
  t, few = c.tasks[a.task], bool(data) and a.data == 'few'
  share_temperatures(c, plan)
  has_classes = any(k.name == t.type and k.has_classes for k in plan.task_types)
  t.shots = SHOTS if few and has_classes else 0
  t.train_fraction = TRAIN_FRACTION if few and not has_classes else 1.0
  t.linear_head = linear_head and has_classes
  recipe(c)
  return c


def start_from(run: str, config_name: str) -> tuple[ml_collections.ConfigDict, Plan]:
  """(config that starts from a run and has no task yet, the run's plan). Raises UsageError if there is no such run."""
  if not (storage.path(run) / workdir.CONFIG_FILE).is_file():
    others = [p.parent.name for p in storage.path(run).parent.glob(f'*/{workdir.CONFIG_FILE}')]
    raise UsageError(f'{config_name}: {run!r} is no work directory of a run ({workdir.CONFIG_FILE} is missing); '
                     f'{nearest(pathlib.Path(run).name, others)}.')
  c = workdir.load_config(run)
  plan = make_plan(c)
  c = schema.apply_choices(c)
  for section in ('optim', 'train', 'preflight', 'target_sets', 'tasks', 'evaluators'):
    c[section] = config.base()[section]
  c.compat = c.model.variant = ''  # what they set is set; the recipe may change it
  c.seed, c.train.init, c.model.extra_temperature_groups = 0, run, plan.temperatures
  return c, plan


def share_temperatures(c: ml_collections.ConfigDict, plan: Plan) -> None:
  """Gives tasks without a temperature group that of their task type in the run, or a new one.

  A task type that is equal but for its name (video as image) counts, too.
  """
  types = {t.name: dataclasses.replace(t, name='') for t in plan.task_types}
  for t in c.tasks.values():
    same = [trained for trained in plan.tasks if types[trained.type.name] == types.get(t.type)]
    if same and not t.temperature:
      t.temperature = min(same, key=lambda trained: trained.type.name != t.type).temperature


def _copy_task(c: ml_collections.ConfigDict, run_config: ml_collections.ConfigDict, name: str) -> None:
  """Copies a task of the run with its evaluators and its target set."""
  t = run_config.tasks[name]
  t.update(dict(batch_size=t.batch_size or BATCH_SIZE, loss_weight=1.0, sampling_weight=0.0))
  c.tasks[name] = t
  if t.target_set:
    c.target_sets[t.target_set] = run_config.target_sets[t.target_set]
  for evaluator, e in run_config.evaluators.items():
    if e.task == name:
      c.evaluators[evaluator] = e
      e.rerank_by = ''  # its task is not copied
