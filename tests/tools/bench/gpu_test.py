"""The suite `gpu` without a GPU: sections at the smallest sizes on CPU, rates by hand, failures, processes."""

import itertools
import json
import math
import operator
import types
from unittest import mock

import jax
import numpy as np
import pytest

from tests.helpers import in_process, processes
from uni_moe_jax.parallel import peaks
from uni_moe_jax.tasks import router_names
from uni_moe_jax.tools.bench import gpu, gpu_sections, settings, suite_process, suites
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.results_table import FAILED
from uni_moe_jax.tools.bench.timing import Estimate, Rounds
from uni_moe_jax.utils.errors import UsageError

_SIZES = settings.GpuSizes(
    rounds=1, num_layers=1, width=16, num_heads=2, mlp_dim=32, image_size=16, patch_size=8, experts=2, batch_size=4,
    small_batch=2, names=20, name_tokens=4, vocabulary=30, words=3, calls=2, tokens=64, lengths=(5, 9), steps=2,
    tiles=((16, 16, 16, 4, 2), (32, 16, 16, 4, 2)), reduced=True)
_H100 = 'NVIDIA H100 80GB HBM3'


def _context() -> Context:
  return Context(_SIZES, None, 'bfloat16', 0., jax.devices()[:1])


def _rows(section: str, number: int | None = None):
  """Rows of the first measurements of a section."""
  measurements = itertools.islice(gpu_sections.SECTIONS[section](_context()), number)
  return [r for measurement in measurements for r in gpu.attempt(*measurement)]


def test_without_a_gpu_one_sentence_names_what_is_missing():
  message = '--suites=gpu needs an NVIDIA GPU .* devices of type cpu; name other suites'
  with mock.patch.dict(suites.SUITE_FUNCTIONS, gpu=lambda _: []), pytest.raises(UsageError, match=message):
    suites.measure('gpu', _SIZES, None, 'bfloat16')


@pytest.mark.parametrize('device, tflops', [
    ('NVIDIA A100-SXM4-40GB', 312), ('NVIDIA A100 80GB PCIe', 312), (_H100, 989), ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200', 989), ('NVIDIA H200 NVL', 835), ('NVIDIA L4', 121), ('NVIDIA L40S', 362),
    ('NVIDIA L40', None), ('NVIDIA A10G', None), (f'{_H100} MIG 1g.10gb', None),
    ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None), ('NVIDIA A100 80GB PCIe MIG 2g.20gb', None), ('cpu', None)])
def test_the_peak_is_that_of_the_very_card(device, tflops):
  assert peaks.of_kind(device) == (tflops and tflops * 1e12)


def _model_rows(device: str):
  """Rows of a token router, whose step takes 2 s and dense 1 s."""
  def step(_, router):
    run = types.SimpleNamespace(step_flops=lambda *_: {'token': 12 * 989e12}[router])  # of three passes, 4 examples
    return types.SimpleNamespace(run=run, batch=None, sets=None, infer=None)
  context = Context(_SIZES, None, 'bfloat16', 0., [types.SimpleNamespace(device_kind=device)])
  seconds = lambda *_: Rounds({'dense': np.array([1.]), 'token': np.array([2.])})
  with mock.patch.multiple(gpu_sections, _step=step, _seconds=seconds):
    [dense, token] = itertools.islice(gpu_sections.models(context), 4, None)
    assert (dense[0], token[0]) == ('token', 'context')
    return {(r.name, r.unit): r for r in dense[1]()}


def test_rates_by_hand():
  # 4 examples in 2 s. Training: 3 passes of 4 · 989 TFLOP in 2 s, 6 times the peak of an H100.
  rows = _model_rows(_H100)
  assert {k: r.figure.value for k, r in rows.items()} == pytest.approx({
      ('token, train', 'examples/s'): 2, ('token, train', '% MFU'): 600, ('token / dense, train', 'x'): 2,
      ('token, inference', 'examples/s'): 2, ('token, inference', '% MFU'): 200, ('token / dense, inference', 'x'): 2})
  assert rows['token / dense, train', 'x'].verdict(reduced=False) == 'met'
  assert rows['token / dense, inference', 'x'].budget is None


