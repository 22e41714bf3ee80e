"""Every wrong config ends in one sentence that names field, value, bound and fix; published choices."""

import contextlib
import dataclasses
import re

import pytest

from tests.helpers import small_config
from uni_moe_jax import config
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config import presets, schema
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.config.task_schema import EvaluatorConfig, TargetSetConfig, TaskConfig
from uni_moe_jax.utils.errors import UsageError


def _make_plan(changes):
  c = small_config.config()
  for path, value in changes.items():
    small_config.assign(c, path, value)
  return make_plan(c)


# Field, value, and what follows 'config.FIELD=VALUE ' in the message.
_FIELD_ERRORS = [
    # Model.
    ('model.width', 100, r'must be a multiple of config\.model\.num_heads=8; try 96', {'model.num_heads': 8}),
    ('model.width', 18, r'must be a multiple of 4 .*; try 12', {'model.num_heads': 3}),
    ('model.image_size', 30, r'must be a multiple of config\.model\.patch_size=8; try 24'),
    ('model.patch_size', 12, r"must be a power of two from 2 on with config\.model\.stem='conv'",
     {'model.stem': 'conv'}),
    ('model.width', 4, r"must be at least config\.model\.patch_size=8 with config\.model\.stem='conv'",
     {'model.stem': 'conv', 'model.num_heads': 1}),
    ('model.temperature_init', 0.005, r'must be above 0\.01'),  # 1/τ = 200 would be 100, without a gradient, forever
    ('model.dtype', 'bfloat', r"is unknown; did you mean 'bfloat16' or 'float32'\? choices: bfloat16, float32"),
    ('model.attention_impl', 'cudnn', r"needs config\.model\.dtype='bfloat16', not 'float32'; set it to 'auto'"),
    ('model.attention_impl', 'cudnn', 'needs heads whose size, .* multiple of 8 up to 128, not 4; set it to',
     {'model.dtype': 'bfloat16', 'model.num_heads': 8, 'model.width': 32}),
    ('model.extra_temperature_groups', ('img_cls,video_cls',),
     r"""has a comma in a name; write several names as "\('img_cls', 'video_cls'\)"\."""),
    # Experts.
    ('moe.router', 'atribute',
     r"is unknown; did you mean 'attribute'\? choices: attribute, context, dense, modality, task, token"),
    ('moe.top_k', 9, r'must be in 1…config\.moe\.num_experts=8'),
    ('moe.placement', (0, 4), 'has an index outside 0…3'),
    ('moe.capacity_factor', -.5, 'must be at least 0; 0 is off', {'moe.router': 'token'}),
    ('moe.capacity_factor', 1.25,
     r"needs config\.moe\.router='token' or 'context'; 'attribute' routes no tokens\. Set it to 0"),
    ('moe.experts_per_condition', 4, r"needs config\.moe\.router='token' or 'context'", {'moe.router': 'task'}),
    ('moe.experts_per_condition', 1, r'must be in config\.moe\.top_k=2…config\.moe\.num_experts=8, or 0',
     {'moe.router': 'token'}),
    # Tokenizer.
    ('tokenizer.merges_path', '', r"must be a path when config\.tokenizer\.type='clip'; give that of CLIP's",
     {'tokenizer.type': 'clip'}),
    # Training.
    ('train.negatives', 'globl', "is unknown; did you mean 'global'"),
    ('train.negatives', 2.5, 'must be a string or a whole number'),
    ('train.best_metric', 'loss/shap', "is unknown; did you mean 'loss/shape'"),
    ('train.checkpoint_every', 200, r'must be a multiple of config\.train\.log_every=30; try 180',
     {'train.best_metric': 'loss/total', 'train.log_every': 30}),
    ('train.grad_accum_steps', 2, r"needs config\.train\.mixture='all_tasks', not 'one_task'",
     {'train.mixture': 'one_task'}),
    ('optim.unused_params', 'zerograd', r"needs config\.optim\.name='adamw', not 'muon'", {'optim.name': 'muon'}),
    ('optim.decay_steps', 9, ": the schedule 'constant' has no end; set it to 0", {'optim.schedule': 'constant'}),
    ('optim.decay_steps', 9, r'must be at least config\.train\.steps=1000, or 0: the published cosine rises again',
     {'optim.schedule': 'published'}),
    ('mesh.data', 0, 'must be at least 1, or -1'),
    # Target sets.
    ('target_sets.classes.family', 'name', r"is unknown; did you mean 'names'"),
    ('target_sets.vocabulary.label_prompts', True, 'is for sets of texts: .*set it to False'),
    ('target_sets.classes.label_prompts', True, ': no trained task uses this set, .*stay zero; train a task',
     {'tasks.shape.batch_size': 0, 'tasks.shape.temperature': 'text_mlm'}),
    # Tasks.
    ('tasks.shape.type', 'image_clasification', "is unknown; did you mean 'image_classification'"),
    ('tasks.shape.batch_size', -2, r'must be a positive multiple of config\.train\.grad_accum_steps=1; try 1'),
    ('tasks.name.batch_size', 4, r'must be a positive multiple of config\.train\.grad_accum_steps=3; try 3',
     {'train.grad_accum_steps': 3}),
    ('tasks.pair.batch_size', 6, r'must be a multiple of config\.train\.negatives=4 times .*grad_accum_steps=1; try 4',
     {'train.negatives': 4}),
    ('tasks.pair.linear_head', True, 'needs a task type that chooses'),
    ('tasks.shape.target_set', 'clases',
     r"is unknown; did you mean 'classes'\? choices: classes, packages, vocabulary"),
    ('tasks.pair.target_set', 'classes', ": task type 'image_retrieval' is matched with its own texts; set it to ''"),
    ('tasks.shape.target_set', 'packages',
     "is of family 'words', but task type 'image_classification' chooses among 'names'"),
    ('tasks.text.target_set', 'packages',
     ": task type 'text_mlm' predicts words; its set must have entries='vocabulary'"),
    ('tasks.text.max_len', 1, 'must be at least 2 tokens'),
    ('tasks.text.max_len', 33, r'is above config\.model\.max_text_len=32'),
    ('tasks.text.max_predictions', 17, 'must be in 1…max_len=16'),
    ('tasks.package.template', '{text} <eot>', "must contain exactly one '<spe>' slot"),
    ('tasks.shape.shots', 3, 'needs a label_column', {'tasks.shape.label_column': ''}),
    ('tasks.shape.num_frames', 9, r'is above config\.model\.max_num_frames=8'),
    ('tasks.shape.frame_stride', 32.0, r'needs config\.tasks\.shape\.num_frames > 0; set it to 0'),
    ('tasks.shape.mirrored_words', (('left', 'right'),), r'needs config\.tasks\.shape\.random_flip=True'),
    ('tasks.shape.mirrored_words', (('left',),), r"must contain pairs of words, for example \(\('left', 'right'\),\)",
     {'tasks.shape.random_flip': True}),
    ('tasks.pair.single_answer', True, "is for task types with answers; 'image_retrieval' has none. Set it to False"),
    ('tasks.shape.min_crop_area', 0.5, r"needs config\.tasks\.shape\.crop='random_resized_crop', not 'resize_crop'"),
    ('tasks.shape.randaugment', 9.0,
     r"is for your own data and TFDS \('own:NAME', 'tfds:NAME'\), and 'glyphs' is embedded\. Set it to 0\.0"),
    ('tasks.text.random_flip', True, r"is for images and videos; task type 'text_mlm' has none\. Set it to False",
     {'tasks.text.source': 'own:book'}),
    ('tasks.package.temperature', 'text_classification', ': no trained task has this group',
     {'tasks.package.batch_size': 0}),
    # Target families of the config.
    ('target_families.answers', (1, 1), r'must be four bits: .*for example \(1, 0, 0, 1\)'),
    # The seed: JAX's keys have 32 bits, 2**32 + 1 would be 1.
    ('seed', 2**32 + 1, r'must be in \[0, 4294967295\]'),
]


