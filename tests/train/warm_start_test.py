"""Starting from another run: which parameters are copied, which are fresh, and what is refused."""

import numpy as np
import pytest

from tests.helpers import small_config, small_model
from uni_moe_jax import config
from uni_moe_jax.train import warm_start


def _compare(new, old, computed=()):
  return warm_start.compare_models(small_model.params(new), small_model.params(old), 'runs/old', computed)


def test_equal_models_share_every_parameter():
  assert _compare(small_model.spec(), small_model.spec()) == ([], [])


def test_prompts_heads_and_new_temperatures_start_fresh():
  old, new = small_model.spec(), small_model.spec(
      num_deep_prompts=2, spe_bias=True, head=3, num_prefix_prompts=2, label_prompts=(('names', 3),),
      temperature_groups=('other',))
  fresh, dropped = _compare(new, old)
  assert dropped == ['log_scale_group']
  assert set(fresh) == {
      'embed/spe_bias', 'log_scale_other', 'linear_head/kernel', 'linear_head/bias', 'linear_head/similarity_weight',
      'embed/prompts/input', 'embed/prompts/label_names', 'encoder/blocks/block0/prompts/input',
      'encoder/tail/block0/prompts/input'}


@pytest.mark.parametrize('changes, name', [
    (dict(frame_differences=True), 'embed/difference'), (dict(word_neighbors=1), 'embed/neighbors')])
def test_frame_differences_and_neighbors_may_be_dropped_or_added(changes, name):
  with_them, without = small_model.spec(**changes), small_model.spec()
  assert _compare(without, with_them) == ([], [name])
  assert _compare(with_them, without) == ([name], [])


def test_computed_parameters_stay_fresh_in_any_shape():
  old, new = small_model.spec(posemb='frozen'), small_model.spec(posemb='frozen', image_size=16)
  assert _compare(new, old, ['embed/spatial']) == (['embed/spatial'], [])
  with pytest.raises(ValueError, match="'embed/spatial' has shape"):
    _compare(new, old)


def _classes(keys=None, sizes=None, **entries):
  """Classes of a model with label prompts of each set, two by default, and a head of set a.

  keys: what records call them, and their names if these differ; None: a run of an older version, without digests.
  """
  c, size = small_config.config(), {name: 2 for name in entries} | (sizes or {})
  for name, texts in entries.items():
    c.target_sets[name] = config.target_set(texts, family='names', label_prompts=True)
  c.tasks.shape.update(dict(target_set='a', linear_head=True))
  head = {'kernel': np.zeros((4, size['a'])), 'bias': np.zeros(size['a']), 'similarity_weight': np.ones(())}
  prompts = {f'label_{name}': np.zeros((n, 4)) for name, n in size.items()}
  pair = lambda key: key if isinstance(key, tuple) else (key, key)
  of_sets = {name: [*zip(*map(pair, of_set), strict=True)] for name, of_set in (keys or {}).items()}
  digests = warm_start.class_digests(c, *({name: x[i] for name, x in of_sets.items()} for i in (0, 1)))
  return warm_start.classes(c, digests, {'linear_head': head, 'embed': {'prompts': prompts}})


_HEAD = {'linear_head/kernel', 'linear_head/bias', 'linear_head/similarity_weight'}
_OF_A = {*_HEAD, 'embed/prompts/label_a'}


def test_heads_and_label_prompts_of_other_classes_stay_fresh():
  old = _classes(a=('bar', 'disc'), b='glyphs/class')
  assert set(old) == {*_OF_A, 'embed/prompts/label_b'}
  assert warm_start.of_other_classes(_classes(a=('bar', 'disc'), b='glyphs/class'), old) == set()
  assert warm_start.of_other_classes(_classes(a=('cat', 'dog'), b='glyphs/class'), old) == _OF_A
  assert warm_start.of_other_classes(_classes(a=('bar', 'disc'), b='glyphs/name'), old) == {'embed/prompts/label_b'}
  assert warm_start.of_other_classes(_classes(a=('cat',), c=('dog',)), {}) == set()  # all are new


_BAR, _CAT, _NUMBERS = dict(a=('bar', 'disc')), dict(a=('cat', 'disc')), dict(a=('0', '1'))


@pytest.mark.parametrize('new, old, fresh', [
    (dict(keys=_BAR), dict(keys=_BAR), set()),
    (dict(keys=_CAT), dict(keys=_BAR), _OF_A),  # prepared again, with one class replaced
    (dict(keys=dict(a=('disc', 'bar'))), dict(keys=_BAR), _OF_A),  # in another order
    (dict(keys=_BAR, a=('bar', 'disc')), dict(keys=_BAR), set()),  # spelled in another way
    (dict(keys=dict(a=(('0', 'cat'), ('1', 'dog')))), dict(keys=dict(a=(('0', 'bar'), ('1', 'disc')))), _OF_A),
    (dict(keys=_NUMBERS), dict(keys=_NUMBERS), set()),
    (dict(keys=_NUMBERS, a='own:others/label'), dict(keys=_NUMBERS), _OF_A),  # of other things
    (dict(keys=_CAT), dict(), set()),  # an old run: its classes are unknown
    (dict(keys=_BAR, a=('bar', 'disc')), dict(), _OF_A),
    (dict(keys=dict(a=('bar', 'disc', 'cat')), sizes=dict(a=3)), dict(), _OF_A)])  # but not their number
def test_classes_are_compared_by_what_records_call_them(new, old, fresh):
  new, old = ({'a': 'own:photos/label', **run} for run in (new, old))
  assert warm_start.of_other_classes(_classes(**new), _classes(**old)) == fresh


@pytest.mark.parametrize('changes, message', [
    (dict(router='dense'), r"runs/old has parameter 'encoder/.*_router/.*', this model has not"),
    (dict(posemb='frozen'), r"this model has parameter 'embed/spatial', runs/old has not; config\.model and"),
    (dict(vocab_size=9),
     r"parameter 'embed/word' has shape \(23, 16\) in that run and \(9, 16\) in this model; .* the tokenizer"),
    (dict(mlp_dim=8), r"'encoder/blocks/block0/ffn_in/bias' has shape")])
def test_another_model_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=rf"config\.train\.init='runs/old'.*{message}"):
    _compare(small_model.spec(**changes), small_model.spec())
