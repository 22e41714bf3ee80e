"""The model card describes the model, its training and its metrics on the exported tasks."""

import json
import types

import numpy as np
import pytest
import yaml

from tests.helpers import small_model
from uni_moe_jax.config.plan import Evaluation
from uni_moe_jax.eval.metrics import Score
from uni_moe_jax.export import description, merge, model_card
from uni_moe_jax.export.contents import Contents
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.model.spec import ModelSpec

_TOKENIZER = {'type': 'sentencepiece', 'file': 'tokenizer.model', 'size': 40, 'eot': 3}


def _exported(task_type: str) -> ExportedTask:
  return ExportedTask(small_model.task_spec(task_type, name=f'my_{task_type}'))


def _manifest(trained: ModelSpec, *names: str, exported: ModelSpec | None = None, evaluators=(), **tokenizer):
  """Manifest of a model exported for some task types; exported: spec instead of that of the merged model."""
  tasks = tuple(map(_exported, names))
  if exported is None:
    exported, _ = merge.merged(trained, small_model.params(trained), tuple(c for t in tasks for c in t.conditions))
  contents = Contents(
      exported, {'x': np.zeros(7)}, tasks, {}, {}, types.SimpleNamespace(), {}, {}, trained=trained,
      evaluators=tuple(evaluators), mixtures={})
  manifest = description.manifest(contents, {t.task.name: {} for t in tasks}, _TOKENIZER | tokenizer, {'name': 'mine'})
  return json.loads(json.dumps(manifest))


def _evaluation(name: str, of: str = 'image_caption', **options) -> Evaluation:
  defaults = dict(
      type='caption', split='train', num_examples=0, batch_size=4, beam_size=1, length_penalty=0.0)
  return Evaluation(name=name, task=_exported(of).task, **defaults | options)


def _card(*args, rows=(), **kwargs) -> str:
  return model_card.card(_manifest(*args, **kwargs), list(rows), {})


def _row(evaluator: str) -> dict:
  return dict(evaluator=evaluator, metric='exact_match', value=0.625, chance=None, baselines={}, standard_error=0.1,
              count=24, step=2, higher_is_better=True)


_DENSE = small_model.spec('dense')
_EVERY_2 = small_model.spec('attribute', placement='every_2')
_MLP = small_model.spec('modality', sublayers=('mlp',))
_CONTEXT = small_model.spec('context')
_PROMISE = "captions may differ from the training evaluator's; with `--dtype=float32`, they equal the float32 trained"


@pytest.mark.parametrize('trained, names, options, parts, absent', [
    (_EVERY_2, ['image_classification'], {},
     ['Trained with router attribute, 4 experts, 2 per token, in layers 0, 2 (of 0…2): attention and mlp. Its exp',
      'the result is a plain dense model'], ['never']),
    (_MLP, ['image_classification', 'text_mlm'], {},
     ['Trained with router modality, 4 experts, 2 per token, in all layers: mlp. Its experts are merged permanently',
      'A projection that had experts has 2 kernels; '], []),
    (_CONTEXT, ['image_classification'], dict(exported=_CONTEXT),
     ['Trained with router context, 4 experts, 2 per token, in all layers: attention and mlp. '
      'Its router (context) routes each token'], []),
    *((spec, ['image_classification'], {}, ['A dense model: it never had experts.'], ['merged', 'router'])
      for spec in (_DENSE, small_model.spec('attribute', placement='none'))),
    (_DENSE, ['image_caption'], {},
     ['pip install jax flatbuffers sentencepiece\n', 'is lowered for CPU, NVIDIA GPU and TPU; its outputs were '
      'compared with the trained model on CPU only'], [_PROMISE]),
    (_DENSE, ['image_caption'], dict(type='clip', file='tokenizer.txt.gz'),
     ['pip install jax flatbuffers\n', 'with the merges of `tokenizer.txt.gz` and end each with id 3.'], []),
    (small_model.spec('dense', dtype=np.dtype('bfloat16')), ['image_caption'], {}, [_PROMISE], []),
], ids=['one condition', 'several', 'by token', 'dense', 'no experts', 'requirements', 'clip', 'bfloat16'])
def test_the_card_describes_experts_requirements_and_precision(trained, names, options, parts, absent):
  card = _card(trained, *names, **options)
  assert [part for part in parts if part not in card] == []
  assert [part for part in absent if part in card] == []


