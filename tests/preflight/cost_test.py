"""Costs of hand-written HLO programs, against sums by hand; rooflines of costs."""

import math

import pytest

from uni_moe_jax.preflight import cost, hlo
from uni_moe_jax.preflight.topology import Chip

_LOOP = '''HloModule loop, is_scheduled=true, num_partitions=4

%scaled (a: f32[7,8,16], i: s32[]) -> f32[8,16] {
  %a = f32[7,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,16]{2,1,0} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = f32[8,16]{1,0} bitcast(%one)
}

%body (s: (s32[], f32[4,8], f32[7,8,16])) -> (s32[], f32[4,8], f32[7,8,16]) {
  %s = (s32[], f32[4,8]{1,0}, f32[7,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%s), index=1
  %w = f32[7,8,16]{2,1,0} get-tuple-element(%s), index=2
  %slice = f32[8,16]{1,0} fusion(%w, %i), kind=kLoop, calls=%scaled
  %y = f32[4,16]{1,0} dot(%x, %slice), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[4,16]{1,0} all-reduce(%y), replica_groups=[2,2]<=[4], to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[4,8]{1,0}, f32[7,8,16]{2,1,0}) tuple(%next, %x, %w)
}

%condition (s: (s32[], f32[4,8], f32[7,8,16])) -> pred[] {
  %s = (s32[], f32[4,8]{1,0}, f32[7,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%add (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %r = f32[] add(%p, %q)
}

ENTRY %main (x: f32[4,8], w: f32[7,8,16]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = f32[7,8,16]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %state = (s32[], f32[4,8]{1,0}, f32[7,8,16]{2,1,0}) tuple(%start, %x, %w)
  %done = (s32[], f32[4,8]{1,0}, f32[7,8,16]{2,1,0}) while(%state), condition=%condition, body=%body
  ROOT %y = f32[4,8]{1,0} get-tuple-element(%done), index=1
}
'''


def _cost(*changes: tuple[str, str]) -> cost.Cost:
  """Cost of the loop, with some of its text replaced."""
  text = _LOOP
  for old, new in changes:
    assert text.count(old) == 1, old
    text = text.replace(old, new)
  return cost.of_module(hlo.parse(text))


def _entry(root: str, *shapes: str, more: str = '', lines: str = '') -> cost.Cost:
  """Cost of an instruction of parameters %p0, %p1, … of these shapes, after other lines and computations."""
  body = ''.join(f'  %p{i} = {shape} parameter({i})\n' for i, shape in enumerate(shapes)) + f'{lines}  ROOT %y = {root}'
  return cost.of_module(hlo.parse(
      f'HloModule one, num_partitions=8\n{more}\nENTRY %main () -> f32[] {{\n{body}\n}}\n'))


def test_a_loop_body_counts_as_often_as_the_loop_runs():
  total = _cost()
  # [4, 8] x [8, 16], seven times: 7 · 2 · 4 · 8 · 16.
  assert total.flops == 7 * 1024
  assert total.calls == {'all-reduce': 7}
  # [4, 16] f32 in pairs: 256 bytes, of which a ring sends 2 · 1/2.
  assert total.payload == {'all-reduce': 7 * 256} and total.sent == {'all-reduce': 7 * 256}
  assert total.unknown_loops == 0


def test_memory_traffic_of_a_loop_by_hand():
  # Per iteration: the fusion reads the 512 bytes of one slice and the index, and writes 512. The product reads those
  # 512, not the 128 of x, which is in fast memory, and writes 256; the reduction reads and writes 256. The counter
  # i + 1 reads 8 and writes 4. The condition reads i and n and writes one byte.
  iteration = (512 + 4 + 512) + (512 + 256) + (256 + 256) + (8 + 4) + (4 + 4 + 1)
  assert _cost().bytes == 7 * iteration


_START, _ONE, _ADD = '%start = s32[] constant(0)', '%one = s32[] constant(1)', '%next = s32[] add(%i, %one)'
_STATE = 'tuple(%next, %x, %w)'
_COUNT = '''%count (c: s32[]) -> (s32[], s32[]) {
  %c = s32[] parameter(0)
  %by = s32[] constant(1)
  %more = s32[] add(%by, %c)
  ROOT %pair = (s32[], s32[]) tuple(%c, %more)
}

%body (s:'''
_FUSED = '''%both = (s32[], s32[]) fusion(%i), kind=kLoop, calls=%count
  %next = s32[] get-tuple-element(%both), index=INDEX'''
