"""Collectives of a merged model's step on TPUs: bfloat16 products, FSDP, experts in every other layer."""

import functools
import pathlib
import tempfile

import numpy as np
import pytest

from tests.helpers import hlo, processes, tpu_step

_D, _F = tpu_step.WIDTH, tpu_step.MLP_DIM
_KERNELS = {'qkv': 3 * _D * _D, 'attention_out': _D * _D, 'ffn_in': _D * _F, 'ffn_out': _F * _D}
_GRID = np.arange(4).reshape(tpu_step.MESH['data'], tpu_step.MESH['expert'])
_EXPERT, _DATA, _ALL = (frozenset(map(frozenset, grid.tolist())) for grid in (_GRID, _GRID.T, _GRID.reshape(1, 4)))
pytestmark = pytest.mark.nightly


@functools.cache
def _arrays() -> list[hlo.CollectiveArray]:
  pytest.importorskip('libtpu')
  with tempfile.TemporaryDirectory() as folder:
    file = f'{folder}/step.hlo'
    processes.python('-m', 'tests.helpers.tpu_step', file).check_returncode()
    return hlo.collectives(pathlib.Path(file).read_text())


def test_libtpu_adds_merged_kernels_over_the_expert_axis_in_bfloat16():
  """Every device has a part of the width. Rounding precedes the sum, in spite of `jax.lax.optimization_barrier`."""
  merged = {tpu_step.CONDITIONS * n // tpu_step.MESH['data'] for n in _KERNELS.values()}
  sums = [s for s in _arrays() if s.opcode == 'all-reduce' and s.groups == _EXPERT and s.size >= min(merged)]
  assert {s.size for s in sums} >= merged
  assert {s.dtype for s in sums} == {'bf16'}


def test_libtpu_adds_gradients_of_kernels_in_float32():
  """Over all devices, and of every condition by itself."""
  sums = [s for s in _arrays() if s.opcode in ('all-reduce', 'reduce-scatter') and s.groups == _ALL]
  assert {s.size for s in sums} >= set(_KERNELS.values())
  assert {s.dtype for s in sums if s.size >= min(_KERNELS.values())} == {'f32'}


def test_libtpu_gathers_merged_kernels_over_data_and_no_experts():
  gathered = [s for s in _arrays() if s.opcode == 'all-gather']
  merged = {tpu_step.CONDITIONS * n for n in _KERNELS.values()}
  assert {s.size for s in gathered if s.groups == _DATA and s.dtype == 'bf16'} >= merged
  # The experts of a device would be eight kernels.
  assert max(s.bytes for s in gathered) < tpu_step.NUM_EXPERTS // 2 * min(_KERNELS.values()) * 2
