"""Which experts are used by what: as coefficients that sum to 1 over experts, per layer, router and row.

A row is what has coefficients of its own. For routers that merge it is a condition row, whose coefficients follow from the
parameters. For routers that look at tokens it is a kind of token of one task (its picture, its words, its queries), or a
target set, and its coefficients are the mean of its tokens' gates. A task uses some rows (`spans`), and what it takes of an
expert is the mean of what they take: every one counts the same, however many tokens it has, so that routers compare.

Axis letters here: L layers with experts, R routers (attention, FFN), A rows, T tasks, E experts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from uni_moe_jax.config.plan import SetSpec, TaskSpec
from uni_moe_jax.model import batching, router_outputs
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe import routers
from uni_moe_jax.tasks.attributes import Condition

INPUT, PAIR, SET = 'input', 'pair', 'set'  # what a sequence of a step is, as the step names it
PAIRED_TEXT = 'paired text'
_HALVES = ('words', 'queries')


@dataclasses.dataclass(frozen=True)
class Span:
  """Tokens of a task that are looked at together.

  Attributes:
    name: 'visual', 'text', 'words', 'queries', `PAIRED_TEXT`, or 'set' and the name of the target set.
    side: INPUT, PAIR or SET.
    array: index in the sequence.
    half: of a two-stream array: 0 its words, 1 its queries; None: all of an array.
    condition: of the array.
  """
  name: str
  side: str
  array: int
  half: int | None
  condition: Condition


@dataclasses.dataclass(frozen=True)
class Piece:
  """Tokens of one array of one encoded sequence that count for a row.

  Attributes:
    row: index among A.
    stream, array: which sequence, which of its arrays. half: as in `Span`.
    examples: (first, last + 1) of a shard's examples; None: all of them.
  """
  row: int
  stream: int
  array: int
  half: int | None = None
  examples: tuple[int, int] | None = None


@flax.struct.dataclass
class Sums:
  """Over the unpadded tokens of every row.

  Attributes:
    tokens: f32 [A], how many. gates: f32 [L, R, A, E]. entropy: f32 [L, R, A], of each token's own gates, in nats.
  """
  tokens: jax.Array
  gates: jax.Array
  entropy: jax.Array


def spans(task: TaskSpec, sets: Mapping[str, SetSpec]) -> tuple[Span, ...]:
  """What a task's tokens are: each array of its input, words and queries apart, then its targets."""
  found = []
  for i, (segment, condition) in enumerate(zip(task.type.inputs, task.type.conditions, strict=True)):
    if segment.mask == 'two_stream':
      found += [Span(name, INPUT, i, half, condition) for half, name in enumerate(_HALVES)]
    else:
      found.append(Span(segment.modality, INPUT, i, None, condition))
  if task.type.target == 'pair':
    return (*found, Span(PAIRED_TEXT, PAIR, 0, None, task.type.pair_condition))
  return (*found, Span(f'set {task.target_set}', SET, 0, None, sets[task.target_set].condition))


def by_token(spec: ModelSpec) -> bool:
  """Whether use can only be measured on batches; else it follows from the parameters."""
  return routers.routes_tokens(spec.router)


def layers(spec: ModelSpec) -> tuple[int, ...]:
  """Indices of the layers that have experts."""
  return tuple(i for i, parts in enumerate(spec.pattern) if parts)


def rows_of_conditions(
    spec: ModelSpec, conditions: Sequence[Condition], tasks: Sequence[TaskSpec], sets: Mapping[str, SetSpec]) -> tuple[
        tuple[routers.RouterInput, ...], dict[str, dict[str, int]]]:
  """(rows of a router that merges, {task: {span: its row}}).

  Args:
    conditions: whose rows are wanted, those of the tasks among them.
  """
  rows = routers.distinct_inputs(spec.router, tuple(conditions))
  place = lambda condition: rows.index(routers.router_input(spec.router, condition))
  return rows, {t.name: {s.name: place(s.condition) for s in spans(t, sets)} for t in tasks}


def rows_of_tokens(
    tasks: Sequence[TaskSpec], sets: Mapping[str, SetSpec]) -> tuple[tuple[str, ...], dict[str, dict[str, int]]]:
  """(names of rows, {task: {span: its row}}) for routers that look at tokens; tasks of one target set share its row."""
  keys = {t.name: {s.name: (s.name,) if s.side == SET else (t.name, s.name) for s in spans(t, sets)} for t in tasks}
  rows = tuple(dict.fromkeys(key for found in keys.values() for key in found.values()))
  places = {task: {span: rows.index(key) for span, key in found.items()} for task, found in keys.items()}
  return tuple(' '.join(key) for key in rows), places


def pieces(
    tasks: Sequence[TaskSpec], sets: Mapping[str, SetSpec], of_task: Mapping[str, Mapping[str, int]],
    sequences: Sequence[tuple[str, str]], place: Callable[[TaskSpec], tuple[int, int]]) -> tuple[Piece, ...]:
  """The tokens of every row of `rows_of_tokens`, each once.

  Args:
    of_task: {task: {span: its row}}.
    sequences: what a step encodes: (INPUT | PAIR, group) or (SET, name); a set may be several.
    place: a task → (first, last + 1) of its examples in its group, in every shard.
  """
  found = []
  for t in tasks:
    for s in spans(t, sets):
      key, examples = ((SET, t.target_set), None) if s.side == SET else ((s.side, t.group), place(t))
      row = of_task[t.name][s.name]
      found += [Piece(row, i, s.array, s.half, examples) for i, name in enumerate(sequences) if name == key]
  return tuple(dict.fromkeys(found))


