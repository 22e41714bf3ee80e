"""Attention kernels equal XLA's attention, in interpret mode and by what they lower to; which kernel serves when."""

import functools
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from tests.helpers import small_model
from tests.helpers.attention import arrays, with_gradients
from uni_moe_jax.kernels import attention
from uni_moe_jax.parallel import sharding
from uni_moe_jax.utils.errors import UsageError

_WITH_PADDING = (130, 100)  # valid keys of each example, of 130


def _valid(lengths, keys: int) -> jax.Array:
  return jnp.arange(keys)[None] < jnp.asarray(lengths)[:, None]


def _xla(q, k, v, valid):
  return attention.attend(q, k, v, valid, 'xla', None)


def _splash(q, k, v, valid, mesh=None):
  return attention.attend(q, k, v, valid, 'splash', mesh)


def _compare(queries, keys, lengths=None, dtype=jnp.float32, tolerance=1e-5):
  operands, valid = arrays(queries, keys, dtype), None if lengths is None else _valid(lengths, keys)
  results = [with_gradients(f)(*operands, valid) for f in (_splash, _xla)]
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), *results, strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()), err_msg=name)
    assert float(jnp.abs(b).max()) > .1
  return results[0]


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize('lengths', [None, _WITH_PADDING])
def test_splash_equals_xla(lengths, dtype, tolerance):
  _compare(130, 130, lengths, dtype, tolerance)


def test_blocks_of_keys_add_up():
  # Three blocks of 128 keys, the last one padded, and two of queries; gradients of queries come from a kernel of their
  # own then.
  with mock.patch.multiple(attention, _QUERY_BYTES=512, _KEYS=128):
    jax.clear_caches()
    _compare(140, 300, (300, 129))
  jax.clear_caches()


def test_padded_keys_have_no_gradient_and_no_influence():
  _, _, dk, dv = _compare(130, 130, _WITH_PADDING)
  for gradient in (dk, dv):
    assert not gradient[1, 100:].any() and gradient[0, 100:].any()
  q, k, v, dy = arrays(130, 130)
  other = v.at[1, 100:].add(1.)
  same, padded = (with_gradients(_splash)(q, k, x, dy, _valid(_WITH_PADDING, 130))[0] for x in (v, other))
  np.testing.assert_array_equal(same, padded)
  assert (with_gradients(_splash)(q, k, other, dy, _valid((130, 130), 130))[0] != same)[1].any()


def test_an_example_without_valid_keys_has_finite_results():
  results = with_gradients(_splash)(*arrays(130, 130), _valid((130, 0), 130))
  assert all(np.isfinite(x).all() for x in results)


@pytest.mark.parametrize('lengths', [None, (131, 100), (131, 0)])
def test_cudnn_gets_the_arrays_of_xla(lengths):
  # What cuDNN computes is not tested here: XLA computes it, from the same even lengths and numbers of keys.
  original = jax.nn.dot_product_attention

  def dot_product(q, k, v, *, implementation, **options):
    assert implementation == 'cudnn' and not q.shape[1] % 2 and not k.shape[1] % 2
    return original(q, k, v, **options)

  operands = arrays(129, 131)
  valid = None if lengths is None else _valid(lengths, 131)
  expected = with_gradients(_xla)(*operands, valid)
  with mock.patch.object(jax.nn, 'dot_product_attention', dot_product):
    results = with_gradients(lambda *args: attention.attend(*args, 'cudnn', None))(*operands, valid)
  rows = slice(None) if lengths is None or all(lengths) else slice(1)  # an example without keys is padding
  for a, b in zip(results, expected, strict=True):
    np.testing.assert_allclose(a[rows], b[rows], atol=1e-5)
    assert np.isfinite(a).all()


def test_cudnn_gets_one_key_of_an_example_without_any():
  # Of none, its softmax would be 0 / 0.
  with mock.patch.object(jax.nn, 'dot_product_attention', return_value=jnp.zeros((2, 130, 2, 8))) as dot_product:
    attention.attend(*arrays(129, 131)[:3], _valid((131, 0), 131), 'cudnn', None)
  assert dot_product.call_args.kwargs['key_value_seq_lengths'].tolist() == [131, 1]


