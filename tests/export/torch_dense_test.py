"""A run in the published dense layout: what the exported tasks need of it, temperature groups under the names of their kinds."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.config.schema import PUBLISHED_GROUPS, PUBLISHED_TEMPERATURES
from uni_moe_jax.export import torch_dense
from uni_moe_jax.export.programs import Asked
from uni_moe_jax.export.torch_layout import LayoutError
from uni_moe_jax.tasks import task_types


def _task(kind: str, group: str = '') -> TaskSpec:
  kind = task_types.TASK_TYPES.get(kind, task_types.TaskType(kind, task_types.TASK_TYPES['vqa'].inputs, 'words', 'slot', 'vqa'))
  return TaskSpec(
      name=f'a_{kind.name}', type=kind, group='', source='', split='', batch_size=1, loss_weight=1.0, sampling_weight=0.0,
      temperature=group or kind.name, target_set='', label_column='', caption_templates=(), template='', max_len=4, max_predictions=2, label_smoothing=0.0, max_shift=0)


def _scales(chosen: list[TaskSpec], scales: dict[str, float]) -> dict[str, float]:
  """Groups of the published layout that are not at their initial value, as logarithms: of a dense model with these groups."""
  spec = small_model.spec('dense', temperature_groups=tuple(scales))
  params = {**small_model.params(spec), **{f'log_scale_{name}': np.float32(x) for name, x in scales.items()}}
  state = torch_dense.state(spec, params, list(map(Asked, chosen)))
  found = {name: float(state[f'loss_prepare.logit_scale_{name}']) for name in PUBLISHED_TEMPERATURES}
  return {name: x for name, x in found.items() if x != pytest.approx(np.log(1 / .07))}


def test_every_kind_has_a_published_group():
  assert set(PUBLISHED_GROUPS) == set(task_types.TASK_TYPES) and set(PUBLISHED_GROUPS.values()) <= set(PUBLISHED_TEMPERATURES)


def test_a_group_gets_the_name_of_its_kind_unless_it_has_a_published_one():
  chosen = [_task('image_classification'), _task('image_caption', 'words'), _task('video_classification', 'downstream')]
  found = _scales(chosen, {'image_classification': 1.0, 'words': 2.0, 'downstream': 3.0, 'text_mlm': 4.0, 'mine': 5.0})
  assert found == {'img_cls': 1.0, 'caption': 2.0, 'downstream': 3.0}  # no exported task has the others


def test_tasks_of_one_name_share_a_scale():
  assert _scales([_task('image_retrieval'), _task('video_retrieval')], {'image_retrieval': 2.0, 'video_retrieval': 2.0}) == {
      'retrieve': 2.0}
  assert _scales([_task('image_retrieval'), _task('video_retrieval')], {'image_retrieval': 2.0}) == {'retrieve': 2.0}


@pytest.mark.parametrize('chosen, said', [
    ([_task('text_mlm'), _task('text_classification')],
     r"'text_mlm' \(1/τ = 2.718\) and 'text_classification' \(7.389\) would both be 'text_mlm'.*--tasks"),
    ([_task('mine')], r"no temperature group for config.tasks.a_mine.type='mine'; it has those of image_.*--tasks")])
def test_what_has_no_group_of_its_own_there_is_refused(chosen, said):
  with pytest.raises(LayoutError, match=said):
    _scales(chosen, {'text_mlm': 1.0, 'text_classification': 2.0, 'mine': 3.0})


def test_several_conditions_have_no_place():
  spec = small_model.spec('modality', kernels=(('visual', 0), ('text', 1)))
  with pytest.raises(LayoutError, match=r'--torch: .* this export has 2 conditions \(visual, text\); .*--fixed_sets'):
    torch_dense.state(spec, {}, [])


def test_changes_of_frames_stay_behind_where_no_task_sees_clips():
  spec = small_model.spec('dense', frame_differences=True, temperature_groups=('img_cls', 'downstream'))
  pictures = Asked(_task('image_classification', 'img_cls'), num_frames=1)
  plain = dataclasses.replace(spec, frame_differences=False)
  jax.tree.map(np.testing.assert_array_equal, *(
      torch_dense.state(s, small_model.params(s), [pictures]) for s in (spec, plain)))
  clips = Asked(_task('video_classification', 'downstream'), num_frames=3)
  with pytest.raises(LayoutError, match="config.model.frame_differences, and task 'a_video_classification' sees clips; .*--tasks"):
    torch_dense.state(spec, small_model.params(spec), [pictures, clips])
  assert torch_dense.state(plain, small_model.params(plain), [pictures, clips])
