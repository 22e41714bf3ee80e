"""Programs of configs, compiled for absent devices within a time budget."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from uni_moe_jax.parallel import sharding
from uni_moe_jax.tools.preflight import compiled_programs
from uni_moe_jax.tools.preflight.compiled_programs import EVALUATION, Program, Which
from uni_moe_jax.tools.preflight.topology import Topology
from uni_moe_jax.train.run import Run

Config = ml_collections.ConfigDict


class Compiler:
  """Compiles programs of configs, each once, and predicts whether there is time for more.

  Attributes:
    out_of_time: `has_time` returned False once.
  """

  def __init__(self, topology: Topology | None, devices: Sequence[Any], report: Callable[[str], None], deadline: float):
    """report: receives a line for each compile. deadline: of `has_time`, by `time.monotonic`."""
    self._topology, self._devices, self._report, self._deadline = topology, devices, report, deadline
    self._runs: dict[str, Run] = {}
    self._programs: dict[tuple[Which, str], Program] = {}
    self._seconds: dict[Which, float] = {}
    self.out_of_time = False

  def run(self, config: Config) -> Run:
    """See `compiled_programs.prepare`."""
    key = _key(config)
    if key not in self._runs:
      self._runs = {key: compiled_programs.prepare(config, self._devices)}  # the latest alone: a run is large
    return self._runs[key]

  def program(self, config: Config, which: Which, note: str = '') -> Program:
    """Compile a program of a config once. note: appended to the reported line."""
    relevant = config.copy_and_resolve_references()
    if which != EVALUATION:
      relevant.evaluators = {}
    key = which, _key(relevant)
    if key not in self._programs:
      name = 'evaluation' if which == EVALUATION else 'the training step' + (f' of {which}' if which else '')
      self._report(f'compiling {name}{note}')
      self._programs[key] = compiled_programs.compile_program(self.run(config), which, self._topology)
      self._seconds[which] = self._programs[key].seconds
    return self._programs[key]

  def has_time(self, programs: Sequence[Which]) -> bool:
    """Return whether compiles of these programs, as long as their last ones, end before the deadline."""
    seconds = sum(self._seconds[which] for which in programs)
    self.out_of_time = self.out_of_time or time.monotonic() + seconds > self._deadline
    return not self.out_of_time

  def mesh(self, config: Config) -> dict[str, int]:
    """Size per axis."""
    return sharding.mesh_shape({axis: config.mesh[axis] for axis in sharding.AXES}, len(self._devices))

  def state_bytes(self, config: Config) -> float:
    """Bytes of the train state per device, without a compile."""
    return sum(compiled_programs.state_bytes(self.run(config)))


def _key(config: Config) -> str:
  return config.to_json_best_effort(sort_keys=True)
