"""Names of topologies, and the peaks of chips."""

import os
from unittest import mock

import jax
import pytest

from uni_moe_jax.preflight import topology
from uni_moe_jax.preflight.topology import CHIPS


@pytest.mark.parametrize('name, chips', [
    ('v5e:16x16', 256), ('v6e:2x4', 8), ('v4:2x2x4', 16), ('v5p:4x4x4', 64), ('cpu:64', 64)])
def test_a_name_is_a_generation_and_a_shape_in_chips(name, chips):
  parsed = topology.parse(name)
  assert (parsed.name, parsed.chips, parsed.is_tpu) == (name, chips, not name.startswith('cpu'))


@pytest.mark.parametrize('name, message', [
    ('v5:16x16', "'v5' is unknown; did you mean"),
    ('v5e', 'must give 2 sizes of chips, for example v5e:16x16'),
    ('v5e:16', 'must give 2 sizes of chips'),
    ('v4:4x4', 'must give 3 sizes of chips, for example v4:4x4x4'),
    ('v5e:4x-4', 'must give 2 sizes'),
    ('v5e:3x4', 'a host has 2 × 2 chips'),
    ('cpu:4x4', 'must give 1 size of chips, for example cpu:64'),
])
def test_a_wrong_name_is_refused(name, message):
  with pytest.raises(ValueError) as raised:
    topology.parse(name)
  assert f'--topology={name!r}' in str(raised.value) and message in str(raised.value)


def test_figures_name_their_source_and_the_peaks_of_a_cpu_are_unknown():
  assert CHIPS['cpu'].memory is None and CHIPS['cpu'].flops is None
  for generation in CHIPS.keys() - {'cpu'}:
    chip = CHIPS[generation]
    assert chip.source == f'https://docs.cloud.google.com/tpu/docs/{generation}'
    # More FLOPs than bytes, more bytes than the links carry: a wrong unit would fail.
    assert chip.flops > 100 * chip.hbm > 100 * chip.links > 1e13, generation


def test_the_environment_sets_the_number_of_virtual_devices():
  with mock.patch.dict(os.environ, {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}):
    topology.prepare_environment(topology.parse('cpu:16'))
    # XLA takes the last of two equal flags.
    assert os.environ['XLA_FLAGS'].endswith(' --xla_force_host_platform_device_count=16')


def test_the_first_virtual_devices_are_used_and_too_few_are_refused():
  assert topology.devices(topology.parse('cpu:2')) == jax.devices()[:2]
  with pytest.raises(ValueError, match='was started with 8 virtual devices; set XLA_FLAGS=--xla_force_host.*=4096'):
    topology.devices(topology.parse('cpu:4096'))