@pytest.mark.parametrize('case', _FIELD_ERRORS, ids=lambda case: f'{case[0]}={case[1]}')
def test_a_wrong_field_is_named_with_value_bound_and_fix(case):
  field, value, message, *others = case
  space = '' if message.startswith(':') else ' '
  with pytest.raises(UsageError, match=rf'config\.{re.escape(field)}={re.escape(repr(value))}{space}{message}'):
    _make_plan({**(others[0] if others else {}), field: value})


def _outside(f):
  """Values of a field that its bounds and choices exclude."""
  m = f.metadata
  values = [m[b] - 1 for b in ('at_least',) if m[b] is not None] + [m[b] + 1 for b in ('at_most',) if m[b] is not None]
  values += [m[b] for b in ('above', 'below') if m[b] is not None]
  number = float if isinstance(f.default, float) else int
  return [*map(number, values), *(['no such choice'] if m['choices'] else [])]


def test_every_bound_and_every_choice_is_checked():
  sections = {s.name: s.type for s in dataclasses.fields(schema.Config) if dataclasses.is_dataclass(s.type)}
  sections |= {'tasks.shape': TaskConfig, 'target_sets.classes': TargetSetConfig, 'evaluators.top': EvaluatorConfig}
  number = 0
  for section, cls in sections.items():
    for f in dataclasses.fields(cls):
      for value in () if isinstance(f.default, tuple) or 'entry' in f.metadata else _outside(f):
        changes = {'evaluators.top': _evaluator('mlm', 'text'), f'{section}.{f.name}': value}
        with pytest.raises(UsageError, match=rf'config\.{section}\.{f.name}={value!r} (must be|is unknown)'):
          _make_plan(changes)
        number += 1
  assert number > 80


