"""Whether there is time for another compile: each program takes as long as it took last."""

import time
from unittest import mock

import pytest

from uni_moe_jax.tools.preflight import compiled_programs
from uni_moe_jax.tools.preflight.compiled_programs import EVALUATION, Program
from uni_moe_jax.tools.preflight.compiler import Compiler

_STEP = None


@pytest.fixture
def compiler():
  """With a minute left; it has compiled a step in 40 seconds, then an evaluation in 5."""
  took = lambda seconds: lambda *_: Program('', 8, None, None, None, seconds)
  with mock.patch.multiple(compiled_programs, train_step=took(40), evaluation=took(5)):
    made = Compiler(None, (), lambda _: None, time.monotonic() + 60)
    made.program(None, _STEP)
    made.program(None, EVALUATION)
    yield made


def test_there_is_time_for_a_step_and_an_evaluation(compiler):
  assert compiler.has_time([_STEP, EVALUATION])
  assert not compiler.had_no_time


def test_there_is_none_for_two_steps_though_the_last_compile_was_short(compiler):
  assert not compiler.has_time([_STEP, _STEP])
  assert compiler.had_no_time
  assert not compiler.has_time([EVALUATION])  # the search is over


def test_it_says_what_it_compiles():
  said = []
  made = Compiler(None, (), said.append, 0.0)
  took = lambda *_: Program('', 8, None, None, None, 1.0)
  with mock.patch.multiple(compiled_programs, train_step=took, evaluation=took):
    for which in (_STEP, 'coco', EVALUATION):
      made.program(None, which, ', with a change')
  assert said == ['compiling the training step, with a change', 'compiling the training step of coco, with a change',
                  'compiling evaluation, with a change']