def test_devices_of_a_mesh_attend_to_their_own_examples_and_heads():
  mesh = sharding.make_mesh(dict(replica=1, data=2, expert=2, model=2))
  operands, valid = arrays(130, 130, batch=3), _valid((130, 100, 7), 130)  # three examples on four shards
  on_mesh = with_gradients(functools.partial(_splash, mesh=mesh))(*operands, valid)
  for a, b in zip(on_mesh, with_gradients(_xla)(*operands, valid), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def _question():
  """About two images, one with padding."""
  question = small_model.sequence('vqa')
  return question.replace(text_valid=question.text_valid.at[0, -1].set(False))


@pytest.mark.parametrize('kernel, sequence', [
    ('splash', _question()), ('short', small_model.sequence('image_caption'))])
def test_a_model_with_a_kernel_equals_one_with_xla(kernel, sequence):
  features = [small_model.run(small_model.spec(num_layers=2, attention_impl=implementation), [sequence])[0]
              for implementation in (kernel, 'xla')]
  np.testing.assert_allclose(*(x[0] for x in features), atol=1e-5)


def _calls(implementation, sequence) -> list:
  """Calls of `attend` by a model of two layers, of which the last reads one token."""
  spec = small_model.spec(num_layers=2, attention_impl=implementation)
  small_model.params(spec)  # which traces the model, too
  with mock.patch.object(attention, 'attend', side_effect=lambda q, *_: q) as attend:
    jax.eval_shape(lambda s: small_model.encode(spec, [s]), sequence)
  return attend.call_args_list


def _served(sequence) -> set[tuple[int, int]]:
  """(queries, keys) that kernels serve in a model of two layers."""
  return {(call.args[0].shape[1], call.args[1].shape[1]) for call in _calls('splash', sequence)}


def test_kernels_serve_queries_that_see_the_same_keys():
  # Five tokens of the image and three of the question see all eight; the last layer reads one.
  assert _served(_question()) == {(5, 8), (3, 8), (1, 8)}
  assert _served(small_model.sequence('image_caption')) == {(5, 5)}  # of the image: words see those before them


def test_the_kernel_for_short_sequences_serves_segments_that_attend_within_themselves_alone():
  # The first layer alone: the last one reads one token.
  served = lambda name: {call.args[0].shape[1] for call in _calls('short', small_model.sequence(name))
                         if call.args[4] == 'short'}
  assert served('image_classification') == {5}
  assert served('image_caption') == {5}  # the image; words see it as well
  assert not served('vqa')  # image and question see each other


# Which implementation serves.
_A100, _V100 = (types.SimpleNamespace(platform='gpu', compute_capability=c) for c in ('8.0', '7.0'))
_AMD = types.SimpleNamespace(platform='gpu', compute_capability='gfx90a')
_TPU, _CPU = (types.SimpleNamespace(platform=p) for p in ('tpu', 'cpu'))


def _choice(device, queries=1569, keys=1569, head=64, dtype=jnp.bfloat16, trails=True, implementation='auto',
            heads=12, within=False):
  q, k = (jax.ShapeDtypeStruct((2, n, heads, head), dtype) for n in (queries, keys))
  mesh = types.SimpleNamespace(devices=np.array([device]))
  return attention.choose(implementation, q, k, mesh, padding_trails=trails, within=within)


@pytest.mark.parametrize('expected, device, options', [
    ('splash', _TPU, {}), ('splash', _TPU, {'dtype': jnp.float32}), ('splash', _TPU, {'trails': False}),
    ('xla', _TPU, {'head': 256}), ('xla', _TPU, {'queries': 1}), ('xla', _TPU, {'queries': 197, 'keys': 197}),
    ('cudnn', _A100, {}), ('cudnn', _A100, {'queries': 197, 'keys': 197}), ('cudnn', _A100, {'head': 128}),
    ('xla', _A100, {'queries': 1}), ('xla', _A100, {'dtype': jnp.float32}), ('xla', _A100, {'trails': False}),
    ('xla', _A100, {'head': 256}), ('xla', _A100, {'head': 20}), ('xla', _V100, {}), ('xla', _AMD, {}),
    ('xla', _CPU, {}), ('xla', _TPU, {'implementation': 'xla'}),
    ('splash', _CPU, {'implementation': 'splash', 'queries': 1}),
    ('cudnn', _V100, {'implementation': 'cudnn'}), ('xla', _A100, {'implementation': 'cudnn', 'trails': False})])
def test_the_implementation_follows_from_device_type_and_length(expected, device, options):
  assert _choice(device, **options) == expected


@pytest.mark.parametrize('expected, device, options', [
    ('short', _TPU, {}), ('xla', _CPU, {}), ('xla', _TPU, {'within': False}), ('xla', _TPU, {'tokens': 33}),
    ('splash', _TPU, {'tokens': 512}), ('xla', _TPU, {'dtype': jnp.float32}), ('xla', _TPU, {'head': 96}),
    ('xla', _TPU, {'implementation': 'xla'}), ('splash', _TPU, {'implementation': 'splash'}),
    ('short', _CPU, {'implementation': 'short', 'tokens': 5}),
    ('xla', _CPU, {'implementation': 'short', 'within': False}), ('cudnn', _A100, {})])
def test_short_sequences_that_attend_within_themselves_have_a_kernel_on_tpus(expected, device, options):
  tokens = options.pop('tokens', 129)
  assert _choice(device, tokens, tokens, heads=4, **{'within': True, **options}) == expected


def test_cudnn_on_other_devices_is_refused():
  with pytest.raises(UsageError, match="config.model.attention_impl='cudnn' needs NVIDIA GPUs.* type cpu; set it to"):
    _choice(_CPU, implementation='cudnn')


def _lowered(platform, function):
  shapes = [jax.ShapeDtypeStruct((2, 1569, 4, 64), jnp.bfloat16)] * 3
  valid = jax.ShapeDtypeStruct((2, 1569), bool)
  loss = lambda q, k, v, valid: function(q, k, v, valid).astype(jnp.float32).sum()
  return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes, valid).lower(lowering_platforms=(platform,)).as_text()


def _writes_scores(text: str) -> bool:
  return bool(re.search(r'tensor<2x4x1\d{3}x1\d{3}x', text))  # [B, N, Q, K], and with padding


def test_kernels_write_no_scores():
  with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
    on_tpu = _lowered('tpu', _splash)
  assert on_tpu.count('tpu_custom_call') >= 2 and not _writes_scores(on_tpu)
  for mesh in (None, sharding.make_mesh(dict(replica=1, data=2, expert=2, model=2))):
    with mock.patch.object(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000):
      on_gpu = _lowered('cuda', lambda *args, mesh=mesh: attention.attend(*args, 'cudnn', mesh))
    assert '@__cudnn$fmhaSoftmax(' in on_gpu and '@__cudnn$fmhaSoftmaxBackward(' in on_gpu
    assert not _writes_scores(on_gpu)
  assert all(_writes_scores(_lowered(platform, _xla)) for platform in ('tpu', 'cuda'))
