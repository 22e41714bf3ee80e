"""The seed is data: it decides every draw of a step, and is in no compiled program."""

import dataclasses
import functools

import jax
import pytest

from tests.helpers import small_model, tiny
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train import step


def _with(run, **changes):
  """The run with other fields of its config; its plan and step stay."""
  config = run.config.copy_and_resolve_references()
  config.update(changes)
  return dataclasses.replace(run, config=config)


@pytest.mark.slow
def test_runs_that_differ_only_in_their_seed_share_a_compiled_program_but_no_noise():
  c = tiny.config('shape', data_dir=tiny.data_dir())
  c.moe.noise_std, c.tokenizer.path = 8.0, tiny.tokenizer_file()
  run = train_run.build(c, jax.devices()[:1])
  batch, sets = run.put_batch(next(run.mixture().iterate(0, 1))[1]), run.target_sets()
  steps = [_with(run, seed=seed).step_fn() for seed in (0, 1)]
  one, two = (s.lower(run.abstract_state(), batch, sets).as_text() for s in steps)
  assert one == two
  faster = dataclasses.replace(run, spec=dataclasses.replace(run.spec, learning_rate=lambda t: 9. + t))
  assert faster.step_fn().lower(run.abstract_state(), batch, sets).as_text() != one

  for made, seed in zip(steps, (0, 1), strict=True):
    assert (made._key == jax.random.key_data(jax.random.key(seed))).all()
  state = run.state_from(small_model.params(run.spec.model.spec))
  take = small_model.jit(functools.partial(step.train_step, spec=run.spec))
  losses = [float(take(state, batch, sets, jax.random.key(seed))[1]['loss/total']) for seed in (0, 0, 1)]
  assert losses[0] == losses[1] != losses[2]