_TAG = dict(inputs=(('visual', 'full'),), target='words', readout='cls', router_task='tag')


def _evaluator(*args, split='test', **values):
  return config.evaluator(*args, split=split, **values)


_VALIDATION = _evaluator('mlm', 'text', split='validation', during_training=True)


@pytest.mark.parametrize('changes, message', [
    ({}, None),
    ({'train.best_metric': 'eval/top/accuracy', 'evaluators.top': _VALIDATION, 'train.evaluate_every': 100}, None),
    ({'model.channels': 1}, r'config\.model\.pixel_mean has 3 values for config\.model\.channels=1'),
    ({'model.video_mean': (.5,) * 3, 'model.video_std': (.5, .5)},
     r'config\.model\.video_std has 2 values for .*channels=3'),
    ({'model.video_mean': (.1, .2, .3), 'model.video_std': (.4, .5, .6)}, None),
    ({'model.pixel_std': (.5, 0., .5)}, r'config\.model\.pixel_std\[1\]=0\.0 must be above 0'),
    ({'moe.sublayers': ('atention',)}, r"config\.moe\.sublayers\[0\]='atention' is unknown; did you mean 'attention'"),
    ({'optim.param_groups': (('.*', 1.0),)},
     r"config\.optim\.param_groups: \('\.\*', 1\.0\) is neither \(pattern, lr factor, weight decay\) nor \(pattern, "
     r"'freeze'\)"),
    ({'optim.param_groups': (('(', 1.0, 0.0),)},
     r"config\.optim\.param_groups\[0\]\[0\]='\(' is not a regular expression"),
    ({'optim.param_groups': ((5, 1.0, 0.0),)},
     r"config\.optim\.param_groups\[0\]\[0\]=5 must be a string, a regular expression .*; for example '\.\*'"),
    *(({'optim.param_groups': (('bias', 'freeze'), ('.*', factor, 0.0))},
       rf'config\.optim\.param_groups\[1\]\[1\]={factor!r} must be a factor of the learning rate, a finite number of '
       r'at least 0; give 1\.0') for factor in ('x', True, -1.0, float('nan'), float('inf'))),
    *(({'optim.param_groups': (('.*', 1.0, decay),)},
       rf'config\.optim\.param_groups\[0\]\[2\]={decay!r} must be a weight decay, a finite number of at least 0; 0\.0 '
       'is off') for decay in ('0', -2.0)),
    ({'optim.param_groups': (('.*', float('nan'), 0.0),), 'compat': 'published'}, r'config\.compat='),
    ({'optim.param_groups': (('bias', 'freeze'), ('norm', 0, 0), ('.*', 2, 0.1)), 'seed': 2**32 - 1}, None),
    # Target sets and tasks.
    ({'target_sets.classes.softmax': 'sampled', 'target_sets.classes.num_sampled': 4},
     r"config\.target_sets\.classes: softmax='sampled' needs entries='vocabulary' and num_sampled ≥ 2"),
    ({'target_sets.vocabulary.softmax': 'sampled'}, 'num_sampled ≥ 2, not .*num_sampled=0'),
    ({f'tasks.{name}.batch_size': 0 for name in ('shape', 'text', 'name', 'pair', 'package')},
     r'config\.tasks has no task with batch_size > 0; add one with config\.task'),
    ({'train.mixture': 'one_task', 'tasks.shape.loss_weight': 0.0},
     r"config\.tasks\.shape: sampling_weight=0\.0, loss_weight=0\.0, but mixture='one_task' draws .*above 0"),
    ({'tasks.shape.linear_head': True, 'tasks.package.linear_head': True},
     r'config\.tasks: .*(shape|package).* both have linear_head=True'),
    ({'tasks.total': config.task('image_classification', 'glyphs', batch_size=8, target_set='classes')},
     r'config\.tasks\.total: loss/total in the log is the sum of all tasks; choose another name'),
    *(({f'{field}.a/b': value}, rf"config\.{field}: the name 'a/b' becomes part of names of files and parameters; use "
       r"letters, digits, '_' and '-'\.")
      for field, value in (('tasks', config.task('text_mlm', 'paragraphs', batch_size=8, target_set='vocabulary')),
                           ('target_sets', config.target_set('vocabulary', family='words')), ('task_types', _TAG))),
    ({'model.extra_temperature_groups': ('a', '')}, r"config\.model\.extra_temperature_groups: the name '' becomes"),
    ({'target_sets.Größe :2-3': config.target_set('vocabulary', family='words')}, None),
    ({'tasks.name.caption_templates': ()},
     r"config\.tasks\.name\.caption_templates is empty; give at least one template, for example \('{caption}',\)"),
    ({'tasks.name.caption_templates': ('{name}', 'a {name')},
     r"config\.tasks\.name\.caption_templates\[1\]: template 'a {name': the brace at position 3 is not closed"),
    ({'tasks.package.template': '{text|upper} <spe> <eot>'},
     r"config\.tasks\.package\.template: .* filter 'upper' is unknown; choices: no_stop"),
    ({'tasks.text.mixup_alpha': .5},
     r"config\.tasks\.text: mixup_alpha=0\.5, cutmix_alpha=0\.0 mix images .*'text_mlm' has none"),
    ({'tasks.shape.word_dropout': .3},
     r"config\.tasks\.shape\.word_dropout=0\.3 leaves out .*'image_classification' has none\. Set it to 0"),
    ({'tasks.package.max_shift': 1},
     r"config\.tasks\.package\.max_shift=1 moves images; .*'text_classification' has none\. Set it to 0"),
    ({'tasks.shape.source': 'own:pets', 'tasks.shape.crop': 'jittered_crop', 'tasks.shape.random_flip': True,
      'tasks.shape.randaugment': 9.0, 'tasks.shape.single_answer': True}, None),
    ({'model.posemb': 'learned', 'model.posemb_scale': .5},
     r"config\.model\.posemb_scale=0\.5 changes computed positions; with posemb='learned' set it to 1"),
    # Task types and families of the config.
    ({'task_types.vqa': _TAG}, r'config\.task_types\.vqa: a built-in task type has this name; choose another'),
    ({'task_types.tag': {k: v for k, v in _TAG.items() if k != 'target'}},
     r'config\.task_types\.tag: target missing or unknown; give inputs, readout, router_task, target'),
    ({'task_types.tag': {**_TAG, 'inputs': ('visual',)}},
     r"config\.task_types\.tag\.inputs=\('visual',\) must be a tuple of \(modality, mask\) pairs, for example "
     r"\(\('visual', 'full'\),\)"),
    ({'task_types.tag': {**_TAG, 'target': ()}},
     r"config\.task_types\.tag\.target=\(\) must be a string, such as 'words'"),
    ({'task_types.tag': 1},
     r'config\.task_types\.tag=1 must be a section with inputs, readout, router_task, target'),
    ({'target_families.words': (1, 1, 1, 1)},
     r'config\.target_families\.words: a built-in family has this name, and its bits are frozen; choose'),
    # Evaluators.
    ({'evaluators.top': _evaluator('classify', 'shape')},
     r"config\.evaluators\.top\.type='classify' is unknown; did you mean 'classification'"),
    ({'evaluators.top': _evaluator('retrieval', 'text')},
     r"config\.evaluators\.top\.task='text' is of task type 'text_mlm', which evaluator 'retrieval' cannot evaluate; "
     r"choices: pair"),
    ({'evaluators.top': _evaluator('mlm', 'text', split='test_fonts', during_training=True)},
     r"config\.evaluators\.top\.split='test_fonts' with during_training=True would choose a checkpoint by the test "
     'data; give a validation split'),
    ({'train.evaluate_every': 20, 'evaluators.top': _evaluator('mlm', 'text')},
     r"config\.train\.evaluate_every=20 needs an evaluator with during_training=True; set it for one of 'top'"),
    ({'train.evaluate_every': 30, 'evaluators.top': _VALIDATION},
     r'config\.train\.evaluate_every=30 must be a multiple of config\.train\.log_every=20; try 20'),
    ({'train.best_metric': 'eval/top/perplexity', 'evaluators.top': _VALIDATION},
     r"config\.train\.best_metric='eval/top/perplexity' needs config\.train\.evaluate_every"),
    ({'train.best_metric': 'eval/top/accuracy', 'evaluators.top': _evaluator('mlm', 'text')},
     r"config\.train\.best_metric='eval/top/accuracy' is unknown"),  # it does not run during training
    ({'train.best_metric': 'eval/top/accuracy', 'evaluators.top': _VALIDATION, 'train.evaluate_every': 60},
     r'config\.train\.checkpoint_every=200 must be a multiple of config\.train\.evaluate_every=60; try 180'),
    ({'evaluators.top': _evaluator('classification', 'shape', max_len=21)},
     r"config\.evaluators\.top\.max_len=21 is for evaluators of type 'caption', not 'classification'; set it to 0"),
    ({'evaluators.top': _evaluator('caption', 'name', max_len=33)},
     r'config\.evaluators\.top\.max_len=33 is above config\.model\.max_text_len=32'),
    ({'evaluators.top': _evaluator('classification', 'shape', num_views=2)},
     r'config\.evaluators\.top: num_views=2, num_crops=1 are for the classification of videos of files'),
])
def test_fields_that_contradict_each_other_are_named(changes, message):
  with pytest.raises(UsageError, match=message) if message else contextlib.nullcontext():
    _make_plan(changes)


