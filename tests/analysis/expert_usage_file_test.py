"""experts.json and its figure."""

import json

import numpy as np
import pytest
from PIL import Image

from uni_moe_jax.analysis import expert_usage_file


def content(**changes):
  """Two layers, one router, three conditions, two tasks: in layer 4 they share no expert."""
  shares = [[[[1., 0, 0], [.5, .5, 0], [0, 0, 1]]], [[[0., 0, 1], [1, 0, 0], [0, 1, 0]]]]
  return {
      'checkpoint': 'step <7>', 'num_batches': 0, 'seed': 0, 'router': 'attribute', 'num_experts': 3, 'top_k': 2,
      'layers': [0, 4], 'sublayers': ['mlp'], 'conditions': ['1001', 'visual one', '1100'], 'tokens': None,
      'tasks': {'names <a>': {'visual': 0, 'classes': 1}, 'motion': {'visual': 0, 'words': 2, 'queries': 2}},
      'coefficients': shares, 'router_entropy': [[[0, .69, 0]], [[0, 0, 0]]], 'entropy': [[[0, .69, 0]], [[0, 0, 0]]],
      'effective_experts': [[[1, 2, 1]], [[1, 1, 1]]], 'task_overlap': [[[[1, .5], [.5, 1]]], [[[1, 0], [0, 1]]]],
      'mean_task_overlap': [[1, .25], [.25, 1]], **changes}


def test_the_label_of_a_condition_has_its_spans_unless_its_name_has_one():
  assert expert_usage_file.labels(content()) == ['1001 (visual)', 'visual one (classes)', '1100 (words, queries)']
  assert expert_usage_file.labels(content(conditions=['motion visual', 'classes', 'words'])) == [
      'motion visual', 'classes', 'words']
  many = {f't{i}': {f'set{i}': 0} for i in range(6)}
  assert expert_usage_file.labels(content(tasks=many))[0] == '1001 (set0, set1, set2, set3, …)'


def test_the_figure_has_dark_cells_only_where_an_expert_has_a_full_share(tmp_path):
  paths = expert_usage_file.write(content(), tmp_path / 'new', 'experts')
  assert [p.name for p in paths] == ['experts.json', 'experts.png']
  assert json.loads(paths[0].read_text()) == content()

  def dark(path):
    with Image.open(path) as image:
      return sum(n for n, (r, _, b) in image.convert('RGB').getcolors(1 << 20) if b - r > 60 and r < 30)
  even = content(coefficients=np.full((2, 1, 3, 3), 1 / 3).tolist(), mean_task_overlap=[[0, 0], [0, 0]])
  assert dark(paths[1]) > 10 * max(dark(expert_usage_file.write(even, tmp_path, 'even')[1]), 100)


def test_nan_is_not_written(tmp_path):
  with pytest.raises(ValueError):
    expert_usage_file.write(content(entropy=[float('nan')]), tmp_path, 'experts')
  assert not (tmp_path / 'experts.json').exists()
