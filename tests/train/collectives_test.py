"""What the base model's step sends between 64 devices, data 8 × expert 8: docs/guides/multi_device.md."""

import functools
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from tests.helpers import base_step, fast_compile, hlo
from tests.helpers.processes import ROOT

_D, _F = base_step.WIDTH, base_step.MLP_DIM
_KERNELS = {'qkv': 3 * _D * _D, 'attention_out': _D * _D, 'ffn_in': _D * _F, 'ffn_out': _F * _D}
pytestmark = pytest.mark.nightly


_GRID = np.arange(64).reshape(base_step.MESH['data'], base_step.MESH['expert'])
_GROUPS = {name: frozenset(map(frozenset, grid.tolist())) for name, grid in (
    ('expert', _GRID), ('data', _GRID.T), ('all', _GRID.reshape(1, 64)))}


@functools.cache
def _sent(router: str, capacity: float) -> list[hlo.CollectiveArray]:
  with tempfile.TemporaryDirectory() as folder:
    file = f'{folder}/step.hlo'
    flags = fast_compile.environment_flags(64)
    command = [sys.executable, '-m', 'tests.helpers.base_step', router, str(capacity), file]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags})
    return hlo.collectives(pathlib.Path(file).read_text())


def _of_layer(sent, backward: bool, tail: bool = False) -> list[hlo.CollectiveArray]:
  """What a scanned layer sends (once in the text, for eleven of them), or the last one, which is unrolled."""
  scope = '/tail/' if tail else '/while/body'
  return [s for s in sent if scope in s.op_name and ('transpose' in s.op_name) == backward]


def _merges(sent: list[hlo.CollectiveArray]) -> list[int]:
  """Sizes of what is reduced over the expert axis, but for biases."""
  reduced = [s for s in sent if s.opcode == 'all-reduce' and s.groups == _GROUPS['expert']]
  return sorted(s.size for s in reduced if s.size >= min(_KERNELS.values()))


@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'recomputed'])
def test_merged_kernels_of_a_layer_are_reduced_once_over_the_expert_axis(backward):
  expected = sorted(base_step.CONDITIONS * n for n in _KERNELS.values())
  assert _merges(_of_layer(_sent('attribute', 0.0), backward)) == expected


def test_merged_kernels_of_the_last_layer_are_reduced_once_and_recomputed_once():
  """XLA joins the reductions of both passes."""
  sent = [s for backward in (False, True) for s in _of_layer(_sent('attribute', 0.0), backward, tail=True)]
  assert _merges(sent) == sorted(2 * [base_step.CONDITIONS * n for n in _KERNELS.values()])


def test_gradients_of_a_layer_are_reduced_as_merged_kernels_over_all_devices():
  """One reduction for every product with a merged kernel: there are three arrays, of two conditions."""
  sent = _of_layer(_sent('attribute', 0.0), True)
  sizes = [s.size for s in sent if s.opcode == 'all-reduce' and s.groups == _GROUPS['all']]
  # In elements: the fused projection may come in its three parts, each as large as the kernel after attention.
  for names in (('qkv', 'attention_out'), ('ffn_in', 'ffn_out')):
    elements = {_KERNELS[name] for name in names}
    reduced = sum(size for size in sizes if size in elements) / sum(_KERNELS[name] for name in names)
    assert base_step.CONDITIONS <= reduced <= base_step.NUM_ARRAYS, names


def test_no_expert_kernel_is_sent():
  sent = _sent('attribute', 0.0)
  assert {s.opcode for s in sent} <= {'all-reduce', 'all-gather'}
  assert max(s.size for s in sent if s.opcode == 'all-gather') < min(_KERNELS.values())
  assert max(s.size for s in sent) <= base_step.CONDITIONS * max(_KERNELS.values())


_CAPACITY = 1.0


def _slots(*tokens: int) -> int:
  """On a device, of an array whose parts have so many tokens there: E · C, with C of all parts in whole registers."""
  C = sum(math.ceil(_CAPACITY * base_step.TOP_K * n / base_step.NUM_EXPERTS) for n in tokens)
  return base_step.NUM_EXPERTS * 16 * math.ceil(C / 16)


@pytest.mark.parametrize('tail', [False, True], ids=['scanned', 'tail'])
def test_all_to_alls_over_the_expert_axis_send_the_bytes_of_the_formula(tail):
  sent = _sent('token', _CAPACITY)
  read_slots = sum(_slots(read) for _, read in base_step.TOKENS.values() if read)
  if tail:  # keys and values of all, and the rest of the rows that are read
    elements = sum(_slots(*parts) * 3 * _D for parts, _ in base_step.TOKENS.values()) + read_slots * (6 * _D + 2 * _F)
  else:
    elements = sum(_slots(*parts) * (8 * _D + 2 * _F) for parts, _ in base_step.TOKENS.values())
  # Outside of the loop XLA sends one array fewer again, of D: rows that are read.
  again = 2 * elements - (read_slots * _D if tail else 0)
  for backward, total in ((False, elements), (True, again)):  # recomputed, and the gradients
    all_to_alls = [s for s in _of_layer(sent, backward, tail) if s.opcode == 'all-to-all']
    assert {s.groups for s in all_to_alls} == {_GROUPS['expert']}
    assert sum(s.bytes for s in all_to_alls) == 4 * total


@pytest.mark.parametrize('tail', [False, True], ids=['scanned', 'tail'])
def test_expert_kernels_are_not_sent_and_their_gradients_are_summed_over_data(tail):
  sent = _sent('token', _CAPACITY)
  assert {s.opcode for s in sent} <= {'all-reduce', 'all-gather', 'all-to-all'}
  assert max(s.size for s in sent if s.opcode == 'all-gather') < min(_KERNELS.values())
  # Of eight experts a device has one.
  assert max(s.size for s in sent if s.opcode == 'all-reduce') <= max(_KERNELS.values())
  large = [s for s in _of_layer(sent, True, tail) if s.opcode == 'all-reduce' and s.size >= min(_KERNELS.values())]
  of_experts = [s for s in large if s.groups == _GROUPS['data']]
  assert 1 <= sum(s.size for s in of_experts) / sum(_KERNELS.values()) <= len(base_step.TOKENS)
  # After the layers come the tables of patches and words, which every device has.
  tables = {(16 * 16 * 3, _D), (base_step.VOCAB_SIZE, _D)}
  assert {s.shape for s in large if s not in of_experts} == (tables if tail else set())
