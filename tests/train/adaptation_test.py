"""Fine-tuning recipes: a config that follows from a run and a task."""

import pytest

from tests.helpers import small_config, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.config.schema import FREEZE
from uni_moe_jax.train import adaptation, workdir
from uni_moe_jax.utils.errors import UsageError


@pytest.fixture(name='run', scope='module')
def _run(tmp_path_factory):
  """A work directory with a config of its own in every section."""
  c = tiny.config('shape', 'caption', 'pair', data_dir='/the data')
  c.moe.num_experts, c.tokenizer.vocab_size, c.seed = 6, 50, 7
  c.tasks.shape.temperature, c.tasks.pair.loss_weight, c.train.ema_decay = 'images', 3.0, 0.5
  c.tasks.look = config_lib.task('image_retrieval', 'glyphs', batch_size=0, caption_templates=('{face}',), max_len=8)
  for name, task in (('first', 'shape'), ('second', 'shape'), ('other', 'pair')):
    evaluator = 'retrieval' if task == 'pair' else 'classification'
    c.evaluators[name] = config_lib.evaluator(evaluator, task, split='train')
  folder = tmp_path_factory.mktemp('runs') / 'trained'
  workdir.claim_workdir(folder, c, 'print')
  return str(folder)


ALL = (adaptation.finetune, adaptation.prompt_tune, adaptation.zero_shot)


@pytest.mark.parametrize('recipe', ALL)
@pytest.mark.parametrize('task', ['digits', 'video_caption', 'video_name', 'shape', 'caption'])
def test_model_experts_tokenizer_and_data_are_those_of_the_run(run, recipe, task):
  c, old = recipe(f'run={run},task={task}'), workdir.load_config(run)
  for section in ('moe', 'tokenizer', 'data', 'task_types'):
    assert c[section].to_dict() == old[section].to_dict()
  added = ('num_deep_prompts', 'prompt_sharing', 'spe_bias', 'extra_temperature_groups')
  assert all(c.model[k] == v for k, v in old.model.items() if k not in added)
  assert (c.train.init, list(c.tasks), c.train.ema_decay, c.seed) == (run, [task], 0.0, 0)
  if task != 'caption':  # the run does not evaluate it
    plan = make_plan(c)
    assert {e.task.name for e in plan.evaluations} == {task}
    assert [t.name for t in plan.tasks] == ([] if recipe is adaptation.zero_shot else [task])


def test_a_task_of_the_run_keeps_its_target_set_and_evaluators_and_has_loss_weight_1(run):
  c = adaptation.finetune(f'run={run},task=shape')
  assert (list(c.target_sets), list(c.evaluators)) == (['shapes'], ['first', 'second'])
  assert adaptation.finetune(f'run={run},task=pair').tasks.pair.loss_weight == 1
  assert adaptation.finetune(f'run={run},task=look').tasks.look.batch_size == adaptation.BATCH_SIZE
  assert (c.tasks.shape.batch_size, adaptation.zero_shot(f'run={run},task=shape').tasks.shape.batch_size) == (8, 0)


@pytest.mark.parametrize('task, group', [
    ('digits', 'images'), ('video_caption', 'image_caption'), ('video_name', 'image_retrieval'),
    ('shape', 'images')])
def test_the_temperature_group_is_that_of_the_task_type_or_of_one_with_equal_inputs_and_targets(run, task, group):
  assert all(recipe(f'run={run},task={task}').tasks[task].temperature == group for recipe in ALL)


def test_the_task_type_itself_comes_before_an_equal_one(tmp_path):
  c = tiny.config('motion', 'shape', data_dir='/the data')  # equal but for their names; the video type comes first
  workdir.claim_workdir(tmp_path, c, 'print')
  assert adaptation.finetune(f'run={tmp_path},task=digits').tasks.digits.temperature == 'image_classification'
  del c.tasks['shape']
  workdir.claim_workdir(tmp_path / 'videos', c, 'print')
  assert adaptation.finetune(f'run={tmp_path}/videos,task=digits').tasks.digits.temperature == 'video_classification'


