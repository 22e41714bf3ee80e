"""Starting from another run: what is taken over, what starts fresh, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model
from uni_moe_jax.train import warm_start


def _joined(fresh, old):
  return warm_start.merge_params(small_model.params(fresh), small_model.params(old), 'runs/old')


def test_equal_models_give_everything():
  spec = small_model.spec()
  ones = jax.tree.map(jnp.ones_like, small_model.params(spec))
  params, fresh, left = warm_start.merge_params(ones, small_model.params(spec), 'runs/old')
  jax.tree.map(np.testing.assert_array_equal, params, small_model.params(spec))
  assert (fresh, left) == ([], [])


def test_prompts_heads_and_new_temperatures_start_fresh():
  old, new = small_model.spec(), small_model.spec(
      num_deep_prompts=2, spe_bias=True, head=3, num_prefix_prompts=2, label_prompts=(('names', 3),), temperature_groups=('other',))
  params, fresh, left = _joined(new, old)
  assert left == ['log_scale_group']
  assert set(fresh) == {
      'embed/spe_bias', 'log_scale_other', 'linear_head/kernel', 'linear_head/bias', 'linear_head/similarity_weight',
      'embed/prompts/input', 'embed/prompts/label_names', 'encoder/blocks/block0/prompts/input',
      'encoder/tail/block0/prompts/input'}
  np.testing.assert_array_equal(params['embed']['word'], small_model.params(old)['embed']['word'])
  np.testing.assert_array_equal(params['embed']['spe_bias'], small_model.params(new)['embed']['spe_bias'])


def test_a_clip_can_be_asked_without_its_differences():
  with_them, without = small_model.spec(frame_differences=True), small_model.spec()
  params, fresh, left = _joined(without, with_them)
  assert (fresh, left) == ([], ['embed/difference'])
  assert _joined(with_them, without)[1:] == (['embed/difference'], [])
  np.testing.assert_array_equal(params['embed']['patch'], small_model.params(with_them)['embed']['patch'])


@pytest.mark.parametrize('changes, said', [
    (dict(router='dense'), r"runs/old has parameter 'encoder/.*_router/.*', this model has not"),
    (dict(posemb='frozen'), r"this model has parameter 'embed/spatial', runs/old has not; config\.model and"),
    (dict(vocab_size=9), r"parameter 'embed/word' has shape \(23, 16\) there and \(9, 16\) here; .* the tokenizer"),
    (dict(mlp_dim=8), r"'encoder/blocks/block0/ffn_in/bias' has shape")])
def test_another_model_is_refused_by_name(changes, said):
  with pytest.raises(ValueError, match=rf"config\.train\.init='runs/old'.*{said}"):
    _joined(small_model.spec(**changes), small_model.spec())
