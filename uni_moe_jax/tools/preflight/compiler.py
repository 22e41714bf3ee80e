"""Programs of configs for devices that are not there, while there is time for them, and what is known without one."""

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
  """Compiles programs of configs for the devices, says so, and knows whether there is time for another one."""

  def __init__(self, where: Topology | None, devices: Sequence[Any], say: Callable[[str], None], end: float):
    """where, devices: to compile for. say: told what is compiled. end: by `time.monotonic`, when the last compile must be done."""
    self._where, self._devices, self._say, self._end = where, devices, say, end
    self._seconds: dict[Which, float] = {}
    self.had_no_time = False

  def prepare(self, config: Config) -> Run:
    """See `programs.prepare`."""
    return compiled_programs.prepare(config, self._devices)

  def program(self, run: Run, which: Which, words: str = '') -> Program:
    """Compiles a program of a run. words: what is told of it besides."""
    what = 'evaluation' if which == EVALUATION else 'the training step' + (f' of {which}' if which else '')
    self._say(f'compiling {what}{words}')
    program = compiled_programs.evaluation(run, self._where) if which == EVALUATION else compiled_programs.train_step(run, which, self._where)
    self._seconds[which] = program.seconds
    return program

  def has_time(self, which: Sequence[Which]) -> bool:
    """Whether compiles of these programs that take as long as their last ones would end in time."""
    self.had_no_time = self.had_no_time or time.monotonic() + sum(self._seconds[w] for w in which) > self._end
    return not self.had_no_time

  def mesh(self, config: Config) -> dict[str, int]:
    """Size per axis."""
    return sharding.mesh_shape({axis: config.mesh[axis] for axis in sharding.AXES}, len(self._devices))

  def state(self, config: Config) -> float:
    """Bytes of the train state on a device; nothing is compiled."""
    return sum(compiled_programs.state_bytes(self.prepare(config)))
