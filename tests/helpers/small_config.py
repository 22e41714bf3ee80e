"""A small valid config, which tests change."""

from collections.abc import MutableMapping
from typing import Any

import ml_collections

from uni_moe_jax import config as fields

SLOT = '{text} <eot> it is <spe> . <eot>'


def config() -> ml_collections.ConfigDict:
  """A config with one task per target: names, words, the vocabulary, pairs."""
  c = fields.base()
  c.model.update(dict(num_layers=4, width=16, num_heads=2, mlp_dim=32, image_size=16, patch_size=8, max_text_len=32))
  c.target_sets.classes = fields.target_set(('bar', 'disc'), family='names')
  c.target_sets.packages = fields.target_set(('alpha', 'beta'), family='words')
  c.target_sets.vocabulary = fields.target_set('vocabulary', family='words')
  c.tasks.shape = fields.task(
      'image_classification', 'glyphs', batch_size=8, target_set='classes', label_column='class')
  c.tasks.text = fields.task('text_mlm', 'corpus', batch_size=4, target_set='vocabulary', max_len=16, max_predictions=3)
  c.tasks.name = fields.task(
      'image_caption', 'glyphs', batch_size=4, target_set='vocabulary', caption_templates=('{name}',), max_len=6)
  c.tasks.pair = fields.task('image_retrieval', 'glyphs', batch_size=4, caption_templates=('{name}',), max_len=8)
  c.tasks.package = fields.task('text_classification', 'texts', batch_size=4, target_set='packages',
                                label_column='package', template=SLOT, max_len=16)
  return c


def assign(tree: MutableMapping[str, Any] | ml_collections.ConfigDict, path: str, value: Any) -> None:
  """Set the field at `path`, such as 'tasks.shape.batch_size'."""
  *sections, name = path.split('.')
  for section in sections:
    tree = tree[section]
  tree[name] = value
