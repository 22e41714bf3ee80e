"""Expert usage: coefficients that sum to 1 over experts, per layer, router and condition.

A condition is what has coefficients of its own. For routers that merge experts it is a distinct router input; its
coefficients follow from the parameters. For routers by token it is a group of tokens of one task (its image, its
words, its queries) or a target set; its coefficients are the mean gates of its tokens. A task has several conditions
(`token_spans`) and uses an expert as much as they do on average. Every condition has the same weight, however many
tokens it has, so that routers can be compared.

Axis letters: L layers with experts, R routers of a layer (attention, mlp), A conditions, T tasks, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.config.plan import SetSpec, TaskSpec
from uni_moe_jax.model import merging
from uni_moe_jax.model.sequences import take_rows
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe import routers
from uni_moe_jax.moe.precision import EXACT
from uni_moe_jax.tasks.attributes import Condition

INPUT, PAIR, SET = 'inputs', 'pairs', 'target_sets'  # roles of the sequences of a step: fields of `StepInputs`
PAIRED_TEXT = 'paired text'
_HALVES = ('words', 'queries')

Conditions = dict[str, dict[str, int]]  # task → span → index of its condition


class Span(NamedTuple):
  """Tokens of a task that have one condition."""
  name: str  # 'visual', 'text', 'words', 'queries', `PAIRED_TEXT`, or 'set' and the name of the target set
  role: str  # INPUT, PAIR or SET
  array: int  # index in the sequence
  half: int | None  # of a two-stream array: 0 its words, 1 its queries; None: the full array
  condition: Condition


class TokenSlice(NamedTuple):
  """Tokens of one array of one encoded sequence that count for a condition."""
  condition: int  # index among A
  sequence: int
  array: int
  half: int | None = None  # as in `Span`
  examples: tuple[int, int] | None = None  # (first, last + 1) in a shard; None: all of them


class GateSums(NamedTuple):
  """Sums over the unpadded tokens of every condition."""
  tokens: jax.Array  # f32 [A], their number
  gates: jax.Array  # f32 [L, R, A, E]
  entropy: jax.Array  # f32 [L, R, A], of the gates of each token, in nats


def token_spans(task: TaskSpec, sets: Mapping[str, SetSpec]) -> tuple[Span, ...]:
  """The spans of a task: each array of its input, words and queries separately, then its targets."""
  spans = []
  for i, (segment, condition) in enumerate(zip(task.type.inputs, task.type.conditions, strict=True)):
    if segment.mask == 'two_stream':
      spans += [Span(name, INPUT, i, half, condition) for half, name in enumerate(_HALVES)]
    else:
      spans.append(Span(segment.modality, INPUT, i, None, condition))
  if task.type.target == 'pair':
    return (*spans, Span(PAIRED_TEXT, PAIR, 0, None, task.type.pair_condition))
  return (*spans, Span(f'set {task.target_set}', SET, 0, None, sets[task.target_set].condition))


def expert_layers(spec: ModelSpec) -> tuple[int, ...]:
  """Indices of the layers that have experts."""
  return tuple(i for i, sublayers in enumerate(spec.pattern) if sublayers)


def merging_conditions(
    spec: ModelSpec, conditions: Sequence[Condition], tasks: Sequence[TaskSpec], sets: Mapping[str, SetSpec]
) -> tuple[tuple[routers.RouterInput, ...], Conditions]:
  """(the distinct inputs of a merging router, which of them each span of a task has). conditions: all routed ones."""
  inputs = routers.distinct_inputs(spec.router, tuple(conditions))
  index = {condition: inputs.index(routers.router_input(spec.router, condition)) for condition in conditions}
  return inputs, {t.name: {s.name: index[s.condition] for s in token_spans(t, sets)} for t in tasks}


def token_conditions(tasks: Sequence[TaskSpec], sets: Mapping[str, SetSpec]) -> tuple[tuple[str, ...], Conditions]:
  """(names of conditions, which of them each span of a task has) for routers by token."""
  # Tasks share the condition of a target set.
  keys = {t.name: {s.name: (s.name,) if s.role == SET else (t.name, s.name) for s in token_spans(t, sets)}
          for t in tasks}
  distinct = tuple(dict.fromkeys(key for by_span in keys.values() for key in by_span.values()))
  by_task = {task: {span: distinct.index(key) for span, key in by_span.items()} for task, by_span in keys.items()}
  return tuple(' '.join(key) for key in distinct), by_task


def token_slices(
    tasks: Sequence[TaskSpec], sets: Mapping[str, SetSpec], conditions: Mapping[str, Mapping[str, int]],
    sequences: Sequence[tuple[str, str]], task_slices: Mapping[str, slice]) -> tuple[TokenSlice, ...]:
  """The tokens of every condition of `token_conditions`, each once.

  sequences: that a step encodes: (INPUT | PAIR, group) or (SET, name); a set may have several. task_slices: task → its
  examples in its group, in every shard.
  """
  slices = []
  for t in tasks:
    for s in token_spans(t, sets):
      key, examples = (SET, t.target_set), None
      if s.role != SET:
        key, examples = (s.role, t.group), (task_slices[t.name].start, task_slices[t.name].stop)
      condition = conditions[t.name][s.name]
      slices += [TokenSlice(condition, i, s.array, s.half, examples) for i, name in enumerate(sequences) if name == key]
  return tuple(dict.fromkeys(slices))


def coefficients(spec: ModelSpec, params: Any, inputs: Sequence[routers.RouterInput]) -> np.ndarray:
  """f32 [L, R, A, E] of routers that merge, without noise."""
  by_layer = merging.coefficients(spec, params, tuple(inputs))
  return np.array([list(by_sublayer.values()) for by_sublayer in by_layer.values()], np.float32)


def gate_sums(
    spec: ModelSpec, collected: Any, slices: Sequence[TokenSlice], num_conditions: int, shards: int) -> GateSums:
  """Sums the gates of routers by token. collected: see `Encoder`, with taps and all rows. shards: of the batch."""
  def select(x, s):
    """The tokens of a slice in [B, S, …]."""
    if s.examples is not None:
      x = take_rows(x, slice(*s.examples), shards)
    return x if s.half is None else jnp.split(x, 2, axis=1)[s.half]

  sequences, weights = collected['sequences'], []
  for s in slices:
    segment, valid = (getattr(sequences[s.sequence], field)[s.array] for field in ('segments', 'valid'))
    weights.append(select(jnp.ones(segment.shape[:2]) if valid is None else valid.astype(jnp.float32), s))
  condition = jnp.array([s.condition for s in slices])

  def by_condition(values):
    values = jnp.stack(values)
    return jnp.zeros((num_conditions, *values.shape[1:])).at[condition].add(values)

  def router_sums(routings):
    """(gates [A, E], entropy [A]) of one router; routings: `RouterOutput` [B, S, …] per slice."""
    routings = [jax.tree.map(lambda x, s=s: select(x, s), routing) for s, routing in zip(slices, routings, strict=True)]
    gates = [jnp.einsum('bs,bse->e', w, routing.coef, precision=EXACT) for w, routing in zip(weights, routings)]
    return by_condition(gates), by_condition([(w * routing.entropy).sum() for w, routing in zip(weights, routings)])

  sums = {}  # (subtree, block, sublayer) → sums with an axis of periods: the program does not grow with the layers
  for subtree in ('blocks', 'tail'):
    for j, out in enumerate(collected[subtree]):
      for sublayer in out['router_stats']:
        routings = [out['token_routing'][sublayer][s.sequence][s.array] for s in slices]
        if subtree == 'tail':
          routings = jax.tree.map(lambda x: x[None], routings)
        sums[subtree, f'block{j}', sublayer] = jax.lax.map(router_sums, routings)

  def layer_sums(layer, sublayer, i):
    subtree, period, block = spec.stack.locate(layer)
    return sums[subtree, block, sublayer][i][period or 0]

  gates, entropy = (jnp.stack([jnp.stack([layer_sums(layer, sublayer, i) for sublayer in spec.sublayers])
                               for layer in expert_layers(spec)]) for i in (0, 1))
  return GateSums(by_condition([w.sum() for w in weights]), gates, entropy)


def task_shares(shares: np.ndarray, tasks: Sequence[Sequence[int]]) -> np.ndarray:
  """[L, R, A, E] → [L, R, T, E]: the mean over each task's conditions; a repeated one counts twice."""
  return np.stack([shares[:, :, list(conditions)].mean(2) for conditions in tasks], axis=2)