def test_the_manifest_describes_kernels_and_the_trained_model():
  manifest = _manifest(_EVERY_2, 'image_classification')
  assert manifest['trained'] == {'dtype': 'float32', 'router': 'attribute', 'moe_layers': [0, 2], 'num_experts': 4,
                                 'top_k': 2, 'placement': 'every_2', 'sublayers': ['attention', 'mlp']}
  # A dense model has none of these fields.
  assert not {'num_experts', 'top_k', 'placement', 'sublayers', 'kernels', 'router_names'} & set(manifest['model'])
  assert manifest['model']['router'] == 'dense'
  assert _manifest(_MLP, 'image_classification', 'text_mlm')['model']['kernels'] == {'visual': 0, 'text': 1}


def test_metrics_are_those_of_the_exported_tasks():
  model = small_model.spec('dense'), 'image_caption'
  rows = [_row('captions'), _row('classes')]
  card = _card(*model, rows=rows, evaluators=[_evaluation('captions')])
  assert "The trained model's scores at this step, by the evaluators of training:" in card
  assert '| captions | exact_match | ' in card and 'classes' not in card and 'allows only' not in card
  assert 'The run has no evaluator for these tasks.' in _card(*model, rows=rows)
  assert 'This step was not evaluated.' in _card(*model, evaluators=[_evaluation('captions')])


def test_the_table_marks_every_reference():
  rows = [Score.proportion('top-1', .5, 2500, .02, {'majority': .14, 'pixels': .63}).row('a|b', 7),
          Score('perplexity', 63.2, 18000, None, {'unigram': 63.2}).row('words', 7)]
  card = _card(small_model.spec('dense'), 'image_caption', rows=rows,
               evaluators=[_evaluation(r['evaluator']) for r in rows])
  assert '''
| evaluator | metric | value | ± s.e. | examples | chance | baselines |
| --- | --- | --- | --- | --- | --- | --- |
| a\\|b | top-1 | 0.500 | 0.010 | 2,500 | 0.020 + | majority 0.140 +, pixels 0.630 - |
| words | perplexity (lower is better) | 63.2 | — | 18,000 | — | unigram 63.2 = |
''' in card


def test_differences_from_the_evaluators_protocol_are_reported():
  trained = small_model.spec('dense')
  card = _card(trained, 'image_caption', rows=[_row('open'), _row('wide'), _row('best')], evaluators=[
      _evaluation('open'),
      _evaluation('wide', beam_size=4, length_penalty=1.0), _evaluation('short', max_len=3),
      _evaluation('best', rerank_by='pair')])
  assert ('`wide` searches captions with beam size 4 and length penalty 1.0; `caption` of `my_image_caption`, with '
          'beam size 1 and length penalty 0.0.') in card
  assert '`short` stops captions after 3 tokens; `caption` of `my_image_caption`, after ' in card
  assert '`best` reranks captions by task `pair`; these programs do not.' in card
  assert '`open`' not in card and card.count('`wide`') == 1
  published = [_evaluation('split', detokenize=False)]
  card = lambda **options: _card(trained, 'image_caption', rows=[_row('split')], evaluators=published, **options)
  assert '`split` leaves words as the vocabulary splits them' in card(type='clip', file='x') and '`split`' not in card()
  videos = 'video_classification'
  card = _card(trained, videos, rows=[_row('videos'), _row('once')], evaluators=[
      _evaluation('videos', videos, type='classification', num_views=4, num_crops=3),
      _evaluation('once', videos, type='classification')])
  assert '`videos` averages the probabilities of 4 views × 3 crops of a video; `classify` uses one.' in card
  assert '`once`' not in card
  fast = small_model.spec('dense', dtype=np.dtype('bfloat16'))
  assert 'with products in bfloat16 (here float32, so answers may differ)' in _card(
      fast, 'image_caption', exported=trained, rows=[_row('named')], evaluators=[_evaluation('named')])


def test_the_card_begins_with_the_metadata_of_the_hub():
  text = _card(_DENSE, 'image_classification', 'image_caption')
  _, front, rest = text.split('---\n', 2)
  metadata = yaml.safe_load(front)
  assert metadata['library_name'] == 'uni_moe_jax' and metadata['pipeline_tag'] == 'image-to-text'
  assert {'jax', 'mixture-of-experts', 'image-classification', 'image-to-text'} <= set(metadata['tags'])
  assert rest.startswith('\n# mine\n')


def test_weights_are_listed_by_part_the_heaviest_first():
  sizes = {'programs/a': 2_000_000, 'programs/b': 1_500_000, 'params.safetensors': 6_000_000, 'load.py': 9_000,
           'texts.py': 11_000}
  weights = model_card.weights({name: ('', size) for name, size in sizes.items()})
  assert weights == 'params.safetensors 6.00 MB, programs 3.50 MB, others 0.02 MB, total 9.52 MB'
