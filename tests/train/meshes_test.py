"""A step on any mesh is the step on one device: loss and gradients, noise on, for all routers."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

from tests.helpers import hlo, meshes
from tests.helpers.meshes import Case

FAST = {
    'attribute-mixed': (Case('attribute', ('shape', 'pair'), drop_path=0.2), 'mixed'),
    'task-replica': (Case('task', ('pair',), num_layers=1), 'replica'),
    'task-data': (Case('task', ('pair',), num_layers=1), 'data'),
    'modality-fsdp': (Case('modality', ('pair',), num_layers=1), 'fsdp'),
    'token-mixed': (Case('token', ('caption', 'pair'), num_layers=1, capacity_factor=meshes.NO_DROP_CAPACITY), 'mixed'),
    'token-fsdp': (Case('token', ('caption', 'pair'), num_layers=1, capacity_factor=meshes.NO_DROP_CAPACITY), 'fsdp'),
    'blocks-mixed': (Case('attribute', ('pair',), num_layers=1, negatives=4), 'mixed'),
    'context-expert': (Case('context', ('pair',), num_layers=1), 'expert'),
}
ROUTERS = ('attribute', 'task', 'modality', 'token', 'context')
# A step of every task takes minutes to compile where tokens are sent. One router has all tasks; every router has, on
# every mesh, a loss with negatives from all devices, and on one mesh causal words, too.
EVERY, CAUSAL, PAIR = ('shape', 'text', 'caption', 'pair'), ('caption', 'pair'), ('pair',)


def _full(router: str, tasks: tuple[str, ...] = CAUSAL, **changes) -> Case:
  capacity = meshes.NO_DROP_CAPACITY if router in ('token', 'context') else 0.0
  return Case(router, tasks, **{**dict(num_layers=3, remat=True, capacity_factor=capacity), **changes})


def _assert_equal(case: Case, mesh: str):
  expected, result = meshes.result(case, meshes.ONE), meshes.result(case, mesh)
  # No routing depends on a rounding error, and every leaf has a gradient to compare.
  assert 1e-5 < expected.margin < 10
  silent = {path for path, g in expected.gradients.items() if not g.any()}
  assert silent <= {'embed/temporal'}, silent
  assert abs(result.loss - expected.loss) <= 1e-5
  difference = meshes.differences(result, expected)
  assert max(difference.values()) <= 2e-5, sorted(difference.items(), key=lambda item: -item[1])[:5]


def _fast(*names: str):
  """Parameters of a test: one runs in the default suite."""
  return [pytest.param(*FAST[n], id=n, marks=[] if n == 'attribute-mixed' else pytest.mark.nightly) for n in names]


@pytest.mark.parametrize('case, mesh', _fast(*FAST))
def test_loss_and_gradients_equal_those_of_one_device(case, mesh):
  _assert_equal(case, mesh)


def _product():
  """Every router on every mesh; CI has time for FAST alone."""
  return itertools.product(ROUTERS, (name for name in meshes.MESHES if name != meshes.ONE))


@pytest.mark.nightly
@pytest.mark.parametrize('router, mesh', _product())
def test_every_router_on_every_mesh(router, mesh):
  _assert_equal(_full(router, EVERY if router == 'attribute' else CAUSAL if mesh == 'expert' else PAIR), mesh)


@pytest.mark.parametrize('case, mesh', [
    pytest.param(_full('token', capacity_factor=0.0), 'expert', marks=pytest.mark.nightly),
    pytest.param(_full('context', capacity_factor=0.0), 'mixed', marks=pytest.mark.nightly),
    pytest.param(_full('attribute', grad_accum_steps=2), 'mixed', marks=pytest.mark.nightly),
    pytest.param(_full('token', grad_accum_steps=2, capacity_factor=0.0), 'mixed', marks=pytest.mark.nightly),
], ids=['token-exact', 'context-exact', 'attribute-accum', 'token-accum'])
def test_exact_routing_and_accumulation(case, mesh):
  _assert_equal(case, mesh)


@pytest.mark.nightly
def test_bfloat16_is_as_close_to_float32_on_a_mesh_as_on_one_device():
  case = _full('attribute')
  half = dataclasses.replace(case, dtype='bfloat16')
  exact = meshes.result(case, meshes.ONE)
  for mesh in (meshes.ONE, 'mixed'):
    result = meshes.result(half, mesh)
    assert 1e-6 < abs(result.loss - exact.loss) < 0.05, mesh
    difference = meshes.differences(result, exact)
    assert sorted(difference.values())[len(difference) // 2] < 0.05, mesh


@pytest.mark.parametrize('case, mesh', _fast('attribute-mixed', 'token-mixed'))
def test_other_examples_or_noise_change_the_gradients(case, mesh):
  """The positive control: what is compared above does depend on the step's key and on every example."""
  compiled, (params, batch, sets, key) = meshes.compiled(case, mesh)
  expected = meshes.result(case, meshes.ONE)
  [(group, fields)] = [(g, f) for g, f in batch.items() if 'target' in f]
  less = {**fields, 'weight': fields['weight'].at[-1].set(0.5)}
  # The temperature of the other task does not depend on the last pair.
  other = {path for path in expected.gradients if path.startswith('log_scale') and 'retrieval' not in path}
  assert len(other) == 1
  for changed, same in (((params, batch, sets, key + 1), set()), ((params, {**batch, group: less}, sets, key), other)):
    result = meshes.evaluate(compiled, changed)
    assert abs(result.loss - expected.loss) > 1e-4
    assert {path for path, d in meshes.differences(result, expected).items() if d < 1e-4} == same


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_nonfinite_gradient_equals_nothing(value):
  sound = meshes.StepResult(1.0, {'a': np.ones(2), 'b': np.ones(2)}, math.inf)
  # Not the first leaf: max() would return a NaN there.
  broken = dataclasses.replace(sound, gradients={**sound.gradients, 'b': np.array([1.0, value])})
  for pair in ((broken, sound), (sound, broken), (broken, broken)):
    with pytest.raises(AssertionError, match="not finite: \\['b'\\]"):
      meshes.differences(*pair)
  assert meshes.differences(sound, sound) == {'a': 0, 'b': 0}