_LIMIT = '%n = s32[] get-tuple-element(%s), index=3'
_LIMIT_IN_STATE = (
    ('%n = s32[] constant(7)', _LIMIT), ('tuple(%start, %x, %w)', 'tuple(%start, %x, %w, %limit)'),
    (_START, f'{_START}\n  %limit = s32[] constant(5)'), (_ONE, f'{_ONE}\n  {_LIMIT}'))


@pytest.mark.parametrize('changes, count', [
    ([('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')], 3),  # XLA writes it
    ([(_START, _START.replace('0)', '2)'))], 5),
    ([('direction=LT', 'direction=NE')], None),
    # The counter must grow by one.
    ([(_ONE, _ONE.replace('1)', '2)'))], None),
    ([(_STATE, 'tuple(%i, %x, %w)')], None),
    ([('add(%i, %one)', 'multiply(%i, %one)')], None),
    # It may grow inside a fusion.
    ([('%body (s:', _COUNT), (_ADD, _FUSED.replace('INDEX', '1'))], 7),
    ([('%body (s:', _COUNT), (_ADD, _FUSED.replace('INDEX', '0'))], None),
    # The limit may be a constant part of the state.
    ([*_LIMIT_IN_STATE, (_STATE, 'tuple(%next, %x, %w, %n)')], 5),
    ([*_LIMIT_IN_STATE, (_STATE, 'tuple(%next, %x, %w, %next)')], None),
])
def test_the_trip_count_is_read_and_a_loop_of_unknown_length_counts_once_and_is_reported(changes, count):
  total = _cost(*changes)
  assert (total.flops, total.unknown_loops) == ((count or 1) * 1024, count is None)


def test_of_two_branches_the_more_expensive_counts():
  more = '''%expensive (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%cheap (q: f32[8,8]) -> f32[8,8] {
  ROOT %q = f32[8,8]{1,0} parameter(0)
}
'''
  total = _entry('f32[8,8]{1,0} conditional(%p0, %p1, %p1), branch_computations={%cheap, %expensive}',
                 'pred[]', 'f32[8,8]{1,0}', more=more)
  assert total.flops == 2 * 8**3


@pytest.mark.parametrize('left, right, result, attributes, flops', [
    # The batch of 8 is a window over gaps; of its 8 · 8 positions 8 are no gap.
    ('8,16,4', '8,4,32', '8,16,32', 'window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf',
     2 * 8 * 16 * 4 * 32),
    # A plain product.
    ('256,512', '512,64', '256,64', 'dim_labels=bf_io->bf', 2 * 256 * 512 * 64),
    # Three taps over five positions, one of padding at each end: 5 · 3 - 2 products per channel pair.
    ('1,5,2', '3,2,6', '1,5,6', 'window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f', 2 * 13 * 2 * 6),
])
def test_a_convolution_counts_without_padding_and_gaps(left, right, result, attributes, flops):
  total = _entry(f'bf16[{result}] convolution(%p0, %p1), {attributes}', f'bf16[{left}]', f'bf16[{right}]')
  assert total.flops == flops
  assert total.bytes == 2 * sum(math.prod(map(int, shape.split(','))) for shape in (left, right, result))


@pytest.mark.parametrize('groups, size', [
    ('{{0,1,2,3},{4,5,6,7}}', 4), ('[2,4]<=[8]', 4), ('[4,2]<=[2,4]T(1,0)', 2), ('{}', 8),
    ("mesh['a'=2,'b'=4] {'b'}", 4), ("mesh['a'=2,'b'=4] {'a','b'}", 8)])
def test_the_group_size_is_read_in_every_notation(groups, size):
  total = _entry(f'f32[100]{{0}} all-reduce(%p0), channel_id=1, replica_groups={groups}, to_apply=%add', 'f32[100]{0}')
  assert total.sent['all-reduce'] == pytest.approx(2 * 400 * (size - 1) / size)


