"""What is exported: which tasks, by which model, with which features of their target sets, and examples of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.config.plan import Evaluation, Plan, SetSpec, TaskSpec
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.data.pipeline.mixtures import evaluation_batches
from uni_moe_jax.data.pipeline.target_sets import TargetSet
from uni_moe_jax.eval.predictor import INPUTS, Predictor
from uni_moe_jax.export.merge import merged
from uni_moe_jax.export.programs import WHOLE, Asked
from uni_moe_jax.model.spec import ModelSpec, router_input_name
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe import routers
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest


@dataclasses.dataclass(frozen=True)
class Contents:
  """A finished model and what belongs to it.

  Attributes:
    spec, params: of the model that is left; a router that looks at tokens is still there.
    asked: tasks.
    sets: target sets of the tasks. features: f32 [V, D] of their entries, normalised, by the model as it was trained.
    data: of the run: its tokenizer, its fingerprint.
    examples: inputs of some examples per task. answers: what the model says to them, in words.
    trained: the model as it was trained.
    evaluators: of the tasks, as the run has them.
  """
  spec: ModelSpec
  params: Any
  asked: tuple[Asked, ...]
  sets: dict[str, tuple[SetSpec, TargetSet]]
  features: dict[str, np.ndarray]
  data: Data
  examples: dict[str, dict[str, np.ndarray]]
  answers: dict[str, list[str]]
  trained: ModelSpec
  evaluators: tuple[Evaluation, ...]

  def summary(self) -> str:
    """One line for the terminal."""
    if self.spec.kernels:
      left = f'{self.spec.num_experts} kernels per projection for {", ".join(router_input_name(row) for row, _ in self.spec.kernels)}'
    else:
      left = 'a dense model' if self.spec.router == routers.DENSE else f'with its {self.spec.router} router and its experts'
    return f'{left}, {sum(np.size(x) for x in jax.tree.leaves(self.params)):,} parameters, {len(self.asked)} tasks'


def collect(
    spec: ModelSpec, params: Any, plan: Plan, data: Data, *, tasks: Sequence[str] = (), fixed_sets: bool = False,
    dtype: str | None = None, examples: int = 0) -> Contents:
  """Contents of the export of a trained run.

  Args:
    spec, params, plan, data: of the run.
    tasks: names of those that are asked for; all by default.
    fixed_sets: only the entries of target sets can be answers: no program encodes other texts, and no kernel serves them.
    dtype: of products; None: as in training. Parameters stay float32.
    examples: how many per task.

  Raises:
    UsageError: a task that the run does not have.
  """
  known = {t.name: t for t in (*plan.tasks, *plan.probes)}
  for name in tasks:
    if name not in known:
      raise UsageError(f'--tasks: the run has no task {name!r}; {nearest(name, known)}.')
  whole = portable(spec, dtype or spec.dtype)
  chosen = [known[name] for name in dict.fromkeys(tasks or known)]
  by_name = {s.name: (s, data.target_sets[s.name]) for s in (*plan.sets, *plan.probe_sets)}
  asked = tuple(_asked(t, plan, data, by_name, fixed_sets) for t in chosen)
  sets = {t.target_set: by_name[t.target_set] for t in chosen if t.target_set}
  shown = {a.task.name: _inputs(a.task, plan, data, examples) for a in asked if examples and a.task.kind.target != 'pair'}
  with jax.default_matmul_precision(WHOLE):
    predictor = Predictor(UniPerceiver(whole), params, sets, data.tokenizer)
    features = {name: np.asarray(predictor.target_set(name)) for name in sets}
    answers = {a.task.name: _answers(predictor, a, sets, shown[a.task.name]) for a in asked if a.task.name in shown}
    if routers.routes_tokens(spec.router):
      left, values = whole, params
    else:
      left, values = merged(whole, params, tuple(dict.fromkeys(c for a in asked for c in a.conditions)))
  answers = {name: words for name, words in answers.items() if words is not None}
  evaluators = tuple(e for e in plan.evaluations if e.task in chosen)
  return Contents(left, values, asked, sets, features, data, {name: shown[name] for name in answers}, answers, spec, evaluators)


def portable(spec: ModelSpec, dtype: Any) -> ModelSpec:
  """A model as it runs at inference on any platform: of the ways to group products, `loop` lowers for all of them."""
  return dataclasses.replace(spec, dtype=jnp.dtype(dtype), remat=False, gmm='tiled')


def _asked(
    task: TaskSpec, plan: Plan, data: Data, sets: dict[str, tuple[SetSpec, TargetSet]], fixed_sets: bool) -> Asked:
  kind, texts, size = task.type, None, 0
  if kind.target == 'pair':
    texts = kind.pair_condition
  else:
    spec, target = sets[task.target_set]
    size = target.size
    # Words are encoded already; entries with learnt tokens are not texts alone.
    if not (fixed_sets or spec.is_vocabulary or spec.label_prompts):
      texts = spec.condition
  frames = _inputs(task, plan, data, 1)['pixels'].shape[1] if kind.visual else 0
  beams, penalty = next(((e.beam_size, e.length_penalty) for e in plan.evaluations if e.task == task and e.type == 'caption'), (1, 0.0))
  return Asked(task, frames, size, texts, beams, penalty)


def _inputs(task: TaskSpec, plan: Plan, data: Data, number: int) -> dict[str, np.ndarray]:
  """Input fields of the first examples of the split that the task is evaluated on, else trained on."""
  split = next((e.split for e in plan.evaluations if e.task == task), task.split)
  examples = data.examples(task, split)
  number = min(number, examples.size)
  fields, _ = next(evaluation_batches(examples, np.arange(number), number))
  names = ('pixels',) if task.type.two_stream else INPUTS
  return {name: fields[name] for name in names if name in fields and name != 'id'}


def _answers(
    predictor: Predictor, asked: Asked, sets: dict[str, tuple[SetSpec, TargetSet]], fields: dict[str, np.ndarray]
) -> list[str] | None:
  """In words: captions, or the most likely entries; None of a task whose answers are single words."""
  task = asked.task
  if task.type.readout == 'queries':
    return predictor.captions(task, fields['pixels'], asked.beams, asked.penalty)
  texts = sets[task.target_set][1].names
  if not texts:
    return None
  ids = {'id': np.zeros(len(next(iter(fields.values()))), np.uint32)}
  best = predictor.log_probabilities(predictor.inputs(task.type, {**fields, **ids}), task)[:, 0].argmax(-1)
  return [texts[i] for i in best]
