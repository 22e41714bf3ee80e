"""Kernels and captions of the suite `gpu` lower for CUDA at their real sizes: base/16 in bfloat16, without a device."""

import functools
import re
import types
from unittest import mock

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from tests.helpers import abstract_devices
from uni_moe_jax.kernels import attention as attention_kernels
from uni_moe_jax.tools.bench import gpu_sections, settings
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.timing import Rounds

_H100 = types.SimpleNamespace(platform='gpu', compute_capability='9.0')


def _measurements(section: str) -> dict[str, gpu_sections.Measure]:
  return dict(gpu_sections.SECTIONS[section](Context(settings.ON_GPU, None, 'bfloat16', 0., jax.devices()[:1])))


def _lowered(measure: gpu_sections.Measure) -> tuple[str, list]:
  """(program, rows) of a measurement that is traced: every call that it would time, and what it prepares."""
  rows = []

  def program():
    outputs = []

    def trace(_, calls):
      outputs.extend(call() for call in calls.values())
      return Rounds({name: np.ones(1) for name in calls})
    with mock.patch.multiple(gpu_sections, _seconds=trace, _check=lambda *_: None):
      rows.extend(measure())
    return outputs

  choose = attention_kernels.choose
  on_h100 = lambda *args: choose(*args[:-1], types.SimpleNamespace(devices=np.array([_H100])))
  with mock.patch.object(jax, 'default_backend', lambda: 'gpu'), mock.patch.object(
      attention_kernels, 'choose', on_h100), mock.patch.object(
          fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000), abstract_devices.tracing_for('cuda'):
    return jax.jit(program).trace().lower(lowering_platforms=('cuda',)).as_text(), rows


@functools.cache
def _kernels(section: str, name: str) -> tuple[int, int]:
  """Kernels of (Triton, cuDNN) in a measurement's program."""
  text, _ = _lowered(_measurements(section)[name])
  return tuple(len(re.findall(kernel, text)) for kernel in ('__gpu.xla.gpu.triton', '@__cudnn.fmha'))


@pytest.mark.parametrize('implementation', ['xla', 'cudnn'])
@pytest.mark.parametrize('tokens', settings.ON_GPU.lengths)
def test_attention(tokens, implementation):
  # Forward alone, and before the gradients.
  expected = (0, 3) if implementation == 'cudnn' else (0, 0)
  assert _kernels('attention', f'attention of {tokens} tokens, {implementation}') == expected


@pytest.mark.parametrize('kernel', gpu_sections.KERNELS)
def test_every_choice_of_tiles(kernel):
  text, [row] = _lowered(_measurements('grouped products')[f'768 x 3072, Triton {kernel}'])
  assert text.count('__gpu$xla.gpu.triton') == len(settings.ON_GPU.tiles)  # a kernel alone, without the other two
  assert row.note.count(' stages: 1e+03 ms') == len(settings.ON_GPU.tiles), row.note


@pytest.mark.parametrize('implementation, kernels', [('Triton', 3), ('batched', 0), ('ragged_dot', 0)])
def test_grouped_products(implementation, kernels):
  assert _kernels('grouped products', f'3072 x 768, {implementation}') == (kernels, 0)


@pytest.mark.parametrize('router', ['dense', 'attribute'])
def test_captions(router):
  triton, _ = _kernels('captions', f'{router}, captions')
  assert triton == 0