@pytest.mark.parametrize('notation, groups', [
    ('{{0,2},{1,3}}', [(0, 2), (1, 3)]), ('[2,2]<=[4]', [(0, 1), (2, 3)]), ('[2,2]<=[2,2]T(1,0)', [(0, 2), (1, 3)]),
    ("mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]), ("mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]), ('{}', [(0, 1, 2, 3)])])
def test_the_device_groups_are_read_in_every_notation(notation, groups):
  module = hlo.parse(f'''HloModule one, num_partitions=4
ENTRY %main () -> f32[] {{
  %x = f32[100]{{0}} parameter(0)
  ROOT %y = f32[100]{{0}} all-reduce(%x), channel_id=1, replica_groups={notation}, to_apply=%add
}}
''')
  assert hlo.groups(module['main'].ops['y'], module.devices) == groups


@pytest.mark.parametrize('opcode, result, payload, sent', [
    # 400 bytes on each of four devices.
    ('all-gather', '400', 1600, 1200), ('reduce-scatter', '25', 400, 300), ('all-to-all', '100', 400, 300),
    ('all-reduce', '100', 400, 600)])
def test_bytes_of_collectives_by_hand(opcode, result, payload, sent):
  total = _entry(f'f32[{result}]{{0}} {opcode}(%p0), replica_groups=[2,4]<=[8], dimensions={{0}}', 'f32[100]{0}')
  assert (total.calls[opcode], total.payload[opcode], total.sent[opcode]) == (1, payload, sent)


def test_an_asynchronous_collective_counts_where_it_starts():
  start = '  %s = (f32[100]{0}, f32[400]{0}) all-gather-start(%p0), replica_groups=[2,4]<=[8], dimensions={0}\n'
  total = _entry('f32[400]{0} all-gather-done(%s)', 'f32[100]{0}', lines=start)
  assert (total.calls, total.payload) == ({'all-gather': 1}, {'all-gather': 1600})
  assert total.bytes == 400 + 1600


def test_a_kernel_counts_its_cost_estimate_and_one_without_is_reported():
  def kernel(result: str, estimate: str = '') -> tuple[float, int]:
    config = f'{{"custom_call_config":{{"body":"…"{estimate}}}}}'
    attributes = f'custom_call_target="tpu_custom_call", backend_config={config}'
    total = _entry(f'{result} custom-call(%p0), {attributes}', 'f32[8]')
    return total.flops, total.unknown_kernels
  assert kernel('f32[8]', ',"cost_estimate":{"flops":"1200","bytes_accessed":"64"}') == (1200, 0)
  assert kernel('f32[8]') == (0, 1)
  assert kernel('(s32[9]{0}, s32[1]{0})') == (0, 0)


@pytest.mark.parametrize('part, results, products', [
    ('fwd', 'bf16[2,3,256,8]', 2), ('dq', '(bf16[256,8], bf16[2,3,256,8])', 3),
    ('dkv', '(bf16[2,3,384,8], bf16[2,3,384,8])', 4),
    ('dkv', '(bf16[2,1,3,256,8], bf16[2,3,384,8], bf16[2,3,384,8])', 5)])  # with the gradient of queries
def test_splash_attention_counts_its_products(part, results, products):
  # As libtpu prints it: first two arrays of block numbers, then queries, keys and values; metadata has line breaks.
  shapes = 's8[1,1,1]', 's8[1,1,1]', 'bf16[2,3,256,8]', 'bf16[2,3,384,8]', 'bf16[2,3,384,8]', 's32[8,384]'
  operands = ', '.join(f'%p{i}' for i in range(len(shapes)))
  name = f'splash_mha_{part}_segmented_no_residuals'
  total = _entry(
      f'{results} custom-call({operands}), custom_call_target="tpu_custom_call", frontend_attributes={{'
      'kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 256}"\n}}, metadata={op_name="jit(step)/vmap(static)/'
      f'{name}/{name}/pallas_call"}}, backend_config={{"custom_call_config":{{"body":"…"}}}}', *shapes)
  assert total.flops == products * 2 * (2 * 3) * 256 * 384 * 8
  assert total.unknown_kernels == 0
  assert total.bytes > 2 * 2 * 2 * 3 * 384 * 8  # keys and values