def to_json(
    facts: Mapping[str, Any], spec: ModelSpec, conditions: Sequence[str], tasks: Mapping[str, Mapping[str, int]],
    shares: np.ndarray, tokens: np.ndarray | None = None, router_entropy: np.ndarray | None = None) -> dict[str, Any]:
  """Content of experts.json: facts about the measurement, and for shares [L, R, A, E] that sum to 1 over experts:

  'router', 'num_experts' (E), 'top_k', 'layers' (indices), 'sublayers' (names of the R routers), 'conditions' (A
  names), 'tokens' [A] (None if a condition is one decision), 'tasks' (index of the condition by task and span),
  'coefficients' [L, R, A, E], 'router_entropy' [L, R, A] (of single decisions, nats, at most ln K), 'entropy' [L, R, A]
  (of the coefficients, nats, at most ln E), 'effective_experts' [L, R, A] (its exponential), 'task_overlap'
  [L, R, T, T] in the order of 'tasks', 'mean_task_overlap' [T, T] (over layers and routers).
  """
  entropy = np.asarray(routers.entropy(shares))
  overlap = np.asarray(routers.overlap(task_shares(shares, [tuple(by_span.values()) for by_span in tasks.values()])))
  measured = {
      'coefficients': shares, 'router_entropy': entropy if router_entropy is None else router_entropy,
      'entropy': entropy, 'effective_experts': routers.effective_experts(shares), 'task_overlap': overlap,
      'mean_task_overlap': overlap.mean((0, 1))}
  return {
      **facts, 'router': spec.router, 'num_experts': spec.num_experts, 'top_k': spec.top_k,
      'layers': list(expert_layers(spec)), 'sublayers': list(spec.sublayers), 'conditions': list(conditions),
      'tokens': None if tokens is None else [int(n) for n in tokens],
      'tasks': {task: dict(by_span) for task, by_span in tasks.items()},
      **{key: np.round(np.asarray(x, np.float64), 6).tolist() for key, x in measured.items()}}
