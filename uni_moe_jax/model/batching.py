"""Batch fields to sequences, for the inputs of a group, paired texts and target sets.

Training, evaluation and export share these functions, so that all encode the same. Fields are those of a batch
([shards, b, …]) or of an evaluation batch ([B, …], shards = 1).
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from uni_moe_jax.model.sequences import Layout, flatten
from uni_moe_jax.model.uni_perceiver import Sequence
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.tasks.task_types import TaskType

Fields = dict[str, jax.Array]


def input_sequence(task_type: TaskType, fields: Fields) -> Sequence:
  """The input side of a batch; fields are flat ([B, …])."""
  return Sequence(
      layout=Layout.of_task_type(task_type), ids=fields['id'], pixels=fields.get('pixels'),
      temporal_offset=fields.get('temporal_offset', 0), text=fields.get('text'),
      text_valid=fields.get('text_valid'), positions=fields.get('position'))


def pair_sequence(task_type: TaskType, fields: Fields) -> Sequence:
  """The paired text of a batch, on the target side."""
  return Sequence(layout=Layout.of_text(task_type.pair_condition), ids=fields['id'], text=fields['target'],
                  text_valid=fields['target_valid'])


def _entry_ids(name: str, rows: jax.Array) -> jax.Array:
  """Example ids of the entries of a target set: the keys of stochastic depth."""
  return rows.astype(jnp.uint32) + jnp.uint32(zlib.crc32(name.encode()))


def set_sequences(
    name: str, condition: Condition, buckets: tuple[dict[str, jax.Array], ...], order: jax.Array,
    label_prompts: bool = False) -> tuple[Sequence, ...]:
  """One sequence per length bucket of a target set of texts.

  Args:
    name, condition: of the set. buckets: its texts. order: int32 [V], the row of each entry in the concatenated
      buckets.
    label_prompts: whether each entry has a learned token.
  """
  out, start = [], 0
  layout = Layout.of_text(condition, name if label_prompts else None)
  entry = jnp.argsort(order).astype(jnp.int32) if label_prompts else None  # of each row
  for b in buckets:
    n = b['text'].shape[0]
    out.append(Sequence(
        layout=layout, ids=_entry_ids(name, start + jnp.arange(n)), text=b['text'], text_valid=b['valid'],
        classes=entry[start:start + n] if label_prompts else None))
    start += n
  return tuple(out)


def vocabulary_sequence(name: str, condition: Condition, ids: jax.Array, eot: int) -> Sequence:
  """Rows [spe, v, eot] of a vocabulary set for the word ids [K]."""
  text = jnp.stack([ids, jnp.full_like(ids, eot)], axis=1)
  return Sequence(layout=Layout.of_text(condition), ids=_entry_ids(name, ids), text=text)


def flat_fields(fields: dict[str, Any], per_batch: tuple[str, ...] = ('temporal_offset',)) -> Fields:
  """Flattens the leading [shards, b] of every field, except those that a batch has once."""
  return {k: v if k in per_batch else flatten(v) for k, v in fields.items()}
