"""Names and types of config fields: each mistake of a config file is an error that names the field."""

import json

import ml_collections
import pytest

from tests.helpers import small_config
from uni_moe_jax import config
from uni_moe_jax.config import presets, schema
from uni_moe_jax.train import workdir
from uni_moe_jax.utils.errors import UsageError


def _plain() -> dict:
  return json.loads(json.dumps(small_config.config().to_dict()))


def _check(tree: dict) -> None:
  schema.parse_config(ml_collections.ConfigDict(workdir._tuples(tree)))


def test_valid_configs_pass():
  _check(_plain())
  c = config.base()
  presets.embedded(c)
  presets.published(c)
  presets.prompt_tune(c)
  c.moe.placement = (0, 2)
  c.target_sets.own = config.target_set((('a dog', 'a hound'), 'a cat'), family='names')
  schema.parse_config(c)


@pytest.mark.parametrize('path, value, message', [
    ('model.width', '16', r"config\.model\.width='16' must be a whole number"),
    ('model.width', 16.5, r'config\.model\.width=16\.5 must be a whole number'),
    ('model.width', True, r'config\.model\.width=True must be a whole number'),
    ('model.width', 10**40, r'config\.model\.width=1000.* must be a whole number'),
    ('optim.learning_rate', None, r'config\.optim\.learning_rate=None must be a finite number'),
    ('optim.learning_rate', float('nan'), r'config\.optim\.learning_rate=nan must be a finite number'),
    ('train.encode_all_sets', 1, r'config\.train\.encode_all_sets=1 must be True or False'),
    ('moe.router', ['token'], r"config\.moe\.router=\('token',\) must be a string"),
    ('moe.placement', 3, r'config\.moe\.placement=3 must be a string or a tuple of whole numbers'),
    ('model.pixel_mean', .5, r'config\.model\.pixel_mean=0\.5 must be a tuple of numbers'),
    ('model.pixel_mean', [.5, None, .5], r'config\.model\.pixel_mean\[1\]=None must be a finite number'),
    ('optim.param_groups', ['.*'], r"config\.optim\.param_groups\[0\]='\.\*' must be a tuple"),
    ('tasks.name.caption_templates', [3], r'config\.tasks\.name\.caption_templates\[0\]=3 must be a string'),
    ('tasks.shape', None, r'config\.tasks\.shape=None must be a section with the fields '),
    ('tasks', [], r'config\.tasks=\(\) must be a section of named entries'),
    ('target_sets.classes.entries', 3,
     r'config\.target_sets\.classes\.entries=3 must be a string or a tuple of strings'),
    ('target_sets.classes.entries', [[3]], r'config\.target_sets\.classes\.entries\[0\]\[0\]=3 must be a string'),
    ('data.dir', 'gcs://bucket/data', r"config\.data\.dir='gcs://bucket/data' has the unknown scheme 'gcs'"),
    ('tasks.shape.source', 'gs://b/x', r"config\.tasks\.shape\.source='gs://b/x' has the bucket 'b'"),
    ('train', 'fast', r"config\.train='fast' must be a section with the fields "),
    ('train.stpes', 3, r"config\.train\.stpes: the config has no such field; did you mean 'steps'"),
    ('tasks.shape.bacth', 3, r"config\.tasks\.shape\.bacth: the config has no such field; did you mean 'batch_size'"),
])
def test_the_error_names_the_field(path, value, message):
  tree = _plain()
  small_config.assign(tree, path, value)
  with pytest.raises(UsageError, match=message):
    _check(tree)


def test_a_missing_field_is_named_with_its_default():
  tree = _plain()
  del tree['train']['grad_accum_steps']
  with pytest.raises(UsageError, match=r'config\.train\.grad_accum_steps is missing; its default is 1\.'):
    _check(tree)


def test_a_number_that_is_too_long_to_print_is_still_an_error():
  with pytest.raises(UsageError, match=r'config\.seed=a number with thousands of digits must be'):
    _check(_plain() | {'seed': 10**6000})
