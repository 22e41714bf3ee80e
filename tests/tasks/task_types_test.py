"""The table of task kinds against the published attribute rows, kinds that never were published, and refusals."""

import dataclasses

from absl.testing import absltest, parameterized

from uni_moe_jax.tasks import attributes, task_types
from uni_moe_jax.tasks.task_types import Segment, TaskType
from uni_moe_jax.utils import suggest

_VISUAL, _TEXT, _WORDS = Segment('visual'), Segment('text'), Segment('text', 'two_stream')

# Rows of the input segments in order. Published (Uni-Perceiver-MoE, table 1 and its code), but for vqa, which has none.
_IN_VISUAL, _IN_TEXT = '10011000', '01010100'
_CAPTION = ('11011000', '11010101')
_PUBLISHED = {
    'image_classification': (_IN_VISUAL,), 'video_classification': (_IN_VISUAL,),
    'image_retrieval': (_IN_VISUAL,), 'video_retrieval': (_IN_VISUAL,),
    'text_mlm': (_IN_TEXT,), 'text_classification': (_IN_TEXT,),
    'image_caption': _CAPTION, 'video_caption': _CAPTION,
    'vqa': ('11011000', '11010100'),
}


def _rows(kind: TaskType) -> tuple[str, ...]:
  return tuple(attributes.to_string(c.bits) for c in kind.conditions)


def _row(condition) -> str:
  return attributes.to_string(condition.bits)


class PublishedRowsTest(parameterized.TestCase):

  @parameterized.parameters(*_PUBLISHED.items())
  def test_input_segments_have_the_published_rows(self, name, rows):
    self.assertEqual(_rows(task_types.TASK_TYPES[name]), rows)

  def test_every_kind_is_in_the_table_above(self):
    self.assertEqual(set(task_types.TASK_TYPES), set(_PUBLISHED))

  @parameterized.parameters('image_retrieval', 'video_retrieval')
  def test_paired_text_has_the_published_row(self, name):
    self.assertEqual(_row(task_types.TASK_TYPES[name].pair_condition), '10010110')

  @parameterized.parameters(('names', '10010110'), ('words', '11010110'))
  def test_target_sets_have_the_published_rows(self, family, row):
    self.assertEqual(_row(task_types.families()[family]), row)

  def test_the_published_kinds_have_six_distinct_rows(self):
    published = [k for k in task_types.TASK_TYPES.values() if k.name != 'vqa']
    rows = [r for k in published for r in _rows(k)] + [_row(c) for c in task_types.families().values()]
    self.assertLen(set(rows), 6)

  @parameterized.parameters('classification', 'caption', 'retrieval')
  def test_a_video_has_the_conditions_of_an_image(self, what):
    image, video = task_types.TASK_TYPES[f'image_{what}'], task_types.TASK_TYPES[f'video_{what}']
    self.assertEqual(dataclasses.replace(video, name=image.name), image)
    self.assertEqual(video.conditions, image.conditions)

  def test_the_task_router_knows_six_tasks_and_two_families(self):
    self.assertEqual(task_types.router_tasks(), (
        'classification', 'mlm', 'caption', 'retrieval', 'text_classification', 'vqa', 'names', 'words'))


class OtherRowsTest(parameterized.TestCase):

  def test_rows_of_an_invented_kind(self):
    # A picture and its story, matched with a paired text. Task: visual and text in, text out: 1101 everywhere.
    #   picture: visual, input, full mask:   10 0 0 -> 11011000
    #   story:   text, input, causal:        01 0 1 -> 11010101
    #   pair:    text, target, full mask:    01 1 0 -> 11010110
    kind = TaskType('story', (_VISUAL, _WORDS), 'pair', 'cls', 'story')
    task_types.check_task_type(kind, task_types.families())
    self.assertEqual(_rows(kind), ('11011000', '11010101'))
    self.assertEqual(_row(kind.pair_condition), '11010110')

  def test_rows_of_an_invented_kind_without_pictures(self):
    # Text in, text out: 0101; input text 01 0 0, paired text 01 1 0.
    kind = TaskType('search', (_TEXT,), 'pair', 'cls', 'search')
    self.assertEqual((*_rows(kind), _row(kind.pair_condition)), ('01010100', '01010110'))

  def test_a_permuted_declaration_permutes_its_rows(self):
    # vqa with the question first: the same task, so the same two rows, in the other order.
    kind = TaskType('vqa_question_first', (_TEXT, _VISUAL), 'words', 'slot', 'vqa')
    task_types.check_task_type(kind, task_types.families())
    self.assertEqual(_rows(kind), ('11010100', '11011000'))

  def test_the_order_of_the_table_does_not_move_a_family(self):
    before = task_types.families()
    reverse = dict(reversed(task_types.TASK_TYPES.items()))
    with absltest.mock.patch.object(task_types, 'TASK_TYPES', reverse):
      self.assertEqual(task_types.families.__wrapped__(), before)

  def test_a_family_of_its_own_has_the_bits_that_it_declares(self):
    self.assertEqual(str(task_types.family_condition('answers', (0, 1, 0, 1))), '01010110 (answers, text)')