def test_a_card_without_a_known_peak_has_flops_per_second_and_no_budget():
  rows = _model_rows('NVIDIA X1')
  assert rows['token, train', 'TFLOP/s'].figure.value == pytest.approx(6 * 989)
  assert all("the peak of 'NVIDIA X1' is unknown" in r.note and r.budget is None for r in rows.values())


def test_attention_is_measured_and_cudnn_is_not_available_on_cpu():
  rows = _rows('attention')
  assert [(r.name, r.missing) for r in rows] == [
      ('attention of 5 tokens, xla, forward', ''), ('attention of 5 tokens, xla, gradients', ''),
      ('attention of 5 tokens, cudnn', 'not available'),
      ('attention of 9 tokens, xla, forward', ''), ('attention of 9 tokens, xla, gradients', ''),
      ('attention of 9 tokens, cudnn', 'not available')]
  assert '[12, 5, 2, 8]' in rows[0].note  # 64 tokens at most


@pytest.mark.slow
def test_grouped_products_have_tiles_and_are_compared_with_what_is_installed():
  rows = _rows('grouped products', 7)  # of the first shape
  assert [r.name.partition(', fastest tiles')[0] for r in rows[:3]] == [
      f'16 x 48, Triton {kernel}' for kernel in ('product', 'gradient of x', 'gradient of kernels')]
  for r in rows[:3]:
    assert '16x16x16, 4 warps, 2 stages: ' in r.note and '32x16x16, 4 warps, 2 stages: ' in r.note
  assert [(r.name.removeprefix('16 x 48, '), r.missing) for r in rows[3:]] == [
      *((f'{name}, {which}', '') for name in ('Triton', 'batched', 'ragged_dot')
        for which in ('forward', 'gradients')),
      ('tokamax', 'not installed')]


def _tune(seconds):
  """(rows, fastest tiles) of the gradient of x; seconds: by rows of the tile, or an error."""
  def measure(_, calls):
    [tiles] = calls
    if isinstance(seconds[tiles.rows], Exception):
      raise seconds[tiles.rows]
    return Rounds({tiles: np.array([seconds[tiles.rows]])})
  fastest = [None] * 3
  program = lambda *_: lambda: None
  with mock.patch.multiple(gpu_sections, _seconds=measure, _triton_program=program):
    return gpu_sections._tune(_SIZES, 'x', 1, lambda: (), fastest), fastest


def test_the_fastest_tiles_win_and_those_that_fail_are_named():
  [row], fastest = _tune({16: 2., 32: 1.})
  assert (row.name, row.figure.value) == ('x, fastest tiles: 32x16x16, 4 warps, 2 stages', 1000)
  assert (fastest[0], fastest[1], fastest[2]) == (None, (32, 16, 16, 4, 2), None)
  [row], _ = _tune({16: 2., 32: ValueError('too much\nshared memory')})
  assert 'fastest tiles: 16x16x16' in row.name and '2 stages: ValueError: too much shared memory' in row.note
  with pytest.raises(RuntimeError, match='ValueError: no; 32x16x16'):
    _tune({16: ValueError('no'), 32: ValueError('no')})


def test_a_kernel_with_wrong_results_is_not_timed():
  right = gpu_sections.gmm_triton.grouped_matmul
  wrong = lambda x, kernel, sizes, tiles: right(x, kernel, sizes[::-1] if tiles[0].rows == 16 else sizes, tiles)
  with mock.patch.object(gpu_sections.gmm_triton, 'grouped_matmul', wrong):
    [tiles] = _rows('grouped products', 1)
  assert 'fastest tiles: 32x16x16' in tiles.name
  assert "16x16x16, 4 warps, 2 stages: RunError: results differ from XLA's by" in tiles.note
  with mock.patch.dict(gpu_sections.IMPLEMENTATIONS, tokamax=lambda x, kernel, sizes: x @ kernel[0]):
    [tokamax] = gpu.attempt('tokamax', dict(gpu_sections.grouped_products(_context()))['16 x 48, tokamax'])
  assert (tokamax.missing, 'of the largest' in tokamax.note) == (FAILED, True)


