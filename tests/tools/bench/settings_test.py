"""Suites are chosen by name; an unknown name is reported with the nearest ones."""

import pytest

from uni_moe_jax.tools.bench import settings, suites


def test_all_suites_are_the_default():
  assert settings.choose([]) == tuple(settings.SUITES)


def test_suites_are_in_the_benchmarks_order_with_compile_last():
  assert settings.choose(['compile', 'mixed', 'routers', 'mixed']) == ('routers', 'mixed', 'compile')


def test_an_unknown_name_is_reported_with_the_nearest():
  with pytest.raises(ValueError, match="--suites: 'decodin' is unknown; did you mean 'decoding'"):
    settings.choose(['routers', 'decodin'])


def test_every_suite_has_a_function():
  assert list(suites.SUITE_FUNCTIONS) == list(settings.SUITES)
  assert set(settings.FROM_CONFIG) <= set(settings.SUITES)


def test_only_the_quick_benchmark_is_reduced():
  assert settings.QUICK.reduced and not settings.FULL.reduced
