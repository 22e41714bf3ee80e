"""Plans of programs for TPUs: read by hand, and against what a whole compile says."""

import dataclasses
import json

import pytest

from tests.helpers import beside_libtpu
from tests.tools.preflight import compiled_programs_test
from uni_moe_jax.tools.preflight import libtpu_plan, topology

_PLACES = """BufferAssignment:
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


def test_places_in_memory_by_hand():
  # What an argument gives up for a result is counted once; other memories of the chip, of another colour, are not counted.
  assert libtpu_plan.places_of(_PLACES) == {'arguments': 98304 + 2048, 'results': 1024, 'temporaries': 512 + 4096 + 30000}


@pytest.mark.slow
def test_a_process_that_ends_without_a_plan_is_a_defect_and_says_why():
  nowhere = dataclasses.replace(topology.parse('v5e:2x2'), name='v5e:2x3')
  with pytest.raises(RuntimeError, match=r'(?s)exit code 1 and no plan: .*ValueError: --topology=.v5e:2x3.'):
    libtpu_plan.plan(compiled_programs_test._config(), None, nowhere)


_BOTH_WAYS = """
import json
from uni_moe_jax.tools.preflight import topology
where = topology.parse('v5e:2x2')
topology.prepare_environment(where)
from tests.tools.preflight import compiled_programs_test
from uni_moe_jax.tools.preflight import compiled_programs, cost, hlo
config = compiled_programs_test._small(dict(model=dict(num_layers=6, width=256, num_heads=4, mlp_dim=1024, remat=True), moe=dict(num_experts=8)))
config.tasks.digit.batch_size = 64
run = compiled_programs.prepare(config, topology.devices(where))
for which in (None, compiled_programs.EVALUATION):
  make = compiled_programs.evaluation if which else lambda *a: compiled_programs.train_step(a[0], None, *a[1:])
  whole, plan = make(run), make(run, where)
  for p in (whole, plan):
    m = p.memory
    print(json.dumps([p.cost.flops, p.cost.bytes, p.cost.sent['all-reduce'], m.params, m.inputs, m.results, m.temporaries, m.code]))
"""


@pytest.mark.slow
def test_libtpu_plans_what_it_compiles():
  pytest.importorskip('libtpu')
  lines = [json.loads(line) for line in beside_libtpu.printed(_BOTH_WAYS).splitlines()]
  for whole, plan in zip(lines[::2], lines[1::2], strict=True):
    assert plan[:6] == pytest.approx(whole[:6])
    # libtpu's account of a compiled program has more temporaries than what it holds against the device's memory when it refuses one.
    assert whole[6] / 2 < plan[6] <= whole[6]
    assert plan[7] > whole[7]  # an estimate from above


_TOO_LARGE = """
from uni_moe_jax.tools.preflight import topology
where = topology.parse('v5e:2x2')
topology.prepare_environment(where)
from tests.tools.preflight import compiled_programs_test
from uni_moe_jax.tools.preflight import compiled_programs
config = compiled_programs_test._small(dict(model=dict(num_layers=2, width=1024, num_heads=8, mlp_dim=2**20), moe=dict(router='dense')))  # 51 GB with its moments
program = compiled_programs.train_step(compiled_programs.prepare(config, topology.devices(where)), None, where)
print(program.memory, program.needs)
"""


@pytest.mark.slow
def test_libtpu_says_what_a_program_needs_that_is_too_large():
  pytest.importorskip('libtpu')
  memory, needs = beside_libtpu.printed(_TOO_LARGE).split()
  assert memory == 'None' and float(needs) > 15.75 * topology.GIB
