"""Captions of the published beam search, token for token, with cached keys and values here."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import small_model
from tests.parity import fixtures
from tests.parity.fixtures import Arrays, assert_close
from tests.parity.problem import step_spec, target_sets, task_spec
from uni_moe_jax.model import decoding
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.train.forward import forward

BOUND = 1e-5
_NONE = -999.0  # what the published search calls a candidate that is none


@functools.partial(small_model.jit, static_argnums=(0, 1, 2))
def _searched(spec, task, options, params, pixels, sets):
  set_features = forward(spec, params, {}, sets, {}, None)[0].target_sets
  return decoding.beam_search(
      decoding.Decoder.of(spec.model, params, task.type), pixels, normalize(set_features[task.target_set]),
      temperature=task.temperature, spe=spec.model.spec.spe_id, **dict(options))


@pytest.mark.parametrize('name', fixtures.cases('generation'))
def test_generation(name):
  entry, arrays = fixtures.entry(name), Arrays(name)
  model, task = fixtures.model_of(entry['weights']), task_spec(entry['task_name'])
  specs, sets, _ = target_sets(model, arrays)
  spec = step_spec(model, (task,), specs)
  key, = {k for k in arrays.keys('in.input0.') if k.endswith('.data')}
  frames = arrays[key] if '.video.' in key else arrays[key][:, None]
  attributes = arrays.get(key.replace('.data', '.moe_embedding'))
  if attributes is not None:
    np.testing.assert_array_equal(attributes, np.array([c.bits for c in task.type.conditions], np.float32))
  options = tuple(dict(eot=entry['eos_token_id'], max_len=entry['max_seq_len'], beam_size=entry['beam_size'],
                       length_penalty=entry['len_penalty']).items())
  actual = jax.device_get(_searched(spec, task, options, fixtures.params(model), frames.transpose(0, 1, 3, 4, 2), sets))

  np.testing.assert_array_equal(actual.tokens, arrays['out.tokens_all_beams'])
  np.testing.assert_array_equal(actual.tokens[:, 0], arrays['out.tokens'])
  assert_close(actual.log_p, arrays['out.logp_all_beams'], BOUND, 'log-probabilities')
  assert_close(actual.log_p[:, 0], arrays['out.logp'], BOUND, 'log-probabilities of the best')
  theirs = arrays['out.step_topk_scores']
  ours = np.where(np.isneginf(actual.candidates), _NONE, actual.candidates)
  ended = (actual.tokens == entry['eos_token_id']).any(-1).all()
  steps = len(theirs) if not ended else 1 + (actual.tokens == entry['eos_token_id']).argmax(-1).max()
  assert_close(ours[:steps], theirs[:steps], BOUND, 'candidates')  # ours stops when every caption has ended
  assert not arrays.unread, sorted(arrays.unread)
