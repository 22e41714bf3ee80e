"""Each program is compiled once, and another compile of it is expected to take as long as the last."""

import time
from unittest import mock

import pytest

from uni_moe_jax import config as config_lib
from uni_moe_jax.tools.preflight import compiled_programs
from uni_moe_jax.tools.preflight.compiled_programs import EVALUATION, Compiler, Program

_STEP = None


@pytest.fixture
def compile_program():
  """A step takes 40 seconds, evaluation 5."""
  fake = mock.Mock(side_effect=lambda run, which, _: Program('', 8, None, None, None, 5 if which == EVALUATION else 40))
  with mock.patch.multiple(compiled_programs, prepare=mock.DEFAULT, compile_program=fake):
    yield fake


@pytest.fixture
def compiler(compile_program):
  """With a minute left, after a step and an evaluation."""
  made = Compiler(None, (), lambda _: None, time.monotonic() + 60)
  made.program(config_lib.base(), _STEP)
  made.program(config_lib.base(), EVALUATION)
  return made


def test_there_is_time_for_a_step_and_an_evaluation(compiler):
  assert compiler.has_time([_STEP, EVALUATION])
  assert not compiler.out_of_time


def test_there_is_no_time_for_two_steps_even_if_the_last_compile_was_short(compiler):
  assert not compiler.has_time([_STEP, _STEP])
  assert compiler.out_of_time
  assert not compiler.has_time([EVALUATION])  # the search is over


def test_a_program_is_compiled_once_and_a_step_does_not_depend_on_evaluators(compiler, compile_program):
  c = config_lib.base()
  c.evaluators.shape = config_lib.evaluator('classification', 'shape', split='test')
  compiler.program(c, _STEP)
  assert compile_program.call_count == 2
  compiler.program(c, EVALUATION)
  assert compile_program.call_count == 3
  c.model.width *= 2
  compiler.program(c, _STEP)
  assert compile_program.call_count == 4


def test_each_compile_is_reported(compile_program):
  messages = []
  compiler = Compiler(None, (), messages.append, 0.0)
  for which in (_STEP, 'coco', EVALUATION):
    compiler.program(config_lib.base(), which, ', with a change')
  assert messages == [
      f'compiling {name}, with a change' for name in ('the training step', 'the training step of coco', 'evaluation')]
