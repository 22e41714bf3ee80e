"""What reads data leaves nothing in the temporary folder, however its process ends."""

import fnmatch
import subprocess
import sys

import pytest

from tests.helpers import processes, tiny

_BATCHES = """
import numpy as np
from tests.data import own_files
from tests.helpers import tiny
from tests.helpers.file_examples import build
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.batches.mixtures import BatchLayout, Mixture, evaluation_batches
from uni_moe_jax.data.shards.file_dataset import FileDataset
plan = make_plan(c := tiny.config('shape', 'text', 'pair', data_dir=sys.argv[1]))
data = Data(c, plan)
examples = {t.name: data.examples(t, training=True) for t in plan.tasks}
assert len(list(Mixture(plan, examples, 0, 'all_tasks', 4, BatchLayout()).iterate(0, 3))) == 3
image = own_files.encode_image(own_files.color_image('red', 0))
read = lambda ids: [{'image': image if i else b'no image', 'label': 'a'} for i in ids.tolist()]
files = FileDataset('own:x', 9, read, {'image': 'image', 'label': 'class'}, {'label': ('a', 'b')}, {}, '')
examples = build(files, crop='random_resized_crop', random_flip=True, random_erasing=.5, resize='fast')
assert len(list(evaluation_batches(examples, np.arange(9), 3))) == 3 and examples.corrupt_counter.num_corrupt
"""
_TFDS = """
from uni_moe_jax.data.shards import file_dataset
assert not file_dataset.tfds_builder('tfds:mnist', sys.argv[1]).info.splits
"""
_AUTOGRAPH = """
import tensorflow as tf
@tf.function
def positive(x):
  if x > 0:
    return x
  return -x
positive(tf.constant(1))
"""
_TFDS_ALONE = """
import tensorflow_datasets as tfds
tfds.builder('mnist', data_dir=sys.argv[1])
"""


@pytest.mark.parametrize('script, left', [
    (_BATCHES, ''), (_TFDS, ''), (_AUTOGRAPH, '__autograph_generated_file*.py'), (_TFDS_ALONE, 'tmp*tfds')],
    ids=['batches', 'a TFDS dataset', 'control: AutoGraph', 'control: TFDS'])
def test_nothing_is_left_in_the_temporary_folder(tmp_path, script, left):
  (temporary := tmp_path / 'temporary').mkdir()
  path = tmp_path / 'script.py'  # AutoGraph reads the source of a function
  path.write_text(f'import os, sys\n{script}\nos._exit(0)  # as commands end\n')
  data_dir = tiny.data_dir() if script == _BATCHES else str(tmp_path)
  done = subprocess.run([sys.executable, path, data_dir], capture_output=True, text=True,
                        env={**processes.environment(1), 'TMPDIR': str(temporary)})
  assert done.returncode == 0, done.stderr
  names = [path.name for path in temporary.iterdir()]
  if left:  # AutoGraph's file is compiled, too, into __pycache__
    assert fnmatch.filter(names, left)
  else:
    assert not names
