"""Seed, schedule, rates, decays and loss weights are arguments of the compiled step: changing them compiles nothing."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.helpers import small_model, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.train import loop, step
from uni_moe_jax.train import run as train_run

# Values of every number that a program takes, all of which matter in the first two steps.
NUMBERS = {
    'seed': (0, 1), 'train.steps': (6, 9), 'optim.learning_rate': (1e-2, 3e-2), 'optim.warmup_steps': (3, 0),
    'optim.final_lr_fraction': (.25, .5), 'optim.grad_clip_norm': (.1, .2), 'optim.router_lr_multiplier': (.5, .25),
    'optim.param_groups': tuple((('embed/', f, 0.), ('.*', 1., d)) for f, d in ((.5, .1), (.2, .3))),
    'train.ema_decay': (.5, .25), 'tasks.text.loss_weight': (2., 3.), 'moe.balance_loss_weight': (.1, .2)}


def _config(variant):
  c = tiny.config('text', data_dir=tiny.data_dir())
  c.model.num_layers, c.moe.router, c.moe.noise_std, c.tokenizer.path = 1, 'token', 8.0, tiny.tokenizer_file()
  c.update_from_flattened_dict({name: values[variant] for name, values in NUMBERS.items()})
  return c


@contextlib.contextmanager
def _compilation_cache_in(folder: str) -> Iterator[None]:
  """Uses a folder as JAX's compilation cache, for programs of any size."""
  def use(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX checks only once whether there is a cache, and where

  wanted = {'jax_enable_compilation_cache': True, 'jax_compilation_cache_dir': folder,
            'jax_persistent_cache_min_compile_time_secs': 0}
  before = {name: getattr(jax.config, name) for name in wanted}
  use(wanted)
  try:
    yield
  finally:
    use(before)


@pytest.mark.nightly
def test_a_second_run_finds_every_program_in_the_compilation_cache(tmp_path):
  def train(variant):
    c = _config(variant)
    c.evaluators.masked = config_lib.evaluator('mlm', 'text', split='train', batch_size=8, during_training=True)
    c.train.evaluate_every = 2
    jax.clear_caches()
    assert loop.train(c, str(tmp_path / f'run{variant}'), jax.devices()[:1]) == loop.FINISHED
    return {file.name for file in (tmp_path / 'cache').iterdir() if file.name.endswith('-cache')}

  with _compilation_cache_in(str(tmp_path / 'cache')):
    first = train(0)
    assert any('jit_step' in name for name in first)
    assert train(1) == first


@pytest.mark.nightly
def test_a_step_takes_the_numbers_of_its_own_run():
  # A program that contains the numbers as constants computes the same.
  run = train_run.build(_config(1), jax.devices()[:1])
  batch, sets = run.put_batch(next(run.mixture().iterate(0, 1))[1]), run.target_sets()
  key = jax.random.key(NUMBERS['seed'][1])
  start = run.state_from(small_model.params(run.spec.model.spec))
  constant = small_model.jit(functools.partial(step.train_step, spec=run.spec))
  expected, actual, take = start, jax.tree.map(jnp.copy, start), run.step_fn()
  for _ in range(2):
    expected, expected_metrics = constant(expected, batch, sets, key)
    actual, metrics = take(actual, batch, sets)
  chex.assert_trees_all_close((actual, metrics), (expected, expected_metrics), rtol=1e-5, atol=1e-6)