@pytest.mark.parametrize('recipe, argument, amount', [
    (adaptation.finetune, 'digits', (0, 1.0)), (adaptation.finetune, 'digits,data=few', (10, 1.0)),
    (adaptation.prompt_tune, 'digits', (10, 1.0)), (adaptation.prompt_tune, 'digits,data=all', (0, 1.0)),
    (adaptation.prompt_tune, 'video_name', (0, 0.01)), (adaptation.finetune, 'video_caption,data=few', (0, 0.01))])
def test_few_is_ten_examples_per_class_or_one_percent(run, recipe, argument, amount):
  task = recipe(f'run={run},task={argument}').tasks[argument.split(',')[0]]
  assert (task.shots, task.train_fraction) == amount


def test_a_column_of_texts_has_no_classes_and_a_task_of_the_run_comes_before_a_built_in_one(tmp_path):
  c = tiny.config('shape', 'text', data_dir='/the data')
  c.tasks.text.label_column = 'text'
  c.tasks.digits = c.tasks.shape
  workdir.claim_workdir(tmp_path, c, 'print')
  text = adaptation.prompt_tune(f'run={tmp_path},task=text').tasks.text
  assert (text.shots, text.train_fraction, text.linear_head) == (0, 0.01, False)
  assert adaptation.finetune(f'run={tmp_path},task=digits').tasks.digits.source == c.tasks.shape.source


def test_prompt_tuning_freezes_and_has_a_head_for_classes_and_fine_tuning_does_neither(run):
  prompt, fine = adaptation.prompt_tune(f'run={run},task=digits'), adaptation.finetune(f'run={run},task=digits')
  assert prompt.optim.param_groups[-1] == (r'.*', FREEZE)
  assert prompt.model.num_deep_prompts > 0 and prompt.tasks.digits.linear_head
  assert prompt.model.prompt_sharing == 'inputs'  # the embeddings of other answers do not change
  assert not adaptation.prompt_tune(f'run={run},task=video_name').tasks.video_name.linear_head
  assert not any(group[1] == FREEZE for group in fine.optim.param_groups)
  assert fine.model.num_deep_prompts == 0 and not fine.tasks.digits.linear_head


@pytest.mark.parametrize('recipe, argument, message', [
    *((adaptation.finetune, *case) for case in (
        ('', r"finetune:: argument 'run' is missing; give run=RUN,task=TASK"),
        ('run={run}', "argument 'task' is missing"),
        ('run={run},task=', "argument 'task' is missing"),
        ('{run},digits',
         "trained' must be NAME=VALUE, with NAME one of run, task, data; for example .*:run=RUN,task=TASK"),
        ('run={run},task=digits,data=some', "data='some' is unknown; .*choices: all, few"),
        ('run={run},task=digits,data=few,data=all', "argument 'data' is given twice"),
        ('run={run}x,task=digits', "trainedx' is no work directory of a run .*did you mean 'trained'"),
        ('run={run},task=digit', "task 'digit' is unknown; did you mean 'digits'"),
        ('run={run},task=shapes', "task 'shapes' is unknown; did you mean 'shape'"))),
    (adaptation.zero_shot, 'run={run},task=digits,data=few',
     r"zero_shot:.*argument 'data' is unknown; .*choices: run, task")])
def test_a_wrong_argument_is_reported(run, recipe, argument, message):
  with pytest.raises(UsageError, match=message):
    recipe(argument.format(run=run))


def test_a_config_that_trains_nothing_needs_a_run_and_an_evaluator(run):
  c = adaptation.zero_shot(f'run={run},task=digits')
  with pytest.raises(ValueError, match='nothing to train; .*uni-moe evaluate'):
    make_plan(c).check_trains()
  make_plan(adaptation.finetune(f'run={run},task=digits')).check_trains()
  for path, value in (('train.init', ''), ('evaluators', {})):
    broken = adaptation.zero_shot(f'run={run},task=digits')
    small_config.assign(broken, path, value)
    with pytest.raises(ValueError, match='no task with batch_size > 0'):
      make_plan(broken)
