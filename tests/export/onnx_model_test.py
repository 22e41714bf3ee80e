"""The search of captions on the host, by hand. tests/export/onnx_programs_test.py compares it with the program."""

import math
import pathlib
import types

import numpy as np
import pytest

from tests.helpers import shipped

# Words 1 and 2; 0 ends. Probabilities of the next word by the words so far; the second image swaps the words.
_NEXT = {(): (.1, .5, .4), (1,): (.1, .5, .4), (2,): (.9, .05, .05), (1, 1): (.2, .4, .4), (2, 0): (.05, .9, .05)}
_SWAP = (0, 2, 1)


def _model(**onnxruntime):
  """A model whose cache is the image and the words so far, along the second axis of its only array."""
  class Model(shipped.onnx_model(**onnxruntime).Model):
    def run(self, task, program, **x):
      if program == 'prefill':
        return {'cache': [np.stack([x['pixels'], *np.zeros((3, len(x['pixels'])))])]}
      state, rows = x['cache'][0].copy(), []
      if x['t'] > 0:
        state[x['t']] = x['word']
      for image, *words in state[:x['t'] + 1].T.astype(int).tolist():
        p = _NEXT.get(tuple(_SWAP[w] if image else w for w in words), (1 / 3,) * 3)
        rows.append([p[_SWAP[w]] if image else p[w] for w in range(3)])
      return {'log_p': np.log(np.array(rows, np.float32)), 'cache': [state]}

  return Model()


# Two hypotheses: 1 (.5) and 2 (.4); then 2, which ends (.36), comes before 1 1 (.25). Then 1 1 1 and 1 1 2 have .1: the
# lower word counts. The hypothesis that ended stays at no cost. Scores are divided by (words + 1)^penalty.
@pytest.mark.parametrize('penalty, tokens, score', [
    (0, [[2, 0, 0], [1, 0, 0]], math.log(.36)), (2, [[1, 1, 1], [2, 2, 1]], math.log(.1) / 4**2)])
def test_two_hypotheses_by_hand(penalty, tokens, score):
  model = _model()
  entry = {'beam_size': 2, 'length_penalty': penalty, 'max_len': 3,
           'programs': {'step': {'onnx': {'cache_axes': [1]}}}}
  model.manifest = {'tokenizer': {'eot': 0}, 'tasks': {'caption': entry}}
  captions = model._search('caption', np.array([0, 1]))
  assert captions['tokens'].tolist() == tokens and captions['tokens'].dtype == np.int32
  np.testing.assert_allclose(captions['score'], score, rtol=1e-6)


@pytest.mark.parametrize('empty', ['pixels', 'position', 'cache_0'])
def test_an_empty_input_is_an_error_and_does_not_reach_onnxruntime(empty):
  model = _model()
  names = ('pixels', 'position', 'cache_0')
  session = types.SimpleNamespace(get_inputs=lambda: [types.SimpleNamespace(name=x) for x in names],
                                  run=lambda _, given: [sum(x.sum() for x in given.values())])
  model._programs = {'a.onnx': session}
  entry = {'onnx': {'file': 'a.onnx', 'outputs': ['log_p']}}
  given = {name: np.ones((0 if name == empty else 2, 3)) for name in names}
  inputs = lambda arrays: {**{name: arrays[name] for name in names[:2]}, 'cache': (arrays['cache_0'],)}
  with pytest.raises(ValueError, match=f'^{empty} of a.onnx is empty; give a batch of at least one'):
    model._call(entry, inputs(given))
  assert model._call(entry, inputs(dict.fromkeys(names, np.ones((2, 3))))) == {'log_p': 18}


@pytest.mark.parametrize('available, default', [
    (['CoreMLExecutionProvider', 'CPUExecutionProvider'], [('CPUExecutionProvider', {})]),
    (['TensorrtExecutionProvider', 'CUDAExecutionProvider', 'CPUExecutionProvider'],
     [('CUDAExecutionProvider', {'use_tf32': '0'}), ('CPUExecutionProvider', {})])])
@pytest.mark.parametrize('chosen', [None, ['CoreMLExecutionProvider']])
def test_only_providers_of_full_float32_are_used_unless_others_are_set(available, default, chosen):
  session, used = types.SimpleNamespace(get_inputs=lambda: [], run=lambda *_: [1]), []
  model = _model(get_available_providers=lambda: available, SessionOptions=types.SimpleNamespace,
                 InferenceSession=lambda *_, providers: used.append(providers) or session)
  model._programs, model.folder = {}, pathlib.Path()
  if chosen:
    model.providers = chosen
  model._call({'onnx': {'file': 'a.onnx', 'outputs': ['log_p']}}, {})
  assert used == [chosen or default]