class FrozenFamiliesTest(absltest.TestCase):

  # A picture and a text that choose among names would make the names' 1001 a 1101.
  _KIND = TaskType('described_class', (_VISUAL, _TEXT), 'names', 'cls', 'described_class')

  def test_a_kind_that_would_change_a_family_is_refused(self):
    with self.assertRaisesRegex(ValueError, (
        r"kind 'described_class' with task bits \(1, 1, 0, 1\) would change the frozen bits \(1, 0, 0, 1\) of target "
        r"family 'names': declare a new family for it, so that trained rows never move")):
      task_types.check_task_type(self._KIND, task_types.families())

  def test_with_a_family_of_its_own_it_is_accepted(self):
    own = task_types.family_condition('described_names', (1, 1, 0, 1))
    kind = dataclasses.replace(self._KIND, target='described_names')
    task_types.check_task_type(kind, {**task_types.families(), 'described_names': own})

  def test_a_kind_with_fewer_modalities_than_its_family_is_accepted(self):
    task_types.check_task_type(TaskType('tag', (_VISUAL,), 'words', 'cls', 'tag'), task_types.families())


class CheckKindTest(parameterized.TestCase):

  @parameterized.parameters(*task_types.TASK_TYPES.values())
  def test_built_in_kinds_pass(self, kind):
    task_types.check_task_type(kind, task_types.families())

  @parameterized.named_parameters(
      ('no_input', dict(inputs=()), 'has no input segment; give at least one'),
      ('readout', dict(readout='last'), r"readout 'last' is not one of \('cls', 'masked', 'queries', 'slot'\)"),
      ('modality', dict(inputs=(Segment('audio'),)), r"modality 'audio' is not one of \('visual', 'text'\)"),
      ('mask', dict(inputs=(Segment('visual', 'causal'),)), r"mask 'causal' is not one of \('full', 'two_stream'\)"),
      ('two_texts', dict(inputs=(_TEXT, _TEXT)), 'two text segments; join them by a template into one'),
      ('causal_prefix', dict(inputs=(_WORDS,)), "first segment holds the prefix and must have mask 'full'"),
      ('queries', dict(readout='queries'), "readout 'queries' needs a segment with mask 'two_stream'"),
      ('masked', dict(readout='masked'), "readout 'masked' needs a text segment"),
      ('slot', dict(readout='slot'), "readout 'slot' needs a text segment"),
      ('two_stream_picture', dict(inputs=(_VISUAL, Segment('visual', 'two_stream'))), "'two_stream' is for words"),
      ('slot_of_a_caption', dict(inputs=(_VISUAL, _WORDS), target='words', readout='slot'),
       "readout 'slot' needs a text segment with mask 'full'"),
      ('pair', dict(inputs=(_TEXT,), target='pair', readout='slot'), "target 'pair' needs readout 'cls', not 'slot'"),
      ('family', dict(target='word'), r"target family 'word' is not declared; did you mean 'words'\? choices: names, "
       'pair, words'))
  def test_a_malformed_row_is_refused_by_name(self, change, message):
    kind = TaskType(**{**dict(name='odd', inputs=(_VISUAL,), target='names', readout='cls', router_task='odd'), **change})
    with self.assertRaisesRegex(ValueError, f"kind 'odd'.*{message}"):
      task_types.check_task_type(kind, task_types.families())


class PropertiesTest(parameterized.TestCase):

  @parameterized.parameters(
      # kind, visual, index of the text, two-stream
      ('image_classification', True, None, False),
      ('text_mlm', False, 0, False),
      ('image_caption', True, 1, True),
      ('vqa', True, 1, False))
  def test_what_a_kind_holds(self, name, visual, text_index, two_stream):
    kind = task_types.TASK_TYPES[name]
    self.assertEqual((kind.visual, kind.text_index, kind.two_stream), (visual, text_index, two_stream))


class NearestTest(absltest.TestCase):

  def test_near_names_come_first_then_all_in_order(self):
    self.assertEqual(suggest.nearest('atribute', ['token', 'attribute', 'dense']),
                     "did you mean 'attribute'? choices: attribute, dense, token")

  def test_without_near_names_all_are_listed(self):
    self.assertEqual(suggest.nearest('zzz', ['b', 'a']), 'choices: a, b')

  def test_without_choices_it_says_so(self):
    self.assertEqual(suggest.nearest('zzz', []), 'choices: none')


if __name__ == '__main__':
  absltest.main()
