"""Forward passes of the published system: features, logits, hidden states and gates."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import small_model
from tests.parity import fixtures
from tests.parity.fixtures import Arrays, assert_close
from tests.parity.problem import Problem, counted, input_and_target, problem
from uni_moe_jax.model import heads
from uni_moe_jax.moe import routers
from uni_moe_jax.train.forward import forward, step_inputs

BOUND = 1e-5
_PART = {'self_attn.qkv_proj': 'attention', 'linear1': 'mlp'}


@functools.partial(small_model.jit, static_argnums=0)
def _scored(spec, params, batch, sets):
  """(input features, target features, logits) of the step's one task."""
  task, = spec.plan.tasks
  features, targets = input_and_target(task, forward(spec, params, batch, sets, {}, jax.random.key(0))[0])
  scale = spec.model.apply({'params': params}, task.temperature, method='scale')
  logits = heads.logits(features, targets, scale)
  if task.linear_head:
    logits = spec.model.apply({'params': params}, features, logits, method='with_head')
  return features, targets, logits


@functools.partial(small_model.jit, static_argnums=0)
def _encoded(spec, params, batch, sets):
  """(features, what the encoder collected) with all rows and taps; sequences in published order."""
  def run(model):
    inputs = step_inputs(spec, batch, sets, {})
    in_order = (*inputs.inputs.values(), *inputs.pairs.values(), *(inputs.target_sets[s.name] for s in spec.plan.sets))
    encoded = model.encode(in_order, all_rows=True, taps=True)
    return [model.features(r) for r in jax.tree.leaves(encoded.hidden)], encoded.collected
  return spec.model.apply({'params': params}, method=run)


@pytest.mark.parametrize('name', fixtures.cases('forward'))
def test_forward(name):
  arrays = Arrays(name)
  case = problem(name, arrays)
  params = fixtures.params(fixtures.model_of(fixtures.entry(name)['weights']))
  features, targets, logits = map(np.asarray, _scored(case.spec, params, case.batch, case.sets))
  _compare_outputs(arrays, case, features, targets, logits)
  taken, collected = jax.device_get(_encoded(case.spec, params, case.batch, case.whole_sets))
  assert_close(taken[0], features, BOUND, 'features with all rows')  # both modes agree
  assert_close(taken[1][:, 0], targets, BOUND, 'target features with all rows')
  _compare_hidden(arrays, case, collected)
  assert not arrays.unread, sorted(arrays.unread)


def _compare_outputs(arrays: Arrays, case: Problem, features, targets, logits) -> None:
  left, scores = counted(case, features), counted(case, logits)
  for key, ours in (('feat0', left), ('feat1', targets)):
    assert key in arrays
    _compare(arrays, key, ours)
  ours = {'out.logits0': scores, 'out.output': scores, 'out.input_feats': np.asarray(heads.normalize(left)),
          'out.tgt_feats': np.asarray(heads.normalize(targets))}
  if case.task.type.target == 'pair':
    ours['out.logits1'] = ours['out.logits0'].T
  for key in arrays.keys('out.'):
    if key.startswith('out.targets'):
      np.testing.assert_array_equal(arrays[key], _target_indices(case), key)
    else:
      assert_close(ours[key], arrays[key], BOUND, key)


def _target_indices(case: Problem) -> np.ndarray:
  batch = case.batch[case.task.group]
  if case.task.type.target == 'pair':
    return np.arange(len(batch['id'][0]))
  return batch['label'][0][batch['weight'][0] > 0]


def _compare_hidden(arrays: Arrays, case: Problem, collected) -> None:
  stack, calls = case.spec.model.spec.stack, {'video_embed': 0, 'token_embed': 0}

  def after(layer: int, what: str):
    subtree, period, block = stack.locate(layer)
    out = collected[subtree][int(block.removeprefix('block'))][what]
    return out if period is None else jax.tree.map(lambda x: x[period], out)

  conditions = tuple(c for s in collected['sequences'] for c in s.layout.conditions)
  rows = routers.distinct_inputs(case.spec.model.spec.router, conditions)
  for n, sequence in enumerate(collected['sequences']):
    # A token's own embedder comes first, then the prefix.
    parts = [np.asarray(a) for a in sequence.segments]
    tokens = [parts[0][:, 1:], *parts[1:]]
    for modality, part in (*zip(sequence.layout.modalities, tokens), ('text', parts[0][:1, :1])):
      embedder = 'video_embed' if modality == 'visual' else 'token_embed'
      key = f'tokenizer.{embedder}.call{calls[embedder]}'
      calls[embedder] += 1
      _compare(arrays, key, part)
    invalid = [np.zeros(a.shape[:2], np.uint8) if v is None else (~v).astype(np.uint8)
               for a, v in zip(parts, sequence.valid)]
    _compare(arrays, f'enc{n}.fused_in', np.concatenate(parts, 1))
    _compare(arrays, f'enc{n}.fused_invalid_mask', np.concatenate(invalid, 1))
    for layer in range(stack.num_layers):
      hidden = np.concatenate([np.asarray(a) for a in after(layer, 'taps')[n]], 1)
      _compare(arrays, f'enc{n}.hidden{layer}', hidden)
      for projection, part in _PART.items():
        at = f'enc{n}.gate.L{layer}.{projection}.'
        if at + 'logits' in arrays:
          decision = after(layer, 'router_stats')[part]
          index = [rows.index(routers.router_input(case.spec.model.spec.router, c)) for c in sequence.layout.conditions]
          assert_close(decision.logits[index], arrays[at + 'logits'], BOUND, at)
          np.testing.assert_array_equal(decision.expert[index], arrays[at + 'top2'])
          weight = np.take_along_axis(np.asarray(decision.coef)[index], decision.expert[index], axis=1)
          assert_close(weight, arrays[at + 'weight'], BOUND, at)
    _compare(arrays, f'enc{n}.spe_out_all', np.asarray(after(stack.num_layers - 1, 'taps')[n][0][:, 0]))


def _compare(arrays: Arrays, key: str, ours: np.ndarray) -> None:
  """The first rows of the batch, as many as were kept."""
  if key in arrays:
    theirs = arrays[key]
    assert_close(ours[:len(theirs)], theirs, BOUND, key)
