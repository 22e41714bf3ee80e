"""A run in the published dense layout: parameters of the exported tasks, temperature groups by published names."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.config.plan import TaskSpec
from uni_moe_jax.config.schema import PUBLISHED_GROUPS, PUBLISHED_TEMPERATURES
from uni_moe_jax.convert.torch_layout import LayoutError
from uni_moe_jax.export import torch_dense
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.tasks import task_types


def _task(name: str, group: str = '') -> TaskSpec:
  own = task_types.TaskType(name, task_types.TASK_TYPES['vqa'].inputs, 'words', 'slot', 'vqa')
  task_type = task_types.TASK_TYPES.get(name, own)
  return small_model.task_spec(task_type, name=f'a_{task_type.name}', temperature=group or task_type.name)


def _scales(chosen: list[TaskSpec], scales: dict[str, float]) -> dict[str, float]:
  """Published groups that differ from their initial value, as logarithms, of a dense model with these groups."""
  spec = small_model.spec('dense', temperature_groups=tuple(scales))
  params = {**small_model.params(spec), **{f'log_scale_{name}': np.float32(x) for name, x in scales.items()}}
  state = torch_dense.state(spec, params, list(map(ExportedTask, chosen)))
  logarithms = {name: float(state[f'loss_prepare.logit_scale_{name}']) for name in PUBLISHED_TEMPERATURES}
  return {name: x for name, x in logarithms.items() if x != pytest.approx(np.log(1 / .07))}


def test_every_task_type_has_a_published_group():
  assert set(PUBLISHED_GROUPS) == set(task_types.TASK_TYPES)
  assert set(PUBLISHED_GROUPS.values()) <= set(PUBLISHED_TEMPERATURES)


def test_a_group_gets_the_published_name_of_its_task_type_unless_it_has_one():
  chosen = [_task('image_classification'), _task('image_caption', 'words'), _task('video_classification', 'downstream')]
  scales = _scales(chosen, {'image_classification': 1.0, 'words': 2.0, 'downstream': 3.0, 'text_mlm': 4.0, 'mine': 5.0})
  assert scales == {'img_cls': 1.0, 'caption': 2.0, 'downstream': 3.0}  # no exported task uses the others


def test_task_types_of_one_published_group_share_a_scale():
  chosen = [_task('image_retrieval'), _task('video_retrieval')]
  assert _scales(chosen, {'image_retrieval': 2.0, 'video_retrieval': 2.0}) == {'retrieve': 2.0}
  assert _scales(chosen, {'image_retrieval': 2.0}) == {'retrieve': 2.0}


@pytest.mark.parametrize('chosen, message', [
    ([_task('text_mlm'), _task('text_classification')],
     r"'text_mlm' \(1/τ = 2.718\) and 'text_classification' \(7.389\) would both be 'text_mlm'.*--tasks"),
    ([_task('mine')], r"no temperature group for config.tasks.a_mine.type='mine'; it has groups for image_.*--tasks")])
def test_groups_without_a_published_equivalent_are_refused(chosen, message):
  with pytest.raises(LayoutError, match=message):
    _scales(chosen, {'text_mlm': 1.0, 'text_classification': 2.0, 'mine': 3.0})


def test_several_conditions_are_refused():
  spec = small_model.spec('modality', kernels=(('visual', 0), ('text', 1)))
  with pytest.raises(LayoutError, match=r'--torch: .* this export has 2 conditions \(visual, text\); .*--bake_targets'):
    torch_dense.state(spec, {}, [])


def test_frame_differences_are_dropped_without_video_tasks():
  spec = small_model.spec('dense', frame_differences=True, temperature_groups=('img_cls', 'downstream'))
  images = ExportedTask(_task('image_classification', 'img_cls'), num_frames=1)
  plain = dataclasses.replace(spec, frame_differences=False)
  jax.tree.map(np.testing.assert_array_equal, *(
      torch_dense.state(s, small_model.params(s), [images]) for s in (spec, plain)))
  videos = ExportedTask(_task('video_classification', 'downstream'), num_frames=3)
  with pytest.raises(LayoutError, match="but task 'a_video_classification' reads videos; .*--tasks"):
    torch_dense.state(spec, small_model.params(spec), [images, videos])
  assert torch_dense.state(plain, small_model.params(plain), [images, videos])
