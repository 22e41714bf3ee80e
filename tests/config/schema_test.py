"""The config: what a good one resolves to, and the one sentence in which each bad one ends."""

import json

from absl.testing import absltest, parameterized

from tests.helpers.small_config import config as _config
from uni_moe_jax import config
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.tasks import task_types


class PlanTest(absltest.TestCase):

  def test_every_task_is_in_the_plan_with_its_kind_and_set(self):
    resolved = make_plan(_config())
    found = {t.name: (t.type.name, t.target_set) for t in resolved.tasks}
    self.assertEqual(found, {
        'shape': ('image_classification', 'classes'), 'text': ('text_mlm', 'vocabulary'),
        'name': ('image_caption', 'vocabulary'), 'pair': ('image_retrieval', ''),
        'package': ('text_classification', 'packages')})

  def test_a_set_has_the_condition_of_its_family(self):
    families = {s.name: s.condition for s in make_plan(_config()).sets}
    self.assertEqual(families['classes'], task_types.families()['names'])
    self.assertEqual(families['vocabulary'], task_types.families()['words'])

  def test_a_set_that_no_task_uses_is_left_out(self):
    c = _config()
    c.target_sets.unused = config.target_set(('a',), family='words')
    self.assertNotIn('unused', [s.name for s in make_plan(c).sets])

  def test_a_run_that_encodes_all_sets_keeps_those_that_no_task_uses(self):
    c = _config()
    c.target_sets.unused = config.target_set(('a',), family='words')
    c.tasks.shape.update(batch_size=0, temperature='text_mlm')  # and those that only a probe uses
    self.assertEqual([s.name for s in make_plan(c).probe_sets], ['classes'])
    c.train.encode_all_sets = True
    every, resolved = ['classes', 'packages', 'unused', 'vocabulary'], make_plan(c)
    self.assertEqual([s.name for s in resolved.sets], every)
    self.assertEqual([s.name for s in resolved.only('package').sets], every)
    self.assertEqual(resolved.probe_sets, ())

  def test_a_set_of_answers_is_kept_and_never_encoded(self):
    c = _config()
    c.target_sets.closed = config.target_set(('a', 'b'), family='names')
    c.evaluators.name = config.evaluator('caption', 'name', split='test', constrain_to='closed')
    resolved = make_plan(c)
    self.assertEqual([s.name for s in resolved.answer_sets], ['closed'])
    self.assertNotIn('closed', [s.name for s in (*resolved.sets, *resolved.probe_sets)])
    c.evaluators.name.constrain_to = 'classes'  # a trained task has it
    self.assertEqual(make_plan(c).answer_sets, ())

  def test_only_the_vocabulary_is_the_vocabulary(self):
    found = {s.name: s.is_vocabulary for s in make_plan(_config()).sets}
    self.assertEqual(found, {'classes': False, 'packages': False, 'vocabulary': True})

  def test_a_set_may_have_label_prompts(self):
    c = _config()
    c.target_sets.classes.label_prompts = True
    self.assertEqual({s.name: s.label_prompts for s in make_plan(c).sets},
                     {'classes': True, 'packages': False, 'vocabulary': False})

  def test_a_task_without_a_temperature_group_has_that_of_its_kind(self):
    c = _config()
    c.tasks.name.temperature = c.tasks.text.temperature = 'words'
    self.assertEqual(make_plan(c).temperatures,
                     ('image_classification', 'image_retrieval', 'text_classification', 'words'))

  def test_temperature_groups_of_the_model_exist_beside_those_of_the_tasks(self):
    c = _config()
    c.tasks.name.temperature = c.tasks.text.temperature = 'words'
    c.model.extra_temperature_groups = ('words', 'downstream')
    self.assertEqual(make_plan(c).temperatures,
                     ('downstream', 'image_classification', 'image_retrieval', 'text_classification', 'words'))

  def test_how_often_a_task_is_drawn_and_how_much_it_counts_are_two_fields(self):
    c = _config()
    c.tasks.shape.update(loss_weight=.5, sampling_weight=3.)
    found = {t.name: (t.loss_weight, t.sampling_weight) for t in make_plan(c).tasks}
    self.assertEqual(found['shape'], (.5, 3.))
    self.assertEqual(found['text'], (1., 0.))

  def test_clips_may_have_constants_of_their_own(self):
    c = _config()
    c.model.update(video_mean=(.1, .2, .3), video_std=(.4, .5, .6))
    make_plan(c)  # one a channel; () is the default

  def test_tasks_of_one_kind_and_shape_share_a_group(self):
    c = _config()
    c.tasks.second = c.tasks.package.copy_and_resolve_references()
    groups = {k: [t.name for t in v] for k, v in make_plan(c).groups.items()}
    self.assertEqual(groups['text_classification'], ['package', 'second'])

  def test_tasks_of_one_kind_and_two_lengths_are_two_groups(self):
    c = _config()
    c.tasks.second = c.tasks.package.copy_and_resolve_references()
    c.tasks.second.max_len = 24
    groups = {k: [t.name for t in v] for k, v in make_plan(c).groups.items()}
    self.assertEqual(groups['text_classification/16/0'], ['package'])
    self.assertEqual(groups['text_classification/24/0'], ['second'])

  def test_a_step_of_one_task_holds_its_set_only(self):
    only = make_plan(_config()).only('package')
    self.assertEqual([t.name for t in only.tasks], ['package'])
    self.assertEqual([s.name for s in only.sets], ['packages'])

  def test_a_task_of_batch_zero_is_evaluated_but_not_trained(self):
    c = _config()
    c.tasks.shape.update(batch_size=0, temperature='text_mlm')
    resolved = make_plan(c)
    self.assertEqual([t.name for t in resolved.probes], ['shape'])
    self.assertEqual([s.name for s in resolved.probe_sets], ['classes'])
    self.assertNotIn('shape', [t.name for t in resolved.tasks])

  def test_an_evaluator_names_its_task(self):
    c = _config()
    c.evaluators.top = config.evaluator('classification', 'shape', split='test')
    [evaluation] = make_plan(c).evaluations
    self.assertEqual((evaluation.task.name, evaluation.split), ('shape', 'test'))

  def test_the_published_tokenizer_is_two_fields(self):
    c = _config()
    c.tokenizer.update(type='clip', merges_path='merges.txt')  # whether it is there is found when it is read
    self.assertEqual(make_plan(c), make_plan(_config()))


