"""Tasks of own data: names of tasks, evaluators and target sets."""

from uni_moe_jax import config
from uni_moe_jax.config import presets
from uni_moe_jax.config.plan import make_plan


def _own(sources):
  c = config.base()
  for name, columns in sources.items():
    classes = {column: ('a', 'b') for column, content in columns.items() if content == 'class'}
    presets.own(c, name, columns, classes, ('train', 'test'))
  make_plan(c)
  tasks = {name: (t.type, t.label_column) for name, t in c.tasks.items()}
  return tasks, {name: e.task for name, e in c.evaluators.items()}, set(c.target_sets)


def test_a_class_column_may_have_any_name():
  tasks, evaluators, sets = _own({'pets': {
      'image': 'image', 'captions': 'texts',
      **dict.fromkeys(('exif.model', 'exif_model', 'exif model', 'retrieval'), 'class')}})
  assert tasks == {
      'pets_retrieval': ('image_retrieval', ''), 'pets_caption': ('image_caption', ''),
      'pets_exif_model': ('image_classification', 'exif.model'),
      'pets_exif_model_2': ('image_classification', 'exif_model'),
      'pets_exif model_2_2': ('image_classification', 'exif model'),
      'pets_retrieval_2': ('image_classification', 'retrieval')}
  assert evaluators == {name.replace('_', ' '): name for name in tasks}
  assert sets == {'vocabulary', *(name for name, (t, _) in tasks.items() if t == 'image_classification')}


def test_tasks_of_two_sources_with_one_name_are_two_tasks():
  tasks, _, _ = _own({'pets': {'image': 'image', 'old_label': 'class'},
                      'pets_old': {'text': 'text', 'label': 'class', 'words': 'class'}})
  assert tasks == {
      'pets_old_label': ('image_classification', 'old_label'), 'pets_old_label_2': ('text_classification', 'label'),
      'pets_old_words': ('text_mlm', ''), 'pets_old_words_2': ('text_classification', 'words')}


def test_a_validation_split_can_choose_a_checkpoint_beside_the_test_split_or_alone():
  def evaluators(*splits):
    c = config.base()
    presets.own(c, 'pets', {'image': 'image', 'breed': 'class'}, {'breed': ('a', 'b')}, splits)
    return {name: (e.split, e.during_training) for name, e in c.evaluators.items()}
  assert evaluators('train') == {}
  assert evaluators('train', 'test') == {'pets breed': ('test', False)}
  assert evaluators('train', 'validation') == {'pets breed': ('validation', True)}
  assert evaluators('train', 'validation', 'test') == {
      'pets breed': ('test', False), 'pets breed, validation': ('validation', True)}
