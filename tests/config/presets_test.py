"""Tasks of own data: names of tasks, evaluators and target sets."""

import pytest

from uni_moe_jax import config
from uni_moe_jax.config import presets
from uni_moe_jax.config.plan import make_plan


def _summary(columns, classes=('a', 'b'), splits=('train', 'test'), text_bytes=20):
  classes = {column: {'names': classes, 'counts': {split: [5, 4] for split in splits}}
             for column, content in columns.items() if content == 'class'}
  return {'columns': columns, 'classes': classes, 'splits': dict.fromkeys(splits, 9),
          'text_bytes': {'97 %': [text_bytes]}}


def _config(summaries, **model):
  c = config.base()
  presets.small(c)
  c.model.update(model)
  presets.own(c, summaries)
  make_plan(c)
  return c


def _own(sources):
  c = _config({name: _summary(columns) for name, columns in sources.items()})
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
    presets.own(c, {'pets': _summary({'image': 'image', 'breed': 'class'}, splits=splits)})
    return {name: (e.split, e.during_training) for name, e in c.evaluators.items()}
  assert evaluators('train') == {}
  assert evaluators('train', 'test') == {'pets breed': ('test', False)}
  assert evaluators('train', 'validation') == {'pets breed': ('validation', True)}
  assert evaluators('train', 'validation', 'test') == {
      'pets breed': ('test', False), 'pets breed, validation': ('validation', True)}


def _tasks(*summaries, **model):
  return _config({f'data{i}': s for i, s in enumerate(summaries)}, **model).tasks


def test_a_split_without_labels_or_captions_has_no_evaluator_of_them():
  every = ('train', 'validation', 'test')

  def evaluators(labeled, captioned):
    summary = _summary({'image': 'image', 'breed': 'class', 'captions': 'texts'}, splits=every)
    summary['classes']['breed']['counts'] = {split: [9 * (split in labeled), 0] for split in summary['splits']}
    summary['captioned'] = {split: 9 * (split in captioned) for split in summary['splits']}
    return {name: e.split for name, e in _config({'pets': summary}).evaluators.items()}

  labeled = {'pets breed': 'test', 'pets breed, validation': 'validation'}
  captioned = {f'pets {name}': split for task in ('retrieval', 'caption')
               for name, split in ((task, 'test'), (f'{task}, validation', 'validation'))}
  assert evaluators(every, every) == labeled | captioned
  assert evaluators({'train', 'validation'}, every) == captioned | {'pets breed': 'validation'}
  assert evaluators(every, {'train'}) == labeled


def test_the_tokens_of_a_step_are_divided_between_tasks_by_their_shares():
  photos = _summary({'image': 'image', 'captions': 'texts', 'breed': 'class'})
  tasks = _tasks(photos, _summary({'video': 'video', 'motion': 'class'}), _summary({'text': 'text'}, text_bytes=400))
  # 10,240 tokens in 3 + 2 + 1 + 1 + 1 shares of 1,280. An image has (64 / 16)² = 16, a video eight times as many, a
  # caption 16, and as many queries, a text 64: at most 120, 53, 80, 10 and 20 examples.
  assert {name: t.batch_size for name, t in tasks.items()} == {
      'data0_retrieval': 96, 'data0_caption': 48, 'data0_breed': 80, 'data1_motion': 8, 'data2_words': 16}
  assert {t.batch_size for t in _tasks(photos, width=512, num_heads=8).values()} == {96}
  assert _tasks(*[_summary({'video': 'video', 'motion': 'class'})] * 20)['data0_motion'].batch_size == 8


@pytest.mark.parametrize('visual, width, num_sampled', [
    ('video', 128, 768), ('image', 128, 1024), ('image', 768, 1536)])
def test_a_third_of_the_labels_of_a_step_fits_into_the_sampled_vocabulary(visual, width, num_sampled):
  # 32 tokens of 16, 40 or 96 captions, and 12 words of 96 texts; a third of that, in multiples of 256 from 512.
  media = {'media': _summary({visual: visual, 'captions': 'texts'}, text_bytes=80)}
  words = _config(media | {'books': _summary({'text': 'text'})}, width=width, num_heads=8).target_sets.vocabulary
  assert words.num_sampled == num_sampled
  assert _config({'media': _summary({'video': 'video', 'captions': 'texts'})}).target_sets.vocabulary.num_sampled == 512