def coefficients(spec: ModelSpec, params: Any, rows: Sequence[routers.RouterInput]) -> np.ndarray:
  """f32 [L, R, A, E] of routers that merge, without noise."""
  found = router_outputs.coefficients(spec, params, tuple(rows))
  return np.array([list(parts.values()) for parts in found.values()], np.float32)


def gate_sums(spec: ModelSpec, collected: Any, pieces: Sequence[Piece], rows: int, shards: int) -> Sums:
  """Adds up the gates of routers that look at tokens.

  Args:
    collected: see `Encoder`, with taps and all rows.
    pieces: may be several for a row. rows: A.
    shards: into how many parts batches are laid out.
  """
  streams = collected['sequences']

  def tokens(x, piece):
    """The piece's part of [B, S, …]."""
    if piece.examples is not None:
      x = batching.task_rows(x, *piece.examples, shards)
    if piece.half is not None:
      n = x.shape[1] // 2
      x = x[:, piece.half * n:(piece.half + 1) * n]
    return x

  def weight(piece):
    stream = streams[piece.stream]
    valid = stream.valid[piece.array]
    whole = jnp.ones(stream.arrays[piece.array].shape[:2]) if valid is None else valid.astype(jnp.float32)
    return tokens(whole, piece)

  def of_router(choices):
    """(gates [A, E], entropy [A]) of one router; choices: (gates, experts) [B, S, K] per piece."""
    gates, entropy = jnp.zeros((rows, spec.num_experts)), jnp.zeros((rows,))
    for piece, choice in zip(pieces, choices, strict=True):
      kept, expert = (tokens(x, piece) for x in choice)
      w = weight(piece)
      one_hot = jax.nn.one_hot(expert, spec.num_experts)
      gates = gates.at[piece.row].add(jnp.einsum('bs,bsk,bske->e', w, kept, one_hot))
      entropy = entropy.at[piece.row].add((w * routers.entropy(kept)).sum())
    return gates, entropy

  found = {}  # (subtree, block, part) → sums with an axis of periods: a program of few parts, however many layers there are
  for subtree in ('blocks', 'tail'):
    for j, out in enumerate(collected[subtree]):
      for part in out['router_stats']:
        choices = [out['token_routing'][piece.stream][part][piece.array] for piece in pieces]
        choices = [(c.gates, c.expert) for c in choices]
        if subtree == 'tail':
          choices = jax.tree.map(lambda x: x[None], choices)
        found[subtree, f'block{j}', part] = jax.lax.map(of_router, choices)

  def at(layer, part, which):
    subtree, period, block = spec.stack.locate(layer)
    return found[subtree, block, part][which][period or 0]

  gates, entropy = (jnp.stack([jnp.stack([at(layer, part, i) for part in spec.sublayers]) for layer in layers(spec)])
                    for i in (0, 1))
  count = jnp.zeros((rows,))
  for piece in pieces:
    count = count.at[piece.row].add(weight(piece).sum())
  return Sums(count, gates, entropy)


def of_tasks(shares: np.ndarray, tasks: Sequence[Sequence[int]]) -> np.ndarray:
  """[L, R, A, E] → [L, R, T, E]: the mean over each task's rows; a row that is named twice counts twice."""
  return np.stack([shares[:, :, list(rows)].mean(2) for rows in tasks], axis=2)


def record(
    facts: Mapping[str, Any], spec: ModelSpec, rows: Sequence[str], tasks: Mapping[str, Mapping[str, int]],
    shares: np.ndarray, tokens: np.ndarray | None = None, gate_entropy: np.ndarray | None = None) -> dict[str, Any]:
  """What experts.json holds.

  Args:
    facts: about the measurement, kept as they are.
    rows: A names. tasks: {task: {span: its row}}.
    shares: [L, R, A, E], summing to 1 over experts.
    tokens: [A], how many were looked at. gate_entropy: [L, R, A], mean over a row's tokens, in nats. None where a row is one
      decision.

  Returns:
    {**facts, 'router', 'experts' (E), 'top_k', 'layers' (indices), 'routers' (names), 'rows', 'tokens', 'tasks',
    'coefficients' [L, R, A, E], 'gate_entropy' [L, R, A] (nats, at most ln K), 'entropy' [L, R, A] (of the coefficients,
    nats, at most ln E), 'effective_experts' [L, R, A] (its exponential), 'task_overlap' [L, R, T, T] in the order of 'tasks',
    'mean_task_overlap' [T, T] (over layers and routers)}.
  """
  entropy = np.asarray(routers.entropy(shares))
  gate_entropy = entropy if gate_entropy is None else gate_entropy
  between = np.asarray(routers.overlap(of_tasks(shares, [tuple(found.values()) for found in tasks.values()])))
  plain = lambda x: np.round(np.asarray(x, np.float64), 6).tolist()
  return {
      **facts, 'router': spec.router, 'experts': spec.num_experts, 'top_k': spec.top_k, 'layers': list(layers(spec)),
      'routers': list(spec.sublayers), 'rows': list(rows), 'tokens': None if tokens is None else [int(n) for n in tokens],
      'tasks': {task: dict(found) for task, found in tasks.items()}, 'coefficients': plain(shares),
      'gate_entropy': plain(gate_entropy), 'entropy': plain(entropy), 'effective_experts': plain(routers.effective_experts(shares)),
      'task_overlap': plain(between), 'mean_task_overlap': plain(between.mean((0, 1)))}