@pytest.mark.parametrize('error, missing', [
    (ModuleNotFoundError('No module named tokamax'), 'not installed'),
    (gpu_sections.NotAvailableError('needs a GPU'), 'not available'), (ValueError('RESOURCE\nEXHAUSTED'), FAILED)])
def test_an_error_is_a_row_with_its_message(error, missing):
  [row] = gpu.attempt('token', mock.Mock(side_effect=error))
  assert (row.name, row.figure, row.missing) == ('token', None, missing)
  assert row.note == f'{type(error).__name__}: {" ".join(str(error).split())}'


def test_two_processes_must_have_the_same_digests():
  digest = lambda name, note: gpu_sections.row(name, Estimate(10), 'steps, bit-equal', note=note)
  failed = gpu_sections.row('task', None, '', note='crash', missing=FAILED)
  rows = gpu.same_bits([digest('attribute', 'ab'), digest('token', 'cd')],
                       [digest('attribute', 'ab'), digest('token', 'ce'), failed])
  assert [(r.name, r.missing, r.note.rpartition(': ')[2]) for r in rows] == [
      ('attribute', '', 'ab'), ('token', FAILED, 'cd, ce'), ('task', FAILED, 'crash')]
  assert rows[0].figure.value == 10


def test_a_process_that_reaches_its_limit_or_crashes_leaves_a_row():
  [row] = gpu.in_process('attention', _SIZES, minutes=0)
  assert (row.name, row.missing, row.note) == ('attention', FAILED, 'ended at its limit of 0 minutes')
  with mock.patch.object(gpu, '_send_rows', operator.call):  # calls a string
    [row] = gpu.in_process('attention', _SIZES, minutes=1)
  assert (row.missing, row.note) == (FAILED, 'the process ended with code 1; its output is in the terminal')
  with mock.patch.object(gpu, '_send_rows', print):
    assert gpu.in_process('attention', _SIZES, minutes=1) == []


@pytest.mark.parametrize('missing, code', [(FAILED, 1), ('not installed', 0)])
def test_the_exit_code_and_the_json_report_what_failed(missing, code, tmp_path, monkeypatch):
  row = gpu_sections.row('token', None, '', note='out of memory', missing=missing)
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', '')  # which the script sets
  monkeypatch.setattr(suite_process, 'measure', lambda *_: ({}, [row]))
  output = tmp_path / 'gpu.json'
  assert in_process.run(processes.ROOT / 'launch/benchmark.py', '--suites=gpu', f'--output={output}') == code
  assert [r['note'] for r in json.loads(output.read_text())['rows']] == ['out of memory']


@pytest.mark.nightly
def test_a_process_sends_its_rows():
  assert [r.name for r in gpu.in_process('attention', _SIZES, minutes=5)] == [r.name for r in _rows('attention')]


@pytest.mark.nightly
def test_every_router_trains_and_infers():
  rows = _rows('models')
  assert {r.name for r in rows} >= {f'{router}, {mode}' for router in router_names.ROUTERS
                                   for mode in ('train', 'inference')}
  assert len(rows) == 2 * (2 + 3 * 5)
  assert all(not r.missing and math.isfinite(r.figure.value) for r in rows)


@pytest.mark.nightly
def test_captions_and_digests_are_computed():
  captions, digests = _rows('captions'), _rows('digests')
  assert [r.name for r in captions] == [f'{router}, {k}' for router in ('dense', 'attribute')
                                        for k in ('greedy', 'beam 2')]
  assert all(r.figure.value > 0 for r in captions)
  assert [r.note for r in _rows('digests')] == [r.note for r in digests]
  assert len({r.note for r in digests}) == 2 and all(len(r.note) == 64 for r in digests)


def test_all_limits_together_are_less_than_half_an_hour():
  assert sum(gpu._MINUTES.values()) + 2 * gpu._DIGEST_MINUTES < 29
