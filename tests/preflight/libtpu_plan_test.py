"""Plans of programs for TPUs, against a buffer assignment by hand and against a complete compile."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from tests.helpers import processes
from tests.preflight import compiled_programs_test
from uni_moe_jax.preflight import libtpu_plan, topology

_BUFFERS = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <20 sum.41 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 98304, parameter 30, shape |f32[4,16,3,2,8]| at ShapeIndex {}, maybe-live-out:
 value: <9795 fusion.21 @1> (size=512,offset=1409024): f32[2]{0:T(128)S(1)}
allocation 2: size 2048, parameter 2, shape |s32[512]| at ShapeIndex {}:
allocation 3: size 1024, output shape is |(s32[], f32[16])|, maybe-live-out:
allocation 4: size 4096, constant:
allocation 5: size 30000, preallocated-temp:
allocation 6: size 7777, color 1, preallocated-temp:
"""


def test_buffers_are_summed_by_hand():
  # A buffer that an argument and a result share counts once; other memories of the chip, with a color, do not count.
  assert libtpu_plan.parse_buffers(_BUFFERS) == {
      'arguments': 98304 + 2048, 'results': 1024, 'temporaries': 512 + 4096 + 30000}


_PLAN_WITH = """
import ml_collections, sys
from uni_moe_jax.preflight import topology
from uni_moe_jax.preflight import libtpu_plan
sys.executable = sys.argv[1]
libtpu_plan.plan_program(ml_collections.ConfigDict(), None, topology.parse('v5e:2x2'))
"""


def test_the_compiling_process_ends_with_a_preflight_that_is_killed(tmp_path):
  pid, compiler = tmp_path / 'pid', tmp_path / 'python'
  compiler.write_text(f'#!/bin/sh\necho $$ > {pid}.new\nmv {pid}.new {pid}\nexec sleep 120\n')
  compiler.chmod(0o755)
  with subprocess.Popen([sys.executable, '-c', _PLAN_WITH, compiler], env=processes.environment(1)) as preflight:
    while not pid.exists():
      assert preflight.poll() is None
      time.sleep(0.05)
    child = int(pid.read_text())
    assert processes.is_running(child)
    preflight.kill()
  deadline = time.monotonic() + 10
  while processes.is_running(child) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not processes.is_running(child)


@pytest.mark.nightly
def test_a_subprocess_that_ends_without_a_plan_is_a_defect_and_its_output_is_shown():
  unknown = dataclasses.replace(topology.parse('v5e:2x2'), name='v5e:2x3')
  with pytest.raises(RuntimeError, match=r'(?s)exit code 1 and no plan: .*UsageError: --topology=.v5e:2x3.'):
    libtpu_plan.plan_program(compiled_programs_test._config(), None, unknown)


_PLANNED_AND_COMPILED = """
import json
from tests.preflight import compiled_programs_test
from uni_moe_jax.preflight import hlo
from uni_moe_jax.preflight import cost
from uni_moe_jax.preflight import compiled_programs
config = compiled_programs_test.small_config({
    'model.num_layers': 6, 'model.width': 256, 'model.num_heads': 4, 'model.mlp_dim': 1024, 'model.remat': True,
    'moe.num_experts': 8, 'tasks.digit.batch_size': 64})
run = compiled_programs.prepare(config, topology.devices(target))
for which in (None, compiled_programs.EVALUATION):
  for t in (None, target):
    p = compiled_programs.compile_program(run, which, t)
    m = p.memory
    print(json.dumps([p.cost.flops, p.cost.bytes, p.cost.sent['all-reduce'],
                      m.params, m.inputs, m.results, m.temporaries, m.code]))
"""


@pytest.mark.parametrize('text, is_complete', [
    ('HloModule m\n\n%c (x: f32[]) -> f32[] {\n}\n\nENTRY %e () -> f32[] {\n  constant(1)\n}\n\n', True),
    ('HloModule m\n\n%c (x: f32[]) -> f32[] {\n}\n', False), ('HloModule m\n\nENTRY %e () -> f32[] {', False),
    ('HloModule m\n\nENTRY %e () -> f32[] {\n  ROOT %r = f32[] add(a, b), metadata={op_name="x"}', False)])
def test_a_plan_is_complete_with_its_entry(tmp_path, text, is_complete):
  assert not libtpu_plan._is_complete(tmp_path)
  (tmp_path / libtpu_plan._PLAN.replace('*', 'module.')).write_text(text)
  assert libtpu_plan._is_complete(tmp_path) == is_complete


@pytest.mark.nightly  # complete compiles take three minutes of a machine without AVX-512
def test_libtpu_plans_what_it_compiles():
  pytest.importorskip('libtpu')
  lines = [json.loads(line) for line in processes.printed(_PLANNED_AND_COMPILED, 'v5e:2x2').splitlines()]
  for compiled, plan in zip(lines[::2], lines[1::2], strict=True):
    assert plan[:6] == pytest.approx(compiled[:6])
    # libtpu's analysis of a compiled program has more temporaries than its check against the device memory.
    assert compiled[6] / 2 < plan[6] <= compiled[6]
    assert plan[7] > compiled[7]  # an estimate from above


_TOO_LARGE = """
from tests.preflight import compiled_programs_test
from uni_moe_jax.preflight import compiled_programs
config = compiled_programs_test.small_config({  # 51 GB with its moments
    'model.num_layers': 2, 'model.width': 1024, 'model.num_heads': 8, 'model.mlp_dim': 2**20, 'moe.router': 'dense'})
run = compiled_programs.prepare(config, topology.devices(target))
program = compiled_programs.compile_program(run, None, target)
print(program.memory, program.needs)
"""


@pytest.mark.nightly
def test_libtpu_reports_the_need_of_a_program_that_is_too_large():
  pytest.importorskip('libtpu')
  memory, needs = processes.printed(_TOO_LARGE, 'v5e:2x2').split()
  assert memory == 'None' and float(needs) > 15.75 * topology.GIB
