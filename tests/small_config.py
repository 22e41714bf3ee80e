"""A small config that is right: what the tests of configs change."""

import ml_collections

from uni_moe_jax import config as fields

SLOT = '{text} <eot> it is <spe> . <eot>'


def config() -> ml_collections.ConfigDict:
  """Small and right, with a task of every kind of target."""
  c = fields.base()
  c.model.update(dict(layers=4, width=16, heads=2, hidden=32, image_size=16, patch=8, max_text=32))
  c.sets.classes = fields.target_set(('bar', 'disc'), family='names')
  c.sets.packages = fields.target_set(('alpha', 'beta'), family='words')
  c.sets.vocabulary = fields.target_set('vocabulary', family='words')
  c.tasks.shape = fields.task('image_classification', 'glyphs', batch=8, target_set='classes', label='class')
  c.tasks.text = fields.task('text_mlm', 'corpus', batch=4, target_set='vocabulary', length=16, picks=3)
  c.tasks.name = fields.task(
      'image_caption', 'glyphs', batch=4, target_set='vocabulary', captions=('{name}',), length=6)
  c.tasks.pair = fields.task('image_retrieval', 'glyphs', batch=4, captions=('{name}',), length=8)
  c.tasks.package = fields.task(
      'text_classification', 'texts', batch=4, target_set='packages', label='package', template=SLOT, length=16)
  return c
