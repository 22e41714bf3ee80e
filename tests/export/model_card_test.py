"""The model card says what the model is, what it was, and how well it does what it is exported for."""

import json
import types

import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.config.plan import Evaluation, TaskSpec
from uni_moe_jax.export import description, merge, model_card
from uni_moe_jax.export.contents import Contents
from uni_moe_jax.export.programs import Asked
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.tasks import task_types

_TOKENIZER = {'kind': 'sentencepiece', 'file': 'tokenizer.model', 'size': 40, 'eot': 3}


def _asked(kind: str) -> Asked:
  return Asked(TaskSpec(
      name=f'my_{kind}', type=task_types.TASK_TYPES[kind], group='', source='', split='', batch_size=1, loss_weight=1.0, sampling_weight=0.0,
      temperature='group', target_set='', label_column='', caption_templates=(), template='', max_len=4, max_predictions=2, label_smoothing=0.0, max_shift=0))


def _manifest(trained: ModelSpec, *kinds: str, left: ModelSpec | None = None, evaluators=(), **tokenizer):
  """Of a model that is exported for some kinds; left: instead of what they leave of it."""
  asked = tuple(map(_asked, kinds))
  if left is None:
    left, _ = merge.merged(trained, small_model.params(trained), tuple(c for a in asked for c in a.conditions))
  contents = Contents(
      left, {'x': np.zeros(7)}, asked, {}, {}, types.SimpleNamespace(), {}, {}, trained=trained, evaluators=tuple(evaluators))
  found = description.manifest(contents, {a.task.name: {} for a in asked}, _TOKENIZER | tokenizer, {'name': 'mine'})
  return json.loads(json.dumps(found))


def _evaluation(name: str, of: str = 'image_caption', **ways) -> Evaluation:
  ways = dict(type='caption', split='train', num_examples=0, batch_size=4, beam_size=1, length_penalty=0.0, constrain_to='') | ways
  return Evaluation(name=name, task=_asked(of).task, **ways)


def _card(*args, rows=(), **kwargs) -> str:
  return model_card.card(_manifest(*args, **kwargs), list(rows), {})


def _row(evaluator: str) -> dict:
  return dict(evaluator=evaluator, metric='exact_match', value=0.625, chance=None, baselines={}, standard_error=0.1, count=24, step=2,
              higher_is_better=True)


def test_experts_of_one_condition_are_merged_into_a_dense_model():
  trained = small_model.spec('attribute', placement='every_2')
  said = _card(trained, 'image_classification')
  assert 'Trained with router attribute, 4 experts, 2 per token, in layers 0, 2 (of 0…2): attention and mlp. Its exp' in said
  assert 'what is left is a plain dense model' in said and 'never' not in said
  found = _manifest(trained, 'image_classification')
  assert found['trained'] == {'dtype': 'float32', 'router': 'attribute', 'layers': [0, 2], 'num_experts': 4, 'top_k': 2,
                              'placement': 'every_2', 'sublayers': ['attention', 'mlp']}
  # A dense model has none of these.
  assert not {'num_experts', 'top_k', 'placement', 'sublayers', 'kernels', 'router_names'} & set(found['model'])
  assert found['model']['router'] == 'dense'


def test_several_conditions_have_several_kernels():
  trained = small_model.spec('modality', sublayers=('mlp',))
  said = _card(trained, 'image_classification', 'text_mlm')
  assert 'Trained with router modality, 4 experts, 2 per token, in all layers: ffn. Its experts are merged for good' in said
  assert 'A projection that had experts has 2 kernels; ' in said
  assert _manifest(trained, 'image_classification', 'text_mlm')['model']['kernels'] == {'visual': 0, 'text': 1}


def test_a_router_that_looks_at_tokens_is_still_there():
  trained = small_model.spec('context')
  said = _card(trained, 'image_classification', left=trained)
  assert 'Trained with router context, 4 experts, 2 per token, in all layers: attention and mlp. Its router (context) looks' in said


@pytest.mark.parametrize('trained', [small_model.spec('dense'), small_model.spec('attribute', placement='none')])
def test_a_model_that_never_had_experts_lost_none(trained):
  said = _card(trained, 'image_classification')
  assert 'A dense model: it never had experts.' in said and 'merged' not in said and 'router' not in said


def test_metrics_are_those_of_the_exported_tasks():
  ask = small_model.spec('dense'), 'image_caption'
  rows = [_row('captions'), _row('classes')]
  said = _card(*ask, rows=rows, evaluators=[_evaluation('captions')])
  assert "Of the trained model at this step, by training's evaluators:" in said
  assert 'captions   exact' in said and 'classes' not in said and 'lets the model' not in said
  assert 'No evaluator asks these tasks.' in _card(*ask, rows=rows)
  assert 'This step was not evaluated.' in _card(*ask, evaluators=[_evaluation('captions')])


def test_what_was_asked_otherwise_in_training_is_said():
  trained = small_model.spec('dense')
  said = _card(trained, 'image_caption', rows=[_row('named'), _row('open'), _row('wide')], evaluators=[
      _evaluation('named', constrain_to='names'), _evaluation('open'), _evaluation('wide', beam_size=4, length_penalty=1.0)])
  assert '`named` lets the model give only captions that are texts of set `names`; these programs give any words.' in said
  assert ('`wide` searches captions with beams 4 and penalty 1.0; `caption` of `my_image_caption` with beams 1 and penalty 0.0.'
          in said)
  assert '`open`' not in said and said.count('`named`') == said.count('`wide`') == 1
  clips = 'video_classification'
  said = _card(trained, clips, rows=[_row('clips'), _row('once')], evaluators=[
      _evaluation('clips', clips, type='classification', num_views=4, num_crops=3), _evaluation('once', clips, type='classification')])
  assert '`clips` averages the probabilities of 4 views × 3 crops of a clip; `classify` is given one.' in said
  assert '`once`' not in said
  fast = small_model.spec('dense', dtype=np.dtype('bfloat16'))
  assert 'with products in bfloat16 (here float32, so that answers may differ)' in _card(
      fast, 'image_caption', left=trained, rows=[_row('named')], evaluators=[_evaluation('named')])


def test_it_asks_for_what_its_texts_need():
  ask = small_model.spec('dense'), 'image_caption'
  assert 'pip install jax flatbuffers sentencepiece\n' in _card(*ask)
  said = _card(*ask, kind='clip', file='tokenizer.txt.gz')
  assert 'pip install jax flatbuffers\n' in said and 'by the merges of `tokenizer.txt.gz`, each text ended by 3.' in said


def test_of_other_platforms_it_says_that_nobody_looked():
  said = _card(small_model.spec('dense'), 'image_caption')
  assert 'is lowered for CPU, NVIDIA GPU and TPU; its answers were compared with those of the trained model on CPU alone' in said


def test_captions_that_are_the_same_token_for_token_are_promised_of_float32_alone():
  exact, fast = (_card(small_model.spec('dense', dtype=np.dtype(t)), 'image_caption') for t in ('float32', 'bfloat16'))
  said = "captions may differ from those of training's evaluator; exported with `--dtype=float32`, they are those of the"
  assert said in fast and said not in exact
