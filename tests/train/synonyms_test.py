"""Target sets in a step and in an evaluation: one synonym per class and step, the mean of all; entries in order."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import small_model
from uni_moe_jax.config.plan import Plan, SetSpec
from uni_moe_jax.data.batches import target_sets
from uni_moe_jax.eval import predictor
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.model.sequences import InputSequence
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tasks import task_types
from uni_moe_jax.train.forward import StepSpec, forward, sample_synonyms


def _sets(n=3000):
  """Entries of three, one and two texts in turn; text y of an entry is the token y."""
  count = np.resize([3, 1, 2], n).astype(np.int32)
  text = np.broadcast_to(np.arange(3, dtype=np.int32)[None, :, None], (n, 3, 2))
  bucket = {'text': jnp.asarray(text), 'valid': jnp.ones((n, 3, 2), bool), 'count': jnp.asarray(count)}
  plain = {'text': jnp.zeros((4, 2), jnp.int32), 'valid': jnp.ones((4, 2), bool)}
  names, plain = {'buckets': (bucket,), 'order': jnp.arange(n)}, {'buckets': (plain,), 'order': jnp.arange(4)}
  return {'names': names, 'plain': plain}


def test_every_synonym_is_equally_likely_and_drawn_anew_each_step():
  sets = _sets()
  one, again, other = (np.asarray(sample_synonyms(sets, jax.random.key(k))['names']['buckets'][0]['text'])
                       for k in (0, 0, 1))
  assert one.shape == (3000, 2)
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
  assert (one[1::3] == 0).all()  # one text
  counts = np.bincount(one[::3, 0], minlength=3)
  assert (abs(counts - 1000 / 3) < 4 * np.sqrt(1000 * 2 / 9)).all()
  assert abs(one[2::3, 0].mean() - 0.5) < 4 * np.sqrt(0.25 / 1000)


def test_sets_without_synonyms_are_unchanged():
  sets = _sets(3)
  assert sample_synonyms(sets, jax.random.key(0))['plain']['buckets'][0] is sets['plain']['buckets'][0]


def test_evaluation_averages_the_features_of_all_synonyms():
  mean = predictor._mean_of_synonyms(np.array([[2, 0], [0, 1], [3, 4]], np.float32), np.array([2, 1], np.int32))
  np.testing.assert_allclose(mean, [[0.5, 0.5], [0.6, 0.8]], rtol=1e-6)
  assert mean.dtype == np.float32


_CONDITION = task_types.families()['names']


def _model():
  model = UniPerceiver(small_model.spec('dense', num_layers=1))
  return model, small_model.params(model.spec)


def _tokens(rng, n):
  return rng.integers(2, small_model.VOCABULARY, n).tolist()


def _alone(model, params, row):
  """Normalized features of one text."""
  bucket = {'text': np.array([row], np.int32), 'valid': np.ones((1, len(row)), bool)}
  [sequence] = InputSequence.of_buckets('plain', _CONDITION, (bucket,), np.zeros(1, np.int32), False)
  return np.asarray(normalize(predictor.encode(model, params, sequence)[0, 0]))


def _sets_of(entries):
  """(Specs, target sets) by name of tokenized entries."""
  sets = {name: target_sets.TargetSet(*target_sets.bucket_by_length(rows, small_model.EOT), ()) for name, rows in
          entries.items()}
  specs = {name: SetSpec(name=name, entries=('text',), family='names', condition=_CONDITION, max_len=4)
           for name in sets}
  return specs, sets


def _assert_means(model, params, specs, sets, expected):
  """expected: normalized features of the names of every entry, by set."""
  evaluated = predictor.Predictor(model, params, {name: (specs[name], s) for name, s in sets.items()},
                                  types.SimpleNamespace(eot=small_model.EOT))
  for name, of_set in expected.items():
    means = np.array([np.mean(names, axis=0) for names in of_set])
    np.testing.assert_allclose(evaluated.target_set(name), normalize(means), rtol=1e-4, atol=1e-5)


def test_every_name_is_encoded_once_in_parts_of_one_size_however_many_names_an_entry_has(monkeypatch):
  monkeypatch.setattr(predictor, '_ROWS_AT_ONCE', 8)
  rng, (model, params) = np.random.default_rng(0), _model()
  entries = [[_tokens(rng, 4) for _ in range(20 if i == 7 else 1)] for i in range(14)]
  expected = [[_alone(model, params, name) for name in names] for names in entries]
  encode, encoded = predictor.encode, []
  monkeypatch.setattr(predictor, 'encode', lambda *args: [encoded.append(args[-1]), encode(*args)][1])
  _assert_means(model, params, *_sets_of({'named': entries}), {'named': expected})
  assert [s.text.shape for s in encoded] == [(7, 4)] * 5  # 33 names, and two rows of padding
  assert [int(s.text_valid.any(axis=1).sum()) for s in encoded] == [7, 7, 7, 7, 5]


def test_entries_of_several_buckets_are_in_the_order_of_the_set_in_a_step_and_in_an_evaluation(monkeypatch):
  monkeypatch.setattr(target_sets, 'MIN_SAVED_TOKENS', 0)
  rng, (model, params) = np.random.default_rng(0), _model()
  tokens = lambda n: _tokens(rng, n)
  entries = {'plain': [[tokens(n)] for n in (4, 2, 4, 2, 2)],
             'named': [[tokens(4), tokens(2)], [tokens(2)], [tokens(4)], [tokens(2), tokens(2)], [tokens(2)]]}
  specs, sets = _sets_of(entries)
  assert all(s.order.tolist() == [3, 0, 4, 1, 2] for s in sets.values())  # the short ones first: not its own inverse
  expected = {name: [[_alone(model, params, row) for row in names] for names in rows] for name, rows in entries.items()}
  _assert_means(model, params, specs, sets, expected)

  plan = Plan(task_types=(), tasks=(), sets=tuple(specs.values()), probes=(), probe_sets=(), evaluations=(),
              temperatures=('group',))
  spec = StepSpec(model=model, plan=plan, optimizer=None, grad_accum_steps=1, ema_decay=0., eot=small_model.EOT)
  arrays = sample_synonyms({name: {'buckets': s.buckets, 'order': s.order} for name, s in sets.items()},
                           jax.random.key(0))
  features = small_model.jit(lambda p: forward(spec, p, {}, arrays, {}, None)[0].target_sets)(params)
  for name, of_set in expected.items():
    for feature, names in zip(normalize(features[name]), of_set, strict=True):
      assert min(np.abs(feature - x).max() for x in names) < 1e-4
