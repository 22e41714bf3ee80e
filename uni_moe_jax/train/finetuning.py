"""Regimes: what becomes of a trained run on one task. It is fine-tuned, prompt-tuned, or evaluated as it is.

A fine-tuning recipe is config alone. Model, experts, tokenizer, data and kinds are those of the run; the task is one of its own or one of
`TRANSFER`. `configs/finetune.py`, `prompt_tune.py` and `zero_shot.py` are these functions by name.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets
from uni_moe_jax.config.plan import VOCABULARY, Plan, make_plan
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

AMOUNTS = ('few', 'all')
PER_CLASS, SHARE = 10, 0.01  # `few`: ten examples of every class; where there are no classes, one in a hundred
BATCH = 32  # of tasks that the run only evaluates

Fill = Callable[[ml_collections.ConfigDict], None]


def digits(c: ml_collections.ConfigDict) -> None:
  """Which digit a handwritten one is."""
  c.target_sets.digits = config.target_set('digits/name', family='names')
  c.tasks.digits = config.task('image_classification', 'digits', batch_size=BATCH, target_set='digits', label_column='name', label_smoothing=0.1)
  c.evaluators.digits = config.evaluator('classification', 'digits', split='test')


def video_caption(c: ml_collections.ConfigDict) -> None:
  """What a clip shows, in words."""
  c.target_sets.vocabulary = config.target_set(VOCABULARY, family='words', softmax='sampled', num_sampled=512)
  c.tasks.video_caption = config.task(
      'video_caption', 'videos', batch_size=BATCH, target_set='vocabulary', caption_templates=('{name}',), max_len=presets.NAME_TOKENS,
      label_smoothing=0.1)
  for split, where in presets.UNSEEN:
    c.evaluators[f'video caption, {where}'] = config.evaluator('caption', 'video_caption', split=split, num_examples=400)


def video_name(c: ml_collections.ConfigDict) -> None:
  """Which of 400 names a clip has."""
  c.tasks.video_name = config.task('video_retrieval', 'videos', batch_size=BATCH, caption_templates=('{name}',), max_len=presets.NAME_TOKENS)
  for split, where in presets.UNSEEN:
    c.evaluators[f'video name, {where}'] = config.evaluator('retrieval', 'video_name', split=split, num_examples=400)


# Tasks that no config trains on: what a run is adapted to.
TRANSFER: dict[str, Fill] = {'digits': digits, 'video_caption': video_caption, 'video_name': video_name}


def finetune(arg: str) -> ml_collections.ConfigDict:
  """Every parameter trains, lower layers more slowly. arg: 'RUN,TASK' or 'RUN,TASK,few'; all training examples by default."""
  c = _start(arg, 'configs/finetune.py', TRANSFER, 'all')
  train_all(c)
  return c


def prompt_tune(arg: str) -> ml_collections.ConfigDict:
  """Prompts, norms and a linear head train, all else stands still. arg: 'RUN,TASK' or 'RUN,TASK,all'; few by default."""
  c = _start(arg, 'configs/prompt_tune.py', TRANSFER, 'few', linear_head=True)
  train_prompts(c)
  return c


def zero_shot(arg: str, own: Mapping[str, Fill] | None = None) -> ml_collections.ConfigDict:
  """Nothing trains: the run's parameters are asked the task. arg: 'RUN,TASK'.

  Args:
    arg: the run and the task.
    own: more tasks by name, as in `TRANSFER`. They may be of kinds that the run does not know: a row in `config.task_types`.
  """
  c = _start(arg, 'configs/zero_shot.py', {**TRANSFER, **(own or {})}, '')
  train_nothing(c)
  return c


def train_all(c: ml_collections.ConfigDict) -> None:
  """Every parameter of a run that `c` starts from goes on, lower layers more slowly."""
  c.optim.update(dict(learning_rate=5e-4, warmup_steps=10, layerwise_lr_decay=0.8))
  c.train.update(dict(steps=200, log_every=10, checkpoint_every=100))


def train_prompts(c: ml_collections.ConfigDict) -> None:
  """Prompts, norms and linear heads train, see `recipes.prompt_tune`.

  Targets have no prompts: what the run knows of names that few examples do not show stays what it is (docs/results/embedded.md).
  """
  c.optim.update(dict(learning_rate=5e-3, warmup_steps=10))
  c.train.update(dict(steps=200, log_every=10, checkpoint_every=100))
  presets.prompt_tune(c, sides='inputs')


def train_nothing(c: ml_collections.ConfigDict) -> None:
  """The run is asked the tasks as it is."""
  for t in c.tasks.values():
    t.batch_size, t.linear_head = 0, False
    # A kind like none of the run's has no scale that was learnt for it: the order of single answers needs none, but sums of
    # log-probabilities (beams, length penalty) and perplexities are at an arbitrary one.
    t.temperature = t.temperature or c.model.extra_temperature_groups[0]


# What becomes of a run, by the word that configs take.
MODES: dict[str, Fill] = {'': train_all, 'finetune': train_all, 'prompts': train_prompts, 'untuned': train_nothing}


class Recipe(NamedTuple):
  """A config file of an adaptation study, and how many examples it trains on: 'few', 'all', or '' for none."""
  file: str
  amount: str

  def argument(self, run: str, task: str) -> str:
    """The argument of the config file."""
    return ','.join([run, task, *([self.amount] if self.amount else [])])


# The first three have the same few examples; the last one shows the gain of all examples.
RECIPES: dict[str, Recipe] = {
    'zero-shot': Recipe('configs/zero_shot.py', ''),
    'prompts': Recipe('configs/prompt_tune.py', 'few'),
    'finetune': Recipe('configs/finetune.py', 'few'),
    'finetune-all': Recipe('configs/finetune.py', 'all'),
}


def _start(
    arg: str, file: str, transfer: Mapping[str, Fill], default: str, linear_head: bool = False) -> ml_collections.ConfigDict:
  """Config that starts from a run and has one task, which may read as many examples as `arg` says.

  Args:
    arg, file: of whom is asked, and which config. transfer: tasks beside those that the run has trained.
    default: how many examples where `arg` does not say; '' of a config that trains nothing: `arg` may not say.
    linear_head: a task that chooses among classes gets a linear head.

  Raises:
    UsageError: the argument is not RUN,TASK, or names no run, no task or no amount.
  """
  run, name, *amount = arg.split(',') if arg.count(',') else (arg, '')
  if not run or not name or len(amount) > bool(default) or not set(amount) <= set(AMOUNTS):
    more = f', or RUN,TASK,{"|".join(AMOUNTS)} ({default} by default)' if default else ''
    raise UsageError(f'{file}:{arg}: give RUN,TASK{more}: the workdir of a trained run, and one of its tasks or of '
                     f'{", ".join(transfer)}.')
  c, plan = start_from(run, f'{file}:{arg}')
  known = workdir.load_config(run).copy_and_resolve_references()
  if name in known.tasks and (known.tasks[name].batch_size or name not in transfer):  # what the run has trained is its own
    _own_task(c, known, name)
  elif name in transfer:
    transfer[name](c)
  else:
    raise UsageError(f'{file}:{arg}: task {name!r} is unknown; {nearest(name, [*transfer, *known.tasks])}.')
  t = c.tasks[name]
  share_temperatures(c, plan)
  few = (amount or [default])[0] == 'few'
  classes = any(k.name == t.type and k.has_classes for k in plan.task_types)
  t.shots = PER_CLASS if few and classes else 0
  t.train_fraction = SHARE if few and not classes else 1.0
  t.linear_head = linear_head and classes
  return c


def start_from(run: str, named: str) -> tuple[ml_collections.ConfigDict, Plan]:
  """(config that starts from a run and has no task yet, the run's plan). named: what was asked for, for the error.

  Raises:
    UsageError: there is no such run.
  """
  if not (pathlib.Path(run) / workdir.CONFIG_FILE).is_file():
    others = [p.parent.name for p in pathlib.Path(run).parent.glob(f'*/{workdir.CONFIG_FILE}')]
    raise UsageError(f'{named}: {run!r} holds no run ({workdir.CONFIG_FILE} is missing); '
                     f'{nearest(pathlib.Path(run).name, others)}.')
  c = workdir.load_config(run)
  plan = make_plan(c)
  for section in ('optim', 'train', 'preflight', 'target_sets', 'tasks', 'evaluators'):
    c[section] = config.base()[section]
  c.seed, c.train.init, c.model.extra_temperature_groups = 0, run, plan.temperatures
  return c, plan


def share_temperatures(c: ml_collections.ConfigDict, plan: Plan) -> None:
  """Tasks that name no temperature group get that which the run learnt for such a kind, or one of their own."""
  for t in c.tasks.values():
    t.temperature = t.temperature or _temperature(plan, t.type)


def _own_task(c: ml_collections.ConfigDict, known: ml_collections.ConfigDict, name: str) -> None:
  """A task of the run, with its set and its evaluators."""
  t = known.tasks[name]
  t.update(dict(batch_size=t.batch_size or BATCH, loss_weight=1.0, sampling_weight=0.0))
  c.tasks[name] = t
  if t.target_set:
    c.target_sets[t.target_set] = known.target_sets[t.target_set]
  for evaluator, e in known.evaluators.items():
    if e.task == name:
      c.evaluators[evaluator] = e


def _temperature(plan: Plan, kind: str) -> str:
  """The scale that the run learnt for a kind, or for one that reads and answers alike (video as images); '' if for none."""
  rows = {k.name: dataclasses.replace(k, name='') for k in plan.task_types}
  alike = [t for t in plan.tasks if rows[t.type.name] == rows.get(kind)]
  return min(alike, key=lambda t: t.type.name != kind).temperature if alike else ''