@pytest.mark.parametrize('variant, sizes', [
    ('Ti/16', (12, 192, 3, 768, 16)), ('S/16', (12, 384, 6, 1536, 16)), ('B/16', (12, 768, 12, 3072, 16)),
    ('L/16', (24, 1024, 16, 4096, 16))])
def test_a_variant_sets_the_published_sizes(variant, sizes):
  c = config.base()
  c.model.variant = variant
  m = schema.parse_config(c).model
  assert (m.num_layers, m.width, m.num_heads, m.mlp_dim, m.patch_size) == sizes
  assert c.model.width == 192  # the config itself does not change
  applied = schema.apply_choices(c)
  assert applied.model.width == m.width and schema.apply_choices(applied) == applied


def test_a_size_that_contradicts_the_variant_is_an_error_and_the_same_size_is_not():
  c = config.base()
  c.model.update(variant='B/16', width=768)
  schema.parse_config(c)
  c.model.width = 128
  with pytest.raises(UsageError, match=(
      r"config\.model\.variant='B/16' sets config\.model\.width=128 to another value; leave these fields out, or "
      r"set config\.model\.variant=''")):
    schema.parse_config(c)


@pytest.mark.parametrize('weight_decay', [0.05, 0.2])
def test_compat_sets_what_the_preset_sets_and_keeps_the_decay_of_kernels(weight_decay):
  c, expected = config.base(), config.base()
  c.compat, c.optim.param_groups = 'published', schema.param_groups(weight_decay)
  presets.published(expected, weight_decay)
  expected.compat = 'published'
  assert schema.parse_config(c) == schema.parse_config(expected) and schema.apply_choices(c) == expected
  chosen = expected.model.posemb, expected.train.mixture, expected.optim.schedule
  assert chosen == ('frozen', 'one_task', 'published')


def test_what_contradicts_compat_is_an_error():
  c = config.base()
  c.compat = 'published'
  c.optim.update(schedule='constant', param_groups=(('.*', 'freeze'),))
  with pytest.raises(UsageError, match=r"config\.compat='published' sets config\.optim\.schedule='constant', "
                                       r"config\.optim\.param_groups="):
    schema.parse_config(c)


@pytest.mark.parametrize('name, overrides, refused', [
    ('published', ['train.mixture=all_tasks', 'optim.b1=0.9'],
     r"compat='published' sets config\.train\.mixture='all_tasks' to"),
    ('pretrain:size=large', ['model.num_layers=12'], r"model\.variant='L/16' sets config\.model\.num_layers=12 to"),
    ('published', ['train.mixture=one_task', f'optim.param_groups={schema.param_groups(0.2)}'], None),
    ('pretrain:size=large', ['model.num_layers=24'], None), ('quickstart', ['model.num_layers=12'], None)])
def test_an_override_that_contradicts_a_choice_is_an_error_also_where_it_is_the_default(name, overrides, refused):
  with pytest.raises(UsageError, match=refused) if refused else contextlib.nullcontext():
    cli.config_from(name, overrides)
