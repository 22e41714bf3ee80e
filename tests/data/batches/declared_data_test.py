"""Declared data: batches and target sets have the shapes of real ones."""

import jax
import pytest
import tensorflow as tf

from tests.helpers import tiny
from uni_moe_jax import config
from uni_moe_jax.config import presets
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.declared_data import DeclaredData
from uni_moe_jax.preflight import compiled_programs
from uni_moe_jax.train import run


def _config(accum: int = 1):
  c = tiny.config(*tiny.TASKS, data_dir=tiny.data_dir())
  for t in c.tasks.values():
    t.batch_size = 8
  c.train.grad_accum_steps = accum
  c.tokenizer.path = tiny.tokenizer_file()
  c.tokenizer.vocab_size = 60  # of that file
  c.preflight.num_frames.motion = tiny.NUM_FRAMES
  return c


def _described(tree):
  return jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype), x.sharding), tree)


@pytest.mark.parametrize('accum', [1, 2])
def test_batches_have_the_shapes_and_shardings_of_real_ones(accum):
  c = _config(accum)
  # Real sets first: the lengths of their entries are then declared.
  real = run.build(c, jax.devices()[:4])
  for s in real.plan.sets:
    if not s.is_vocabulary:
      rows = [int(n) for b in real.data.target_sets[s.name].buckets for n in b['valid'].sum(1)]
      c.preflight.target_lengths[s.name] = tuple((n, rows.count(n)) for n in sorted(set(rows)))
  _, batch = next(real.mixture().iterate(0, 1))
  declared = compiled_programs.prepare(c, jax.devices()[:4])
  assert _described(compiled_programs.batch_shapes(declared, declared.plan.tasks)) == _described(real.put_batch(batch))
  assert _described(compiled_programs.target_set_shapes(declared)) == _described(real.target_sets())
  assert _described(declared.abstract_state()) == _described(real.abstract_state())


@pytest.mark.parametrize('synonyms', [True, False])
def test_every_synonym_of_an_entry_in_the_config_is_a_text(synonyms):
  c = _config()
  c.target_sets.shapes.update(entries=(('a', 'cat', 'tom', 'kitty'), ('b', 'dog')), synonyms=synonyms, max_len=5)
  c.preflight.target_lengths.update(dict.fromkeys(('answers', 'motions', 'packages'), ((4, 3),)))
  (bucket,) = compiled_programs.prepare(c, jax.devices()[:4]).data.target_sets['shapes'].buckets
  assert bucket['text'].shape == ((2, 3, 5) if synonyms else (2, 5))
  assert not synonyms or bucket['count'].tolist() == [3, 1]


def test_a_set_without_declared_lengths_is_reported():
  c = _config()
  with pytest.raises(ValueError, match=r'config\.preflight\.target_lengths\.answers is missing: .*give \(\(tokens, '
                                       r'entries\), …\), for example \(\(16, 1000\),\)\.'):
    DeclaredData(c, make_plan(c))


def test_entries_listed_in_the_config_have_the_max_len_of_their_set():
  c = _config()
  for name in ('shapes', 'motions', 'packages', 'answers'):
    c.target_sets[name] = config.target_set(('a', 'b', 'c'), family=c.target_sets[name].family)
  data = DeclaredData(c, make_plan(c))
  [bucket] = data.target_sets['shapes'].buckets
  assert bucket['text'].shape == (3, 16) and bucket['valid'].all()
  assert data.target_sets['words'].size == 60


@pytest.mark.parametrize('field, value, message', [
    ('target_lengths.nothing', ((4, 3),), "'nothing' is unknown"),
    ('target_lengths.shapes', 1000, r'1000 must contain \(tokens, entries\) pairs'),
    ('target_lengths.shapes', ((17, 3),), '.*tokens in 2…config.target_sets.shapes.max_len=16'),
    ('target_lengths.shapes', ((4, 0),), '.*entries at least 1'),
    ('target_lengths.shapes', 2.5, r'2.5 must contain \(tokens, entries\) pairs'),
    ('target_lengths.shapes', ((4.5, 3),), r'\(\(4.5, 3\),\) must contain \(tokens, entries\) pairs'),
    ('num_frames.motion', ({'a': 1},), r"\({'a': 1},\) must be a whole number in 1…"),
    ('num_frames.motion', 2.5, '2.5 must be a whole number in 1…config.model.max_num_frames=4'),
    ('num_frames.motion', 9, '9 must be a whole number in 1…config.model.max_num_frames=4'),
    ('num_frames.nothing', 2, "'nothing' is unknown"),
])
def test_an_invalid_declaration_is_reported(field, value, message):
  c = _config()
  table, name = field.split('.')
  if name in c.preflight[table]:
    del c.preflight[table][name]  # ConfigDict refuses a value of another type
  c.preflight[table][name] = value
  with pytest.raises(ValueError, match=f'config.preflight.{field}={message}'):
    make_plan(c)


def test_presets_declare_the_sizes_of_the_embedded_data():
  c = config.base()
  presets.embedded(c)
  plan = make_plan(c)
  data = DeclaredData(c, plan)
  assert {s.name: data.target_sets[s.name].size for s in plan.sets if not s.is_vocabulary} == {
      'answers': 27, 'glyph_classes': 52, 'motions': 12, 'packages': 10}
  make = data.examples(next(t for t in plan.tasks if t.name == 'video_motion')).make
  assert make(tf.zeros([5], tf.int64), tf.zeros([5], tf.uint64))['pixels'].shape == (5, 8, 32, 32, 3)
