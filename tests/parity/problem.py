"""Training problems of the published system: tasks, target sets and batches."""

import dataclasses
from typing import Any

import numpy as np

from tests.parity import fixtures
from tests.parity.fixtures import Arrays
from uni_moe_jax.config.plan import VOCABULARY, Plan, SetSpec, TaskSpec
from uni_moe_jax.data.batches.target_sets import bucket_by_length
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tasks import task_types
from uni_moe_jax.train.forward import StepSpec

_SMOOTHED = {'label_smoothing_cross_entropy'}
_LOSSES = _SMOOTHED | {'cross_entropy', 'soft_target_cross_entropy'}


@dataclasses.dataclass(frozen=True)
class Problem:
  """One training problem.

  Attributes:
    task, batch, sets: arguments of `train_step`.
    whole_sets: the same sets with one bucket each, padded as published.
  """
  spec: StepSpec
  task: TaskSpec
  batch: dict[str, Any]
  sets: dict[str, Any]
  whole_sets: dict[str, Any]


def input_and_target(task: TaskSpec, features) -> tuple[Any, Any]:
  """The features of a task's inputs and of its targets, among those of a forward pass."""
  pair = task.type.target == 'pair'
  return features.inputs[task.group], features.pairs[task.group] if pair else features.target_sets[task.target_set]


def counted(case: Problem, rows: np.ndarray) -> np.ndarray:
  """Rows of the readout that have a target, in row-major order."""
  if case.task.type.readout not in ('masked', 'queries'):
    return rows[:, 0]
  weight = case.batch[case.task.group]['weight'][0]
  if case.task.type.readout == 'masked':  # masked words are in the order of the text
    assert (np.diff(case.batch[case.task.group]['position'][0], axis=1)[weight[:, 1:] > 0] > 0).all()
  return rows[weight > 0]


def task_spec(name: str) -> TaskSpec:
  """A task from the manifest's table."""
  t = fixtures.manifest()['tasks'][name]
  assert t['loss'] in _LOSSES, t['loss']
  task_type = task_types.TASK_TYPES[t['task_type']]
  smoothing = t['smoothing'] if t['loss'] in _SMOOTHED else 0.0
  return TaskSpec(
      name=name, type=task_type, group=task_type.name, source='', batch_size=0, loss_weight=t['loss_weight'],
      sampling_weight=1.0, temperature=t['temperature'].removeprefix('logit_scale_'), target_set=t['target_set'] or '',
      label_smoothing=smoothing)


