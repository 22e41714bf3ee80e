"""Examples of a dataset of files that a test makes up."""

import tensorflow as tf

from tests.helpers import tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data import hashing
from uni_moe_jax.data.examples.examples import ExampleBuilder

SIDE = 16  # of their images


def plan_task(task_type, **fields):
  """Return a task 'x' of a plan, on the source 'own:x'."""
  c = tiny.config(data_dir='')
  c.target_sets.ab = config_lib.target_set(('a', 'b'), family='words' if task_type == 'vqa' else 'names')
  c.tasks.x = config_lib.task(task_type, 'own:x', batch_size=4, **fields)
  return make_plan(c).tasks[0]


def build(dataset, task_type='image_classification', training=True, max_corrupt_fraction=0.5, label_column='label',
          target_set='ab', tokenizer=None, resize='pillow', channels=3, **fields):
  """Return examples of a task of `plan_task` on a dataset of files."""
  task = plan_task(task_type, label_column=label_column, target_set=target_set, **fields)
  return ExampleBuilder(
      tokenizer, {'ab': ('a', 'b')}, channels, SIDE, training, False, 0, max_corrupt_fraction, resize).build(
          task, dataset)


def make(examples, ids):
  """Return the features of examples, drawn for seed and epoch 0."""
  ids = tf.constant(ids, tf.int64)
  hashes = hashing.example_hash(0, 'x', tf.constant(0, tf.int64), ids)
  return {k: v.numpy() for k, v in examples.make(ids, hashes).items()}
