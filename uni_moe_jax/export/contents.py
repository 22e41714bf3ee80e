"""Contents of an export: model, tasks, features of their target sets, and examples."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.config.plan import Evaluation, Plan, SetSpec, TaskSpec
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.data.batches.target_sets import TargetSet
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.eval.predictor import INPUTS, Predictor
from uni_moe_jax.export.merge import merged
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.kernels import gmm
from uni_moe_jax.model import merging
from uni_moe_jax.model.spec import ModelSpec, router_input_name
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

Sets = dict[str, tuple[SetSpec, TargetSet]]
Mixtures = dict[Condition, dict[int, dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Contents:
  """An exported model and its data."""
  spec: ModelSpec  # of the exported model; a router by token remains in it
  params: Any
  tasks: tuple[ExportedTask, ...]
  target_sets: Sets  # of the tasks
  features: dict[str, np.ndarray]  # of their entries by the trained model, normalized, f32 [V, D] each
  data: Data  # of the run
  examples: dict[str, dict[str, np.ndarray]]  # inputs of some examples per task
  answers: dict[str, list[str]]  # predictions for the examples
  trained: ModelSpec  # of the model as it was trained
  evaluators: tuple[Evaluation, ...]  # of the tasks
  # Weights f32 [E] of the experts that make the kernel of a condition, by condition, layer and sublayer; {} for routers
  # by token.
  mixtures: Mixtures

  def summary(self) -> str:
    """One line for the terminal."""
    if self.spec.kernels:
      inputs = ', '.join(router_input_name(condition) for condition, _ in self.spec.kernels)
      model = f'{self.spec.num_experts} kernels per projection for {inputs}'
    elif self.spec.router == routers.DENSE:
      model = 'a dense model'
    else:
      model = f'with its {self.spec.router} router and experts'
    return f'{model}, {sum(np.size(x) for x in jax.tree.leaves(self.params)):,} parameters, {len(self.tasks)} tasks'


def make_contents(
    spec: ModelSpec, params: Any, plan: Plan, data: Data, *, tasks: Sequence[str] = (), bake_targets: bool = False,
    dtype: str | None = None, num_examples: int = 0) -> Contents:
  """Returns the contents of the export of a trained run.

  Args:
    tasks: names of the tasks to export; all by default.
    bake_targets: only the entries of target sets can be answers, so no program encodes other texts and no kernel serves
      them.
    dtype: of matrix products; None: that of training. Parameters stay float32.
    num_examples: per task.

  Raises:
    UsageError: the run has no task of that name.
  """
  known = {t.name: t for t in (*plan.tasks, *plan.probes)}
  for name in tasks:
    if name not in known:
      raise UsageError(f'--tasks: the run has no task {name!r}; {nearest(name, known)}.')
  portable_spec = portable(spec, dtype or spec.dtype)
  chosen = [known[name] for name in dict.fromkeys(tasks or known)]
  by_name = {s.name: (s, data.target_sets[s.name]) for s in (*plan.sets, *plan.probe_sets)}
  exported = tuple(_exported_task(t, plan, data, by_name, bake_targets) for t in chosen)
  sets = {t.target_set: by_name[t.target_set] for t in chosen if t.target_set}
  examples, answers = {}, {}
  predictor = Predictor(UniPerceiver(portable_spec), params, sets, data.tokenizer)
  features = {name: np.asarray(predictor.target_set(name)) for name in sets}
  for e in exported:
    # Pairs have no answers, and single words have no names.
    if num_examples and e.task.target_set and (e.task.type.readout == 'queries' or sets[e.task.target_set][1].names):
      examples[e.task.name] = _inputs(e.task, plan, data, num_examples)
      answers[e.task.name] = _answers(predictor, data.tokenizer, e, sets, examples[e.task.name])
  if routers.routes_tokens(spec.router):
    exported_spec, exported_params = portable_spec, jax.device_get(params)  # whose devices `orbax` would name
  else:
    conditions = tuple(dict.fromkeys(c for e in exported for c in e.conditions))
    exported_spec, exported_params = merged(portable_spec, params, conditions)
  evaluators = tuple(e for e in plan.evaluations if e.task in chosen)
  conditions = (*(c for e in exported for c in e.conditions), *(s.condition for s, _ in sets.values()))
  return Contents(
      exported_spec, exported_params, exported, sets, features, data, examples, answers, trained=spec,
      evaluators=evaluators, mixtures=_mixtures(spec, params, tuple(dict.fromkeys(conditions))))


def portable(spec: ModelSpec, dtype: Any) -> ModelSpec:
  """Returns the spec for inference on any platform, without kernels that are written for one of them."""
  return dataclasses.replace(spec, dtype=jnp.dtype(dtype), remat=False, gmm=gmm.PORTABLE, attention_impl='xla')


def _mixtures(spec: ModelSpec, params: Any, conditions: tuple[Condition, ...]) -> Mixtures:
  """See `Contents.mixtures`."""
  if spec.router == routers.DENSE or routers.routes_tokens(spec.router):
    return {}
  inputs = routers.distinct_inputs(spec.router, conditions)
  index = {c: inputs.index(routers.router_input(spec.router, c)) for c in conditions}
  coefficients = merging.coefficients(spec, params, inputs)
  return {c: {layer: {s: coef[i] for s, coef in sublayers.items()} for layer, sublayers in coefficients.items()}
          for c, i in index.items()}


def _exported_task(task: TaskSpec, plan: Plan, data: Data, sets: Sets, bake_targets: bool) -> ExportedTask:
  text_condition, set_size = None, 0
  if task.type.target == 'pair':
    text_condition = task.type.pair_condition
  else:
    spec, target = sets[task.target_set]
    set_size = target.size
    # Vocabulary entries are encoded already; entries with learned tokens are not texts alone.
    if not (bake_targets or spec.is_vocabulary or spec.label_prompts):
      text_condition = spec.condition
  media, num_frames = 'text', 0
  if task.type.visual:
    num_frames = _inputs(task, plan, data, 1)['pixels'].shape[1]  # first: its error names a source without any
    media = data.records(task.source, _split(task, plan)).media_type
  search = next(((e.beam_size, e.length_penalty) for e in plan.evaluations if e.task == task and e.type == 'caption'),
                (1, 0.0))
  return ExportedTask(task, num_frames, set_size, text_condition, *search, media)


def _split(task: TaskSpec, plan: Plan) -> str:
  """The evaluation split, or the training split without an evaluator."""
  return next((e.split for e in plan.evaluations if e.task == task), task.split)


def _inputs(task: TaskSpec, plan: Plan, data: Data, num_examples: int) -> dict[str, np.ndarray]:
  """Input fields of the first examples of a `_split`."""
  examples = data.examples(task, _split(task, plan))
  num_examples = min(num_examples, examples.size)
  fields, _ = next(evaluation_batches(examples, np.arange(num_examples), num_examples))
  names = ('pixels',) if task.type.two_stream else INPUTS
  return {name: fields[name] for name in names if name in fields and name != 'id'}


def _answers(predictor: Predictor, tokenizer: Tokenizer, exported: ExportedTask, sets: Sets,
             fields: dict[str, np.ndarray]) -> list[str]:
  """Captions or the most likely entries as strings."""
  task = exported.task
  if task.type.readout == 'queries':
    captions = predictor.captions(task, fields['pixels'], exported.beam_size, exported.length_penalty)
    return [tokenizer.detokenize(caption) for caption in captions]
  ids = {'id': np.zeros(len(next(iter(fields.values()))), np.uint32)}
  best = predictor.log_probabilities(predictor.inputs(task.type, {**fields, **ids}), task)[:, 0].argmax(-1)
  return [sets[task.target_set][1].names[i] for i in best]