class OwnRowsTest(absltest.TestCase):

  def test_a_kind_of_the_config_is_a_kind_like_any_other(self):
    c = _config()
    c.task_types.search = dict(inputs=(('text', 'full'),), target='pair', readout='cls', router_task='search')
    c.tasks.search = config.task('search', 'pairs', batch_size=4, caption_templates=('{text_b}',), max_len=8)
    found = {t.name: t.type for t in make_plan(c).tasks}['search']
    self.assertEqual(found.conditions[0].bits, (0, 1, 0, 1, 0, 1, 0, 0))

  def test_a_kind_of_the_config_leaves_the_built_in_rows_alone(self):
    c = _config()
    c.task_types.tag = dict(inputs=(('visual', 'full'),), target='words', readout='cls', router_task='tag')
    built_in = tuple(task_types.TASK_TYPES.values())
    self.assertEqual(make_plan(c).task_types[:len(built_in)], built_in)

  def test_a_family_of_the_config_carries_a_kind_that_the_built_in_ones_refuse(self):
    c = _config()
    row = dict(inputs=(('visual', 'full'), ('text', 'full')), target='names', readout='cls', router_task='seen')
    c.task_types.seen = row
    with self.assertRaisesRegex(ValueError, "'seen'.*would change the frozen bits.*'names': declare a new family"):
      make_plan(c)
    c.task_types.seen.target = 'seen_names'
    c.target_families.seen_names = (1, 1, 0, 1)
    make_plan(c)

  def test_placement_is_a_name_or_a_tuple(self):
    c = _config()
    c.moe.placement = (0, 3)
    make_plan(c)
    c.moe.placement = 'every_2'
    make_plan(c)
    self.assertEqual(json.loads(c.to_json())['moe']['placement'], 'every_2')


_OWN_KIND = dict(inputs=(('visual', 'full'),), target='words', readout='cls', router_task='tag')

