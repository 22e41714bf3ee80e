"""Task types: the published attribute rows, unpublished task types, and errors."""

import pytest

from uni_moe_jax.tasks import attributes, task_types
from uni_moe_jax.tasks.task_types import Segment, TaskType
from uni_moe_jax.utils import suggest
from uni_moe_jax.utils.errors import UsageError

_VISUAL, _TEXT, _WORDS = Segment('visual'), Segment('text'), Segment('text', 'two_stream')

# Attribute rows of the input segments in order. Published (Uni-Perceiver-MoE, table 1 and its code), but for vqa.
_IN_VISUAL, _IN_TEXT = '10011000', '01010100'
_CAPTION = ('11011000', '11010101')
_PUBLISHED = {
    'image_classification': (_IN_VISUAL,), 'video_classification': (_IN_VISUAL,),
    'image_retrieval': (_IN_VISUAL,), 'video_retrieval': (_IN_VISUAL,),
    'text_mlm': (_IN_TEXT,), 'text_classification': (_IN_TEXT,),
    'image_caption': _CAPTION, 'video_caption': _CAPTION,
    'vqa': ('11011000', '11010100'),
}


def _row(condition) -> str:
  return attributes.to_string(condition.bits)


def _rows(task_type: TaskType) -> tuple[str, ...]:
  return tuple(map(_row, task_type.conditions))


def test_input_segments_have_the_published_rows():
  assert {name: _rows(t) for name, t in task_types.TASK_TYPES.items()} == _PUBLISHED


@pytest.mark.parametrize('name', ['image_retrieval', 'video_retrieval'])
def test_paired_text_has_the_published_row(name):
  assert _row(task_types.TASK_TYPES[name].pair_condition) == '10010110'


@pytest.mark.parametrize('family, row', [('names', '10010110'), ('words', '11010110')])
def test_target_sets_have_the_published_rows(family, row):
  assert _row(task_types.families()[family]) == row


def test_the_task_router_embeds_six_tasks_and_two_families():
  assert task_types.router_tasks() == (
      'classification', 'mlm', 'caption', 'retrieval', 'text_classification', 'vqa', 'names', 'words')


def test_rows_of_an_invented_task_type():
  # An image and its story, matched with a paired text. Task: visual and text in, text out: 1101 everywhere.
  #   image: visual, input, full mask:   10 0 0 -> 11011000
  #   story: text, input, causal:        01 0 1 -> 11010101
  #   pair:  text, target, full mask:    01 1 0 -> 11010110
  story = TaskType('story', (_VISUAL, _WORDS), 'pair', 'cls', 'story')
  task_types.check_task_type(story, task_types.families())
  assert (*_rows(story), _row(story.pair_condition)) == ('11011000', '11010101', '11010110')


def test_permuted_segments_permute_the_rows():
  # vqa with the question first: the same task, so the same two rows, in the other order.
  permuted = TaskType('vqa_question_first', (_TEXT, _VISUAL), 'words', 'slot', 'vqa')
  task_types.check_task_type(permuted, task_types.families())
  assert _rows(permuted) == ('11010100', '11011000')


def test_a_new_family_has_the_bits_that_it_declares():
  assert str(task_types.family_condition('answers', (0, 1, 0, 1))) == '01010110 (answers, text)'


def test_a_task_type_that_would_change_a_family_is_an_error():
  # An image and a text that choose among names would turn the 1001 of names into 1101.
  with pytest.raises(UsageError, match=(
      r"task type 'described_class' with task bits \(1, 1, 0, 1\) would change the frozen bits \(1, 0, 0, 1\) of "
      r"target family 'names': declare a new family for it, so that trained routers stay valid")):
    task_types.check_task_type(
        TaskType('described_class', (_VISUAL, _TEXT), 'names', 'cls', 'described_class'), task_types.families())


@pytest.mark.parametrize('task_type', [
    TaskType('tag', (_VISUAL,), 'words', 'cls', 'tag'),  # fewer modalities than its family
    *task_types.TASK_TYPES.values()], ids=lambda t: t.name)
def test_a_valid_task_type_passes(task_type):
  task_types.check_task_type(task_type, task_types.families())


@pytest.mark.parametrize('changes, message', [
    (dict(inputs=()), 'has no input segment; give at least one'),
    (dict(readout='last'), r"readout 'last' is not one of \('cls', 'masked', 'queries', 'slot'\)"),
    (dict(inputs=(Segment('audio'),)), r"modality 'audio' is not one of \('visual', 'text'\)"),
    (dict(inputs=(Segment('visual', 'causal'),)), r"mask 'causal' is not one of \('full', 'two_stream'\)"),
    (dict(inputs=(_TEXT, _TEXT)), 'two text segments; join them by a template into one'),
    (dict(inputs=(_WORDS,)), "first segment contains the readout token and must have mask 'full'"),
    (dict(readout='queries'), "readout 'queries' needs a segment with mask 'two_stream'"),
    (dict(readout='masked'), "readout 'masked' needs a text segment"),
    (dict(readout='slot'), "readout 'slot' needs a text segment"),
    (dict(inputs=(_VISUAL, Segment('visual', 'two_stream'))), "'two_stream' is for words"),
    (dict(inputs=(_VISUAL, _WORDS), target='words', readout='slot'),
     "readout 'slot' needs a text segment with mask 'full'"),
    (dict(inputs=(_TEXT,), target='pair', readout='slot'), "target 'pair' needs readout 'cls', not 'slot'"),
    (dict(target='word'), r"target family 'word' is not declared; did you mean 'words'\? choices: names, pair, words")])
def test_a_malformed_task_type_is_an_error_that_names_it(changes, message):
  odd = TaskType(**{**dict(name='odd', inputs=(_VISUAL,), target='names', readout='cls', router_task='odd'), **changes})
  with pytest.raises(UsageError, match=f"task type 'odd'.*{message}"):
    task_types.check_task_type(odd, task_types.families())


@pytest.mark.parametrize('name, visual, text_index, two_stream', [
    ('image_classification', True, None, False), ('text_mlm', False, 0, False), ('image_caption', True, 1, True),
    ('vqa', True, 1, False)])
def test_properties_follow_from_the_segments(name, visual, text_index, two_stream):
  t = task_types.TASK_TYPES[name]
  assert (t.visual, t.text_index, t.two_stream) == (visual, text_index, two_stream)


@pytest.mark.parametrize('name, choices, message', [
    ('atribute', ['token', 'attribute', 'dense'], "did you mean 'attribute'? choices: attribute, dense, token"),
    ('zzz', ['b', 'a'], 'choices: a, b'), ('zzz', [], 'choices: none')])
def test_near_names_come_first_then_all_in_order(name, choices, message):
  assert suggest.nearest(name, choices) == message
