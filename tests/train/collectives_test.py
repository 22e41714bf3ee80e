"""What the step of the base model sends between 64 devices, data 8 × expert 8: the formulas of docs/parallelism.md."""

import functools
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from tests import base_step, hlo

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_D, _F = base_step.WIDTH, base_step.HIDDEN
_KERNELS = {'qkv': 3 * _D * _D, 'attention_out': _D * _D, 'ffn_in': _D * _F, 'ffn_out': _F * _D}
pytestmark = pytest.mark.slow


@functools.cache
def _sent(router: str, capacity: float) -> list[hlo.Sent]:
  with tempfile.TemporaryDirectory() as folder:
    file = f'{folder}/step.hlo'
    flags = '--xla_force_host_platform_device_count=64 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
    subprocess.run([sys.executable, '-m', 'tests.base_step', router, str(capacity), file], check=True, cwd=_ROOT,
                   env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags})
    return hlo.collectives(pathlib.Path(file).read_text())


def _in_body(sent, backward: bool) -> list[hlo.Sent]:
  """What the scanned layers send: once in the text, for eleven layers."""
  return [s for s in sent if '/while/body' in s.name and ('transpose' in s.name) == backward]


@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'recomputed'])
def test_merged_kernels_of_a_layer_are_reduced_once(backward):
  sizes = [s.size for s in _in_body(_sent('attribute', 0.0), backward) if s.kind == 'all-reduce']
  for size in set(_KERNELS.values()):
    alike = [name for name, n in _KERNELS.items() if n == size]
    assert sizes.count(base_step.ROWS * size) == len(alike), alike


def test_gradients_of_a_layer_are_reduced_as_merged_kernels():
  """One reduction for every product with a merged kernel: there are three arrays, of two rows."""
  sizes = [s.size for s in _in_body(_sent('attribute', 0.0), True) if s.kind == 'all-reduce']
  # In elements: the fused projection may come in its three parts, each as large as the kernel after attention.
  for alike in (('qkv', 'attention_out'), ('ffn_in', 'ffn_out')):
    elements = {_KERNELS[name] for name in alike}
    reduced = sum(size for size in sizes if size in elements) / sum(_KERNELS[name] for name in alike)
    assert base_step.ROWS <= reduced <= len(base_step.TOKENS), alike


def test_no_kernel_of_an_expert_travels():
  sent = _sent('attribute', 0.0)
  assert {s.kind for s in sent} <= {'all-reduce', 'all-gather'}
  assert max(s.size for s in sent if s.kind == 'all-gather') < min(_KERNELS.values())
  assert max(s.size for s in sent) <= base_step.ROWS * max(_KERNELS.values())


def test_tokens_travel_by_all_to_alls_of_the_bytes_of_the_formula():
  capacity = 1.0
  sent = _sent('token', capacity)
  slots = sum(base_step.EXPERTS * math.ceil(capacity * base_step.KEPT * tokens / base_step.EXPERTS)
              for tokens in base_step.TOKENS.values())
  forward = slots * (8 * _D + 2 * _F) * 4
  total = lambda backward: sum(s.bytes for s in _in_body(sent, backward) if s.kind == 'all-to-all')
  assert total(False) == forward
  assert total(True) == 2 * forward  # recomputed, and the gradients' way
  # Kernels stay: their gradients are summed over `data`, each expert's where it lies.
  assert max(s.size for s in sent if s.kind == 'all-gather') < min(_KERNELS.values())