@pytest.mark.parametrize('text_bytes, tokens', [(0, 16), (34, 16), (35, 24), (63, 32), (500, 32)])
def test_captions_and_texts_are_as_long_as_those_of_the_data(text_bytes, tokens):
  tasks = _tasks(_summary({'image': 'image', 'captions': 'texts'}, text_bytes=text_bytes))
  assert tasks.data0_caption.max_len == tasks.data0_retrieval.max_len == tokens
  words = _tasks(_summary({'text': 'text'}, text_bytes=text_bytes)).data0_words
  assert words.max_len == (64 if text_bytes == 500 else tokens)


def test_texts_that_are_cut_are_noted_with_the_fields_to_raise(capsys):
  photos = {'image': 'image', 'captions': 'texts', 'breed': 'class'}
  _tasks(_summary(photos, text_bytes=73), _summary({'text': 'text'}, text_bytes=500))  # 32 tokens; windows of texts
  assert not capsys.readouterr().err
  _tasks(_summary(photos, text_bytes=74), _summary({'text': 'text', 'label': 'class'}, text_bytes=500))
  captions, texts = capsys.readouterr().err.splitlines()
  assert 'own:data0: 3 % of the texts have more than 74 bytes, about 32 tokens, and are cut to 32;' in captions
  assert 'raise tasks.data0_retrieval.max_len and tasks.data0_caption.max_len, and model.max_text_len=64' in captions
  assert 'cut to 64; to keep more, raise tasks.data1_label.max_len, and' in texts


@pytest.mark.parametrize('column, names, reason', [
    ('width', [str(i) for i in range(101)], '101 classes, all of them numbers'),
    ('similarity', [f'0.{i}' for i in range(101)], '101 classes, all of them numbers'),
    ('exif', ['a', 'x' * 145], 'a class of 145 bytes, too long for model.max_text_len=64'),
    ('label', [str(i) for i in range(101)], ''), ('year', [str(i) for i in range(100)], ''),
    ('model', [f'T{i}' for i in range(101)], ''), ('place', ['a', 'x' * 144], '')])
def test_numbers_and_long_texts_are_no_classes_to_learn(column, names, reason, capsys):
  summary = _summary({'image': 'image', column: 'class', 'breed': 'class'})
  summary['classes'][column]['names'] = names
  c = _config({'pets': summary})
  assert set(c.tasks) == set(c.target_sets) == {'pets_breed', *([] if reason else [f'pets_{column}'])}
  noted = capsys.readouterr().err
  assert f'note: own:pets: column {column!r} has {reason}, and gets no task' in noted if reason else not noted


def test_long_names_of_classes_get_all_positions_of_the_model():
  longest = lambda num_bytes: _config({'pets': _summary({'image': 'image', 'breed': 'class'}, ('a', 'x' * num_bytes))}
                                      ).target_sets.pets_breed.max_len
  assert (longest(31), longest(32)) == (32, 64)


@pytest.mark.parametrize('names', [('Left hand', 'Right hand'), ('left_hand', 'other'), ('other', 'hand-right')])
def test_images_are_mirrored_and_with_them_left_and_right_but_not_where_a_class_names_a_side(names):
  columns = {'image': 'image', 'captions': 'texts', 'hand': 'class'}
  tasks = _tasks(_summary(columns), _summary(columns, classes=names),
                 _summary({'video': 'video', 'captions': 'texts', 'motion': 'class'}))
  assert {name: (t.random_flip, t.mirrored_words) for name, t in tasks.items()} == {
      **{f'data{i}_{name}': (True, (('left', 'right'),)) for i in (0, 1) for name in ('retrieval', 'caption')},
      'data0_hand': (True, ()), 'data1_hand': (False, ()),
      **{f'data2_{name}': (False, ()) for name in ('retrieval', 'caption', 'motion')}}


def test_data_without_captions_classes_or_text_has_no_tasks():
  c = config.base()
  presets.own(c, {'photos': _summary({'image': 'image'})})
  assert not c.tasks and not c.evaluators