def _text(arrays: Arrays, prefix: str) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, which of them are valid)."""
  tokens, invalid = arrays[f'{prefix}data'].astype(np.int32), arrays.get(f'{prefix}invalid_mask')
  return tokens, np.ones(tokens.shape, bool) if invalid is None else invalid == 0


def target_sets(model: str, arrays: Arrays) -> tuple[tuple[SetSpec, ...], dict[str, Any], dict[str, Any]]:
  """(specs, bucketed arrays, unbucketed arrays) of the sets in a file, in its order."""
  specs, bucketed, full = [], {}, {}
  for key in [k for k in arrays.keys('in.set.') if k.endswith('.data')]:
    name = key.split('.')[2]
    data, valid = _text(arrays, f'in.set.{name}.')
    families = {task_types.TASK_TYPES[t['task_type']].target
                for t in fixtures.manifest()['tasks'].values() if t['target_set'] == name}
    attributes = arrays.get(f'in.set.{name}.moe_embedding')
    if len(families) != 1 and attributes is not None:  # a set that no task of the table names, or tasks of two families
      families = {f for f, c in task_types.families().items() if np.array_equal(attributes[0], c.bits)}
    condition = task_types.families()[min(families, default='names')]
    _check_attributes(attributes, [condition])
    words = np.arange(fixtures.sizes(model)['vocab'], dtype=np.int32)
    everything = np.stack([words, np.full_like(words, fixtures.end_of_text(model))], axis=1)
    is_vocabulary = np.array_equal(data, everything) and valid.all()
    values = VOCABULARY if is_vocabulary else tuple(map(str, range(len(data))))
    specs.append(SetSpec(name=name, entries=values, family=condition.task, condition=condition, max_len=data.shape[1]))
    rows = np.arange(len(data), dtype=np.int32)
    bucketed[name] = full[name] = {'buckets': (), 'order': rows}
    if not is_vocabulary:
      buckets, order = bucket_by_length([[row[ok].tolist()] for row, ok in zip(data, valid)], 0)
      bucketed[name] = {'buckets': buckets, 'order': order}
      full[name] = {'buckets': ({'text': data, 'valid': valid},), 'order': rows}
  return tuple(specs), bucketed, full


def fields(task: TaskSpec, arrays: Arrays, prefix: str, temporal_offset: int) -> dict[str, np.ndarray]:
  """Batch fields of one task, [shards = 1, B, …]."""
  out: dict[str, np.ndarray] = {}
  for index, segment in enumerate(task.type.inputs):
    name, = {k.split('.')[-2] for k in arrays.keys(f'{prefix}in.input{index}.') if k.endswith('.data')}
    at = f'{prefix}in.input{index}.{name}.'
    data = arrays[at + 'data']
    assert name in {'visual': ('image', 'video'), 'text': ('text',)}[segment.modality], name
    conditions = task.type.conditions
    attributes = arrays.get(at + 'moe_embedding')
    own = attributes is not None and len(attributes) == 1  # of this segment, not of all
    _check_attributes(attributes, conditions[index:index + 1] if own else conditions)
    if segment.modality == 'visual':
      frames = data if name == 'video' else data[:, None]  # [B, T, C, H, W]
      out['pixels'] = frames.transpose(0, 1, 3, 4, 2)
      out['temporal_offset'] = np.int32(temporal_offset)
    else:
      out['text'], out['text_valid'] = _text(arrays, at)
      if at + 'spe_index' in arrays:
        out['position'] = arrays[at + 'spe_index'].astype(np.int32)[:, None]
  out['id'] = np.arange(len(next(iter(v for v in out.values() if v.ndim))), dtype=np.uint32)
  if task.type.target == 'pair':
    at = f'{prefix}in.target0.text.'
    out['target'], out['target_valid'] = _text(arrays, at)
    _check_attributes(arrays.get(at + 'moe_embedding'), [task.type.pair_condition])
    out |= {'text_id': np.zeros(len(out['id']), np.int32), 'weight': np.ones((len(out['id']), 1), np.float32)}
  else:
    out |= _labels(task, arrays[f'{prefix}in.target_idx0'])
  return {k: v if k == 'temporal_offset' else v[None] for k, v in out.items()}


def _labels(task: TaskSpec, target: np.ndarray) -> dict[str, np.ndarray]:
  """Class indices [B], soft targets [B, V] or word labels [B, S] (-1: none) as labels and weights."""
  if target.dtype.kind == 'f':
    return {'label': np.tile(np.arange(target.shape[1], dtype=np.int32), (len(target), 1)), 'weight': target}
  target = target[:, None] if target.ndim == 1 else target
  label, weight = np.maximum(target, 0).astype(np.int32), (target >= 0).astype(np.float32)
  if task.type.readout != 'masked':
    return {'label': label, 'weight': weight}
  most = int(weight.sum(1).max())
  order = np.argsort(-weight, axis=1, kind='stable')[:, :most]
  take = lambda x: np.take_along_axis(x, order, axis=1)
  return {'position': order.astype(np.int32), 'label': take(label), 'weight': take(weight)}


def _check_attributes(actual: np.ndarray | None, conditions) -> None:
  """The published attribute rows are those that our table computes."""
  if actual is not None:
    np.testing.assert_array_equal(actual, np.array([c.bits for c in conditions], np.float32))


def step_spec(name: str, tasks: tuple[TaskSpec, ...], sets: tuple[SetSpec, ...], **changes: Any) -> StepSpec:
  """Static arguments of the step, with the published choices."""
  plan = Plan(task_types=tuple(task_types.TASK_TYPES.values()), tasks=tasks, sets=sets, probes=(), probe_sets=(),
              evaluations=(), temperatures=fixtures.model_spec(name).temperature_groups, encode_all_sets=True)
  spec = StepSpec(model=UniPerceiver(fixtures.model_spec(name)), plan=plan, optimizer=None,
                  grad_accum_steps=1, ema_decay=0.0, eot=fixtures.end_of_text(name),
                  contrastive_reduction='sum', mask_duplicate_texts=False)
  return dataclasses.replace(spec, **changes)


def sized(task: TaskSpec, batch: dict[str, np.ndarray]) -> TaskSpec:
  """The task with the batch size of its fields."""
  return dataclasses.replace(task, batch_size=batch['id'].shape[1])


def problem(name: str, arrays: Arrays, **changes: Any) -> Problem:
  """A forward or loss case; `changes` of the model."""
  entry = fixtures.entry(name)
  model = fixtures.model_of(entry['weights'])
  task = task_spec(entry['task_name'])
  assert task.type.name == entry['task_type']
  specs, bucketed, full = target_sets(model, arrays)
  batch = fields(task, arrays, '', entry.get('temporal_pos_offset', 0))
  head = fixtures.model_spec(model).head
  task = dataclasses.replace(sized(task, batch), linear_head=bool(head))
  if task.type.readout == 'slot' and 'position' not in batch:  # without an index of its slot a text is read at token 0
    task = dataclasses.replace(task, type=dataclasses.replace(task.type, readout='cls'))
  # The prefix of the older code is an ordinary word; only the case's name shows it.
  changed = UniPerceiver(fixtures.model_spec(model, prefix_is_word='newspe' in name, **changes))
  spec = step_spec(model, (task,), specs, model=changed)
  return Problem(spec, task, {task.group: batch}, bucketed, full)