def test_a_fusion_that_updates_a_slice_moves_the_slice():
  more = '''%update (array: f32[7,8], part: f32[1,8], i: s32[]) -> f32[7,8] {
  %array = f32[7,8]{1,0} parameter(0)
  %part = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[7,8]{1,0} dynamic-update-slice(%array, %part, %i, %zero)
}
'''
  total = _entry('f32[7,8]{1,0} fusion(%p0, %p1, %p2), kind=kLoop, calls=%update', 'f32[7,8]{1,0}', 'f32[1,8]{1,0}',
                 's32[]', more=more)
  assert total.bytes == 32 + 4 + 32  # part and index in, part out; the rest stays in memory


@pytest.mark.parametrize('used, moved', [
    ('%sum = f32[8] add(%part, %part)', 32),  # the slice alone
    ('%sum = f32[8] add(%part, %part)\n  %all = f32[7,8]{1,0} negate(%array)', 7 * 32)])
def test_a_slice_within_a_fusion_of_a_fusion_moves_the_slice(used, moved):
  more = f'''%slice (a: f32[7,8], i: s32[]) -> f32[8] {{
  %a = f32[7,8]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8]{{1,0}} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={{1,8}}
  ROOT %flat = f32[8] bitcast(%row)
}}

%double (array: f32[7,8], i: s32[]) -> f32[8] {{
  %array = f32[7,8]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %view = f32[7,8]{{1,0}} bitcast(%array)
  %part = f32[8] fusion(%view, %i), kind=kLoop, calls=%slice
  {used}
  ROOT %out = f32[8] copy(%sum)
}}
'''
  total = _entry('f32[8] fusion(%p0, %p1), kind=kOutput, calls=%double', 'f32[7,8]{1,0}', 's32[]', more=more)
  assert total.bytes == moved + 4 + 32  # and the index; the result


def test_a_collective_that_overlaps_with_products_counts_once():
  """It occurs in three fusions (start, overlap, end) with one channel."""
  def fused(name, channel):
    gather = f'all-gather(%p), channel_id={channel}, replica_groups=[2,4]<=[8], dimensions={{0}}'
    return f'%{name} (p: f32[8]) -> f32[32] {{\n  %p = f32[8] parameter(0)\n  ROOT %g = f32[32] {gather}\n}}\n'
  more = fused('start', 3) + fused('during', 3) + fused('end', 3) + fused('other', 4)
  overlap = ''.join(f'  %{n}1 = f32[32] fusion(%p0), kind=kCustom, calls=%{n}\n' for n in ('start', 'during', 'end'))
  total = _entry('f32[32] fusion(%p0), kind=kCustom, calls=%other', 'f32[8]', more=more, lines=overlap)
  assert total.calls == {'all-gather': 2}
  assert total.payload == {'all-gather': 2 * 32 * 4}


def test_a_buffer_that_passes_through_a_fusion_does_not_move():
  # The first fusion starts to gather, the second does its own work meanwhile and returns both buffers as they are.
  gather = 'all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}'
  more = f'''%start (p: f32[8]) -> (f32[8], f32[64]) {{
  %p = f32[8] parameter(0)
  %g = f32[64] {gather}
  ROOT %out = (f32[8], f32[64]) tuple(%p, %g)
}}

%during (p: f32[8], gathered: f32[64], x: f32[16]) -> (f32[16], f32[8], f32[64]) {{
  %p = f32[8] parameter(0)
  %gathered = f32[64] parameter(1)
  %x = f32[16] parameter(2)
  %y = f32[16] negate(%x)
  %g = f32[64] {gather}
  ROOT %out = (f32[16], f32[8], f32[64]) tuple(%y, %p, %g)
}}
'''
  lines = '''  %begun = (f32[8], f32[64]) fusion(%p0), kind=kCustom, calls=%start
  %part = f32[8] get-tuple-element(%begun), index=0
  %whole = f32[64] get-tuple-element(%begun), index=1
'''
  total = _entry('(f32[16], f32[8], f32[64]) fusion(%part, %whole, %p1), kind=kOutput, calls=%during', 'f32[8]',
                 'f32[16]', more=more, lines=lines)
  assert total.bytes == 4 * (8 + 64) + 4 * (16 + 16)  # of the collective, once, and of the second fusion's own work


