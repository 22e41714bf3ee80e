"""Backends of the grouped product as parameters of tests; that of an extra is skipped where it is not installed."""

import importlib.util

import pytest

from uni_moe_jax.moe import gmm

TOKAMAX = pytest.mark.skipif(importlib.util.find_spec('tokamax') is None, reason='tokamax is not installed')
ALL = [pytest.param(backend, marks=TOKAMAX if backend == 'tokamax' else []) for backend in gmm.BACKENDS]