# name: (change, what the message says: field, value, bound, fix)
_ERRORS = {
    # Bounds, and groups that nobody trains.
    'smoothing': (lambda c: c.tasks.shape.update(label_smoothing=1.0), r'config\.tasks\.shape\.label_smoothing=1\.0 must be in \[0, 1\); 0 is off'),
    'weight': (lambda c: c.tasks.shape.update(loss_weight=-.5), r'config\.tasks\.shape\.loss_weight=-0\.5 must be at least 0'),
    'noise_std': (lambda c: c.moe.update(noise_std=-1.0), r'config\.moe\.noise_std=-1\.0 must be at least 0'),
    'probe_temperature': (lambda c: c.tasks.package.update(batch_size=0),
                          r"config\.tasks\.package\.temperature='text_classification': no trained task has this group"),
    # Drawing and heads.
    'sampling': (lambda c: c.tasks.shape.update(sampling_weight=-1.0), r'config\.tasks\.shape\.sampling_weight=-1\.0 must be at least 0'),
    'never_drawn': (lambda c: (c.train.update(mixture='one_task'), c.tasks.shape.update(loss_weight=0.0)),
                    r"config\.tasks\.shape: sampling_weight=0\.0, loss_weight=0\.0: mixture='one_task' draws .*above 0"),
    'head_of_a_pair': (lambda c: c.tasks.pair.update(linear_head=True), r'config\.tasks\.pair\.linear_head=True needs a task type that chooses'),
    'two_heads': (lambda c: (c.tasks.shape.update(linear_head=True), c.tasks.package.update(linear_head=True)),
                  r'config\.tasks: .*(shape|package).* both have linear_head=True'),
    'prompt_sides': (lambda c: c.model.update(prompt_sharing='both'), r"prompt_sharing='both' is unknown; .*inputs, separate, shared"),
    'prefix_prompts': (lambda c: c.model.update(num_prefix_prompts=-1), r'config\.model\.num_prefix_prompts=-1 must be at least 0'),
    'label_prompts_of_words': (lambda c: c.target_sets.vocabulary.update(label_prompts=True),
                               r'config\.target_sets\.vocabulary\.label_prompts=True is for sets of texts: .*set it to False'),
    'label_prompts_of_a_probe': (
        lambda c: (c.tasks.shape.update(batch_size=0, temperature='text_mlm'), c.target_sets.classes.update(label_prompts=True)),
        r'config\.target_sets\.classes\.label_prompts=True: no trained task uses this set, .*stay zero; train a task'),
    'gate_factor': (lambda c: c.optim.update(router_lr_multiplier=-.5), r'config\.optim\.router_lr_multiplier=-0\.5 must be at least 0'),
    # Model.
    'layers': (lambda c: c.model.update(num_layers=0), r'config\.model\.num_layers=0 must be at least 1'),
    'heads': (lambda c: c.model.update(width=100, num_heads=8),
              r'config\.model\.width=100 must be a multiple of config\.model\.num_heads=8; try 96'),
    'patch': (lambda c: c.model.update(image_size=30),
              r'config\.model\.image_size=30 must be a multiple of config\.model\.patch_size=8; try 24'),
    'small_picture': (lambda c: c.model.update(image_size=4), r'image_size=4 .*patch_size=8; try 8'),
    'width': (lambda c: c.model.update(width=18, num_heads=3), r'config\.model\.width=18 .* multiple of 4 .*; try 16'),
    'drop_path': (lambda c: c.model.update(drop_path=1.0), r'config\.model\.drop_path=1\.0 must be in \[0, 1\)'),
    'channels': (lambda c: c.model.update(channels=1),
                 r'config\.model\.pixel_mean has 3 values for config\.model\.channels=1'),
    'video_mean': (lambda c: c.model.update(video_mean=(.5,)),
                   r'config\.model\.video_mean has 1 values for config\.model\.channels=3'),
    'video_std': (lambda c: c.model.update(video_mean=(.5,) * 3, video_std=(.5, .5)),
                  r'config\.model\.video_std has 2 values for config\.model\.channels=3'),
    'no_pixel_mean': (lambda c: c.model.update(pixel_mean=()),
                      r'config\.model\.pixel_mean has 0 values for config\.model\.channels=3'),
    'dtype': (lambda c: c.model.update(dtype='bfloat'),
              r"config\.model\.dtype='bfloat' is unknown; did you mean 'bfloat16' or 'float32'\?"
              ' choices: bfloat16, float32'),
    'spatial': (lambda c: c.model.update(posemb='lerned'), r"posemb='lerned' .*did you mean 'learned'"),
    'stored_spatial': (lambda c: c.model.update(posemb='froze'),
                       r"config\.model\.posemb='froze' is unknown; did you mean 'frozen'\?"
                       ' choices: frozen, learned, sincos2d'),
    # Experts.
    'router': (lambda c: c.moe.update(router='atribute'),
               r"config\.moe\.router='atribute' is unknown; did you mean 'attribute'\?"
               r' choices: attribute, context, dense, modality, task, token'),
    'top_k': (lambda c: c.moe.update(top_k=9), r'config\.moe\.top_k=9 must be in 1…config\.moe\.num_experts=8'),
    'no_expert': (lambda c: c.moe.update(top_k=0), r'config\.moe\.top_k=0 must be at least 1'),
    'placement': (lambda c: c.moe.update(placement='even'),
                  r"config\.moe\.placement='even' is unknown; .*choices: all, every_2, every_4, none"),
    'placement_index': (lambda c: c.moe.update(placement=(0, 4)),
                        r'config\.moe\.placement=\(0, 4\) has an index outside 0…3'),
    'parts': (lambda c: c.moe.update(sublayers=('atention',)),
              r"config\.moe\.sublayers\[0\]='atention' is unknown; did you mean 'attention'"),
    'capacity': (lambda c: c.moe.update(router='token', capacity_factor=-.5), r'config\.moe\.capacity_factor=-0\.5 must be at least 0'),
    'capacity_of_merged': (lambda c: c.moe.update(capacity_factor=1.25),
                           r"config\.moe\.capacity_factor=1\.25 needs config\.moe\.router='token' or 'context'; kernels of "
                           r"'attribute' merge\. Set it to 0"),
    'balance_of_merged': (lambda c: c.moe.update(router='task', balance_loss_weight=.01),
                          r"config\.moe\.balance_loss_weight=0\.01 needs config\.moe\.router='token' or 'context'"),
    'z_loss': (lambda c: c.moe.update(router='context', z_loss_weight=-1.), r'config\.moe\.z_loss_weight=-1\.0 must be at least 0'),
    'grouped': (lambda c: c.moe.update(router='token', gmm='megabloks'),
                r"config\.moe\.gmm='megabloks' is unknown; did you mean 'megablox'\?"),
    # Tokenizer.
    'tokenizer': (lambda c: c.tokenizer.update(type='sentencepeice'),
                  r"config\.tokenizer\.type='sentencepeice' is unknown; did you mean 'sentencepiece'\? "
                  'choices: clip, sentencepiece'),
    'merges': (lambda c: c.tokenizer.update(type='clip'),
               r"config\.tokenizer\.merges_path='' must be a path when config\.tokenizer\.type='clip'; give that of CLIP's"),
    # Training.
    'steps': (lambda c: c.train.update(steps=0), r'config\.train\.steps=0 must be at least 1'),
    'rate': (lambda c: c.optim.update(learning_rate=-1.0), r'config\.optim\.learning_rate=-1\.0 must be at least 0'),
    'mixture': (lambda c: c.train.update(mixture='all_task'), r"config\.train\.mixture='all_task' .*did you mean 'all_tasks'"),
    'schedule': (lambda c: c.optim.update(schedule='cosin'), r"config\.optim\.schedule='cosin' .*'cosine'"),
    'published_schedule': (lambda c: c.optim.update(schedule='publish'),
                           r"config\.optim\.schedule='publish' is unknown; did you mean 'published'\?"
                           ' choices: constant, cosine, published'),
    'without_gradient': (lambda c: c.optim.update(unused_params='set_to_none'),
                         r"config\.optim\.unused_params='set_to_none' is unknown; did you mean 'settonone'\?"
                         ' choices: settonone, update, zerograd'),
    'contrastive': (lambda c: c.train.update(contrastive_reduction='means'),
                    r"config\.train\.contrastive_reduction='means' is unknown; did you mean 'mean'\? choices: mean, sum"),
    'ema': (lambda c: c.train.update(ema_decay=1.0), r'config\.train\.ema_decay=1\.0 must be in \[0, 1\); 0 is off'),
    'best_unknown': (lambda c: c.train.update(best_metric='loss/shap'),
                     r"config\.train\.best_metric='loss/shap' is unknown; did you mean 'loss/shape'"),
    'best_never_logged': (lambda c: c.train.update(best_metric='loss/total', log_every=30),
                          r'config\.train\.checkpoint_every=200 must be a multiple of config\.train\.log_every=30; try 180'),
    'watchdog_negative': (lambda c: c.train.update(hang_timeout=-1.), r'config\.train\.hang_timeout=-1\.0 must be at least 0'),
    'interference_sampled': (lambda c: c.train.update(mixture='one_task', interference_every=5),
                             r"config\.train\.interference_every=5 needs config\.train\.mixture='all_tasks'.*Set it to 0"),
    'interference_negative': (lambda c: c.train.update(interference_every=-1),
                              r'config\.train\.interference_every=-1 must be at least 0'),
    'interference_pattern': (lambda c: c.train.update(interference_parameters='qkv('),
                             r"config\.train\.interference_parameters='qkv\(' is not a regular expression"),
    'accum_sampled': (lambda c: c.train.update(mixture='one_task', grad_accum_steps=2),
                      r"config\.train\.grad_accum_steps=2 needs config\.train\.mixture='all_tasks', not 'one_task'"),
    'rule': (lambda c: c.optim.update(param_groups=(('.*', 1.0),)),
             r"config\.optim\.param_groups: \('\.\*', 1\.0\) is neither \(pattern, lr factor, weight decay\) nor"
             r" \(pattern, 'freeze'\)"),
    'pattern': (lambda c: c.optim.update(param_groups=(('(', 1.0, 0.0),)),
                r"config\.optim\.param_groups\[0\]\[0\]='\(' is not a regular expression"),
    # Target sets.
    'family': (lambda c: c.target_sets.classes.update(family='name'),
               r"config\.target_sets\.classes\.family='name' is unknown; did you mean 'names'\?"),
    'scoring': (lambda c: c.target_sets.classes.update(softmax='sample'),
                r"config\.target_sets\.classes\.softmax='sample' .*did you mean 'sampled'"),
    'sampled_texts': (lambda c: c.target_sets.classes.update(softmax='sampled', num_sampled=4),
                      r"config\.target_sets\.classes: softmax='sampled' needs entries='vocabulary' and num_sampled ≥ 1"),
    'samples': (lambda c: c.target_sets.vocabulary.update(softmax='sampled'), r'num_sampled ≥ 1, not .*num_sampled=0'),
    # Tasks.
    'no_task': (lambda c: [t.update(batch_size=0) for t in c.tasks.values()],
                r'config\.tasks has no task with batch_size > 0; add one with config\.task'),
    'kind': (lambda c: c.tasks.shape.update(type='image_clasification'),
             r"config\.tasks\.shape\.type='image_clasification' is unknown; did you mean 'image_classification'"),
    'negative_batch': (lambda c: c.tasks.shape.update(batch_size=-2),
                       r'config\.tasks\.shape\.batch_size=-2 must be a positive multiple of config\.train\.grad_accum_steps=1; try 1'),
    'accum': (lambda c: c.train.update(grad_accum_steps=3),
              r'config\.tasks\.name\.batch_size=4 must be a positive multiple of config\.train\.grad_accum_steps=3; try 3'),
    'set': (lambda c: c.tasks.shape.update(target_set='clases'),
            r"config\.tasks\.shape\.target_set='clases' is unknown; did you mean 'classes'\? choices: classes, "
            'packages, vocabulary'),
    'set_of_pair': (lambda c: c.tasks.pair.update(target_set='classes'),
                    r"config\.tasks\.pair\.target_set='classes': task type 'image_retrieval' is matched with its own texts;"
                    " set it to ''"),
    'set_of_other_family': (lambda c: c.tasks.shape.update(target_set='packages'),
                            r"target_set='packages' is of family 'words', but task type 'image_classification' chooses among"
                            " 'names'"),
    'words_of_a_small_set': (lambda c: c.tasks.text.update(target_set='packages'),
                             r"config\.tasks\.text\.target_set='packages': task type 'text_mlm' predicts words; its set must"
                             " have entries='vocabulary'"),
    'length': (lambda c: c.tasks.text.update(max_len=1), r'config\.tasks\.text\.max_len=1 must be at least 2 tokens'),
    'length_of_table': (lambda c: c.tasks.text.update(max_len=33),
                        r'config\.tasks\.text\.max_len=33 is above config\.model\.max_text_len=32'),
    'masked': (lambda c: c.tasks.text.update(max_predictions=17), r'config\.tasks\.text\.max_predictions=17 must be in 1…max_len=16'),
    'slot': (lambda c: c.tasks.package.update(template='{text} <eot>'),
             r"config\.tasks\.package\.template='{text} <eot>' must contain exactly one '<spe>' slot"),
    'captions': (lambda c: c.tasks.name.update(caption_templates=()),
                 r"config\.tasks\.name\.caption_templates is empty; give at least one template, for example \('{caption}',\)"),
    # Own rows.
    'own_kind_name': (lambda c: c.task_types.update(vqa=_OWN_KIND),
                      r'config\.task_types\.vqa: a built-in task type has this name; choose another'),
    'own_kind_field': (lambda c: c.task_types.update(tag={k: v for k, v in _OWN_KIND.items() if k != 'target'}),
                       r'config\.task_types\.tag: target missing or unknown; give inputs, readout, router_task, target'),
    'own_kind_inputs': (lambda c: c.task_types.update(tag={**_OWN_KIND, 'inputs': ('visual',)}),
                        r"config\.task_types\.tag\.inputs=\('visual',\) must contain \(modality, mask\) pairs, for example"
                        r" \(\('visual', 'full'\),\)"),
    'own_family_name': (lambda c: c.target_families.update(words=(1, 1, 1, 1)),
                        r'config\.target_families\.words: a built-in family has this name, and its bits are frozen; choose'),
    'own_family_bits': (lambda c: c.target_families.update(answers=(1, 1)),
                        r'config\.target_families\.answers=\(1, 1\) must be four bits: .*for example \(1, 0, 0, 1\)'),
    # Evaluators.
    'evaluator': (lambda c: c.evaluators.update(top=config.evaluator('classify', 'shape', split='test')),
                  r"config\.evaluators\.top\.type='classify' is unknown; did you mean 'classification'"),
    'evaluated_task': (lambda c: c.evaluators.update(top=config.evaluator('mlm', 'txt', split='test')),
                       r"config\.evaluators\.top\.task='txt' is unknown; did you mean 'text'"),
    'evaluated_kind': (lambda c: c.evaluators.update(top=config.evaluator('retrieval', 'text', split='test')),
                       r"config\.evaluators\.top\.task='text' is of task type 'text_mlm', which evaluator 'retrieval' cannot"
                       ' evaluate; choices: pair'),
    'evaluated_number': (lambda c: c.evaluators.update(top=config.evaluator('mlm', 'text', split='test', batch_size=0)),
                         r'config\.evaluators\.top\.batch_size=0 must be at least 1'),
    'answers': (lambda c: c.evaluators.update(top=config.evaluator('caption', 'name', split='test', constrain_to='clases')),
                r"config\.evaluators\.top\.constrain_to='clases' is unknown; did you mean 'classes'"),
    'answers_of_any_words': (
        lambda c: c.evaluators.update(top=config.evaluator('caption', 'name', split='test', constrain_to='vocabulary')),
        r"config\.evaluators\.top\.constrain_to='vocabulary' is the vocabulary, .*; set it to '', or to a set of texts"),
    'answers_of_no_caption': (
        lambda c: c.evaluators.update(top=config.evaluator('mlm', 'text', split='test', constrain_to='classes')),
        r"config\.evaluators\.top\.constrain_to='classes' is for evaluators of type 'caption', not 'mlm'; set it to ''"),
}


class ErrorsTest(parameterized.TestCase):

  def test_the_config_is_right_without_the_change(self):
    make_plan(_config())

  @parameterized.named_parameters(*((name, *case) for name, case in _ERRORS.items()))
  def test_a_wrong_field_is_named_with_value_bound_and_fix(self, change, message):
    c = _config()
    change(c)
    with self.assertRaisesRegex(ValueError, message):
      make_plan(c)


if __name__ == '__main__':
  absltest.main()