def test_traffic_is_listed_by_place_in_the_model_pass_and_array():
  names = {'forward': 'jvp(Model.encode)/encoder/while/body/closed_call/blocks/block1/mlp/dot_general',
           'backward': 'transpose(jvp(Model.encode))/encoder/while/body/closed_call/checkpoint/blocks/block1/mlp/mul',
           'recomputed': 'transpose(jvp(Model.encode))/encoder/checkpoint/rematted_computation/block1/block1._add/add'}
  lines = ''.join(f'  %{which} = f32[4,16] negate(%p0), metadata={{op_name="jit(step)/{name}" stack_frame_id=1}}\n'
                  for which, name in names.items())
  total = _entry('f32[4,16] copy(%forward)', 'f32[4,16]', lines=lines)
  assert total.moved == {
      'encoder/blocks/block1/mlp/dot_general, forward, f32[4,16]': 512,
      'encoder/blocks/block1/mlp/mul, backward, f32[4,16]': 512,
      'encoder/block1/add, recomputed, f32[4,16]': 512, 'copy, f32[4,16]': 512}
  assert total.bytes == 4 * 512


def test_the_traffic_of_a_loop_body_is_listed_as_often_as_the_loop_runs():
  total = _cost()
  assert total.moved['all-reduce, f32[4,16]'] == 7 * 2 * 256
  assert sum(total.moved.values()) == total.bytes


# A third of an array is copied to faster memory, as libtpu writes it before and after code generation.
_PLANNED = '''HloModule sliced, is_scheduled=true

%taken (p: f32[8,3,4]) -> f32[8,1,4] {
  %p = f32[8,3,4]{2,1,0:T(8,128)} parameter(0)
  ROOT %slice = f32[8,1,4]{2,1,0:T(8,128)S(1)} slice(%p), slice={[0:8], [1:2], [0:4]}
}

ENTRY %main (x: f32[8,3,4]) -> f32[8,1,4] {
  %x = f32[8,3,4]{2,1,0:T(8,128)} parameter(0)
  %start = ((f32[8,3,4]{2,1,0:T(8,128)}), f32[8,1,4]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) START
  ROOT %done = f32[8,1,4]{2,1,0:T(8,128)S(1)} DONE
}
'''


@pytest.mark.parametrize('start, done', [
    ('async-start(%x), calls=%taken', 'async-done(%start)'),
    ('slice-start(%x), slice={[0:8], [1:2], [0:4]}', 'slice-done(%start)')])
def test_a_slice_copied_to_fast_memory_is_only_read_and_one_in_main_memory_is_read_and_written(start, done):
  text = _PLANNED.replace('START', start).replace('DONE', done)
  assert cost.of_module(hlo.parse(text)).bytes == 8 * 4 * 4
  assert cost.of_module(hlo.parse(text.replace('S(1)', ''))).bytes == 2 * 8 * 4 * 4


@pytest.mark.parametrize('dtype, precision, passes', [
    ('f32', 'highest', 6), ('f32', 'high', 3), ('f32', 'default', 1), ('f32', '', 1), ('bf16', 'highest', 1)])
def test_a_full_float32_product_is_six_of_the_multiplier(dtype, precision, passes):
  attribute = precision and f', operand_precision={{{precision},{precision}}}'
  shapes = (f'{dtype}[4,8]{{1,0}}', f'{dtype}[8,16]{{1,0}}')
  for product in ('dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
                  'convolution(%p0, %p1), dim_labels=bf_io->bf'):
    total = _entry(f'f32[4,16]{{1,0}} {product}{attribute}', *shapes)
    assert (total.flops, total.bfloat16_flops) == (1024, passes * 1024)


def test_a_roofline_is_the_longest_of_three_times():
  chip = Chip(memory=1, flops=100, hbm=10, links=2, source='')
  work = cost.Cost(flops=200, bfloat16_flops=300, bytes=50, sent={'all-reduce': 4, 'all-gather': 8})
  limit = cost.roofline(work, chip)
  assert limit == cost.Roofline(compute=3, memory=5, interconnect=6)
  assert (limit.seconds, limit.bound) == (6, 'interconnect')
  assert cost.roofline(work, Chip(None, None, None, None, '')) is None
