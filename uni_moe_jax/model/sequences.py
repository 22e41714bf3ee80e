"""Streams: sequences as the encoder carries them, one array per segment, and how equal ones are joined.

A step encodes many sequences at once (several kinds, several target sets). Each is a stream: separate arrays with
their conditions and masks (static) and their padding, picked positions and example ids (arrays).
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from uni_moe_jax.model.attention import Part
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import TaskType

READ_NOTHING = 'nothing'  # prefill: only keys and values of the last layer are wanted


@dataclasses.dataclass(frozen=True)
class Layout:
  """Static structure of a sequence.

  Attributes:
    conditions: one per array.
    modalities: 'visual' or 'text' per array. The prefix is token 0 of array 0 unless `prefixed` is False.
    masks: mask kind per array (see `masks.py`).
    readout: 'cls' | 'masked' | 'queries' | 'slot' | 'nothing'.
    prefixed: False for a decoding pass, whose prefix is among the cached keys.
    prompted: the condition of deep prompts; None: that of the first segment.
    label_set: the target set whose entries the sequences are, where it has label prompts.
  """
  conditions: tuple[Condition, ...]
  masks: tuple[str, ...]
  readout: str
  prefixed: bool = True
  prompted: Condition | None = None
  label_set: str | None = None

  @classmethod
  def of_task_type(cls, kind: TaskType) -> 'Layout':
    """Input side of a task kind."""
    return cls(kind.conditions, tuple(s.mask for s in kind.inputs), kind.readout)

  @classmethod
  def of_text(cls, condition: Condition, label_set: str | None = None) -> 'Layout':
    """One text read at its prefix: the target side, target sets."""
    return cls((condition,), ('full',), 'cls', label_set=label_set)

  @property
  def prompt_condition(self) -> Condition:
    return self.prompted or self.conditions[0]

  @property
  def is_target(self) -> bool:
    """Whether the sequence is on the target side."""
    return self.conditions[0].is_target

  @property
  def modalities(self) -> tuple[str, ...]:
    return tuple(c.modality for c in self.conditions)

  @property
  def readout_segment(self) -> int | None:
    """Index of the array that holds the rows to read."""
    if self.readout == READ_NOTHING:
      return None
    if self.readout == 'cls':
      return 0
    if self.readout == 'queries':
      return next(i for i, m in enumerate(self.masks) if m != 'full')
    return self.modalities.index('text')


@flax.struct.dataclass
class EmbeddedSequence:
  """One batch of sequences inside the encoder.

  Attributes:
    arrays: [B, S, D] per segment.
    valid: bool [B, S] per segment, None where nothing is padded: which tokens may serve as keys.
    positions: int32 [B, M] token positions to read ('masked', 'slot'), else None.
    ids: uint32 [B] example ids: what stochastic depth is keyed by.
    layout: static.
  """
  arrays: tuple[jax.Array, ...]
  valid: tuple[jax.Array | None, ...]
  positions: jax.Array | None
  ids: jax.Array
  layout: Layout = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class KVCache:
  """Keys and values of earlier tokens, visible to every token of the stream.

  Per layer, in the tree that the encoder collects, ((k, v), …); with a leading axis of periods where it has one.

  Attributes:
    seen: [b, N, P, H], of what no word changes; each row serves B / b rows of the stream in a row.
    words: [B, N, room, H]. valid: bool [B, room], which of them are there.
    pools: what context routers pooled: {part: [B, D]}; {} without them.
  """
  seen: Any
  words: Any
  valid: jax.Array | None
  pools: Any

  def of_layer(self, subtree: str, block: int) -> 'KVCache':
    """Of one block of the pattern, without `valid`, which is that of all."""
    return KVCache(self.seen[subtree][block], self.words[subtree][block], None, self.pools[subtree][block])

  def parts(self, valid: jax.Array) -> list[Part]:
    """Of one layer: what attention looks at, apart."""
    return [(*self.seen, None), (*self.words, valid[:, None, None])]


def take_rows(x: jax.Array, readout: str, positions: jax.Array | None) -> jax.Array:
  """Rows of [B, S, D] that a readout wants: [B, R, D]."""
  if readout == 'cls':
    return x[:, :1]
  if readout == 'queries':
    return x[:, x.shape[1] // 2:]
  return jnp.take_along_axis(x, positions[:, :, None], axis=1)


def join_equal(streams: tuple[EmbeddedSequence, ...], keys: tuple[Any, ...], shards: int):
  """Joins streams whose key and shapes are equal along the batch, so that they share their products.

  The batch axis is [shards · b]: each shard's rows are joined to each other, never across shards, so that joining
  moves nothing between devices.

  Args:
    streams: to join.
    keys: one hashable per stream; streams join only where keys are equal (router rows, masks, readout).
    shards: into how many parts the batch axis is laid out.

  Returns:
    (joined streams, split): `split(results)` takes one [B_joined, …] pytree per joined stream and returns one
    [B, …] pytree per original stream, in the original order.
  """
  groups: dict[Any, list[int]] = {}
  for i, (s, key) in enumerate(zip(streams, keys)):
    shapes = tuple(a.shape[1:] for a in s.arrays)
    padded = tuple(v is not None for v in s.valid)
    picks = None if s.positions is None else s.positions.shape[1:]
    # The batch must divide: the last one of an evaluation, of pictures, stays alone.
    whole = s.ids.shape[0] % shards == 0
    groups.setdefault((key, shapes, padded, picks) if whole else i, []).append(i)

  def join(*leaves):
    if len(leaves) == 1:
      return leaves[0]
    parts = [x.reshape(shards, -1, *x.shape[1:]) for x in leaves]
    joined = jnp.concatenate(parts, axis=1)
    return joined.reshape(-1, *joined.shape[2:])

  joined = []
  for members in groups.values():
    first = streams[members[0]]
    aligned = [streams[i].replace(layout=first.layout) for i in members]
    joined.append(jax.tree.map(join, *aligned))

  def split(results):
    out = [None] * len(streams)
    for members, result in zip(groups.values(), results, strict=True):
      if len(members) == 1:
        out[members[0]] = result
        continue
      start = 0
      for i in members:
        per_shard = streams[i].ids.shape[0] // shards
        piece = slice(start, start + per_shard)
        out[i] = jax.tree.map(
            lambda x: x.reshape(shards, -1, *x.shape[1:])[:, piece].reshape(-1, *x.shape[1:]), result)
        start += per_shard
    return tuple(out)

  return tuple(joined), split
