"""Benchmarks: paired rounds by hand; kernels lower for CUDA at their real sizes; nightly, each runs at small sizes."""

import argparse
import functools
import json
import runpy
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from benchmarks import kernels, paired
from tests.helpers import abstract_devices, tiny
from uni_moe_jax.utils.errors import RunError


def test_calls_run_in_turn_and_the_first_time_only_to_compile():
  log = []
  seconds = paired.paired({name: functools.partial(log.append, name) for name in 'ab'}, 3,
                          before={'b': lambda: log.append('before')})
  assert log == ['a', 'before', 'b', 'before', 'b', 'a', 'a', 'before', 'b', 'before', 'b', 'a']
  assert {name: x.shape for name, x in seconds.items()} == {'a': (3,), 'b': (3,)}


def test_a_report_has_the_median_of_the_rounds_own_ratios(tmp_path, capsys):
  report = paired.Report(argparse.Namespace(output=str(tmp_path / 'out.json'), rounds=3, quick=True))
  # The machine is half as fast in the third round: both take twice as long, and their ratio stays.
  seconds = {'a': np.array([1., 1., 2.]), 'b': np.array([3., 2., 4.])}
  with mock.patch.object(paired, 'paired', lambda calls, *_, **__: {k: seconds[k] for k in calls}):
    report.compare('step', {'a': None, 'b': None})
    report.compare('rate', {'a': None}, work=10, unit='images/s')
  report.write()
  lines = json.loads((tmp_path / 'out.json').read_text())['lines']
  assert [(line['name'], line['value'], line['unit'], line['ratio']) for line in lines] == [
      ('step: a', 1000, 'ms', 1), ('step: b', 3000, 'ms', 2), ('rate: a', 10, 'images/s', 1)]
  assert 'step: b' in capsys.readouterr().out


def test_a_result_that_is_more_than_rounding_away_is_refused():
  kernels.check(jnp.array([1., 1.01]), jnp.array([1., 1.]))
  with pytest.raises(RunError, match='results differ by 0.1 '):
    kernels.check(jnp.array([1., 1.1]), jnp.array([1., 1.]))


def _lowered(program, operands):
  abstract = jax.eval_shape(operands)
  with mock.patch.object(jax, 'default_backend', lambda: 'gpu'), mock.patch.object(
      fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000), abstract_devices.tracing_for('cuda'):
    return program.trace(*abstract).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('length', kernels.Shapes().lengths)
@pytest.mark.parametrize('implementation, expected', [('xla', 0), ('cudnn', 1)])
def test_attention_lowers_for_cuda(length, implementation, expected):
  program = kernels.programs(kernels.attention()[implementation])['forward']
  text = _lowered(program, lambda: kernels.attention_operands(kernels.Shapes(), length))
  assert text.count('@__cudnn$fmha') == expected


@pytest.mark.parametrize('kernel', range(len(kernels.KERNELS)), ids=kernels.KERNELS)
@pytest.mark.parametrize('tiles', kernels.TILES, ids=lambda t: 'x'.join(map(str, t)))
def test_every_choice_of_tiles_lowers_for_cuda_as_one_kernel(kernel, tiles):
  text = _lowered(kernels.triton_program(kernel, tiles), _operands())
  assert text.count('__gpu$xla.gpu.triton') == 1


def _operands():
  sizes = kernels.Shapes()
  x, kernel, gradient = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (
      (sizes.tokens, 768), (sizes.experts, 768, 3072), (sizes.tokens, 3072)))
  group_sizes = jax.ShapeDtypeStruct((sizes.experts,), jnp.int32)
  zeros = lambda s: jnp.zeros(s.shape, s.dtype)
  return lambda: jax.tree.map(zeros, ((x, kernel), (group_sizes,), gradient))


@pytest.mark.nightly
@pytest.mark.parametrize('name', ['training_steps', 'input_rate', 'captions', 'compile_time', 'kernels'])
def test_a_benchmark_runs(name, tmp_path):
  (tmp_path / 'c.py').write_text('from tests.helpers import tiny\ndef get_config():\n'
                                 f'  return tiny.config("shape", "caption", data_dir={tiny.data_dir()!r})\n')
  arguments = ['--quick', '--rounds=1', f'--config={tmp_path / "c.py"}', f'--output={tmp_path / "out.json"}']
  with mock.patch.object(sys, 'argv', [name, *arguments]):
    runpy.run_module(f'benchmarks.{name}', run_name='__main__')
  lines = json.loads((tmp_path / 'out.json').read_text())['lines']
  assert lines and all(line['value'] is None or line['value'] > 0 for line in lines)