def _program(name: str = 'attribute-mixed') -> str:
  return meshes.compiled(*FAST[name])[0].as_text()


def test_merged_kernels_are_reduced_once_and_no_expert_is_sent():
  sent = hlo.collectives(_program())
  assert {s.opcode for s in sent} == {'all-reduce', 'all-gather'}
  # Of two conditions (images, texts on the target side); half of heads and hidden: qkv, attention out, FFN in, FFN out.
  kernels = [(2, 16, 3, 1, 8), (2, 1, 8, 16), (2, 16, 8), (2, 8, 16)]
  forward = [s.shape for s in sent if s.opcode == 'all-reduce' and 'transpose' not in s.op_name]
  assert [forward.count(shape) for shape in kernels] == [2, 2, 2, 2], forward  # two layers
  # The smallest kernel of all experts has 8 · 16 · 8 elements; features of the pairs, which are sent, 8 · 16.
  assert max(s.size for s in sent if s.opcode == 'all-gather') == 8 * 16


def _forward(name: str) -> list[hlo.CollectiveArray]:
  return [s for s in hlo.collectives(_program(name)) if 'transpose' not in s.op_name]


# Of the two below: one layer, which is the last, D = F = 16. Images have 5 tokens, texts of pairs 9. All are sent for
# keys and values, and those that are read for queries, after attention, and through the FFN.

@pytest.mark.nightly
def test_over_a_model_axis_half_of_the_expert_outputs_is_sent():
  """Four shards with two pairs each, two captions of 6 words and 6 queries, and [spe, word, end] of 8 sampled words.
  A capacity for all is C = T tokens at each of 8 experts, in buffers of a multiple of 16 rows."""
  rows = lambda *segments: sum(-(-tokens // 16) * 16 for tokens in segments)
  tokens = rows(2 * 5, 2 * 9) + rows(2 * 5, 2 * 6, 2 * 6) + rows(8 * 3)
  read = rows(2 * 1, 2 * 1) + rows(2 * 6) + rows(8)
  elements = 8 * tokens * (16 + 2 * 16 // 2) + 8 * read * (4 * 16 + (2 * 16 + 2 * 16) // 2)
  assert sum(s.bytes for s in _forward('token-mixed') if s.opcode == 'all-to-all') == 4 * elements


@pytest.mark.nightly
def test_tokens_that_are_routed_exactly_are_gathered_and_their_sums_scattered():
  """Eight devices with a pair each, all of which compute something for all tokens."""
  sent = _forward('context-expert')
  sent = [s for s in sent if 'shard_map' in s.op_name]
  elements = lambda opcode, dtype: sum(s.size for s in sent if s.opcode == opcode and s.dtype == dtype)
  # A decision of attention for all tokens, and one for those that are read; one of the FFN for those. Two experts each.
  decided = (5 + 9) + 2 + 2
  assert elements('all-gather', 's32') == 8 * 2 * decided
  assert elements('all-gather', 'pred') == 8 * (9 + 1 + 1)  # an image has no padding
  assert elements('all-gather', 'f32') == 8 * ((5 + 9) * 16 + 2 * 4 * 16 + 2 * decided)
  assert elements('reduce-scatter', 'f32') == (5 + 9) * 2 * 16 + 2 * 4 * 16


def test_a_device_has_only_the_logits_of_its_own_inputs():
  assert 'f32[2,8]' in _program()  # four batch shards, eight pairs
  assert not re.search(r'(f32|pred)\[8,8\]', _program())
