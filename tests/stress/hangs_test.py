"""Runs that cannot continue end and are continued; stand-ins of two processes that do not are detected."""

import sys

import jax.numpy as jnp
import pytest

from tests.stress import hangs, injected_faults
from tests.stress.trainer import Trainer
from uni_moe_jax.train.checkpoint import Checkpoints

# Copies the work directory of a finished run instead of training. The survivor prints and ends as specified.
_STAND_IN = '''
import pathlib, shutil, sys, time
workdir, index = pathlib.Path(sys.argv[1]), sys.argv[-1][-1]
again = workdir.exists()
if index == '0' and not again:
  shutil.copytree(workdir.parent / 'done', workdir)
if workdir.name == 'two_killed' and not again:
  time.sleep({seconds} if index == '0' else 60)
  print({output!r})
  sys.exit({code})
'''
_OUTPUT = 'error: another process of this run has died or cannot be reached (Connection reset).'


class _StandIn(Trainer):
  """Runs `fault`, the source of a program, instead of the trainer."""

  def command(self, workdir):
    return [sys.executable, '-c', self.fault, str(workdir), *self.flags]


@pytest.mark.parametrize('output, code, seconds, finding', [
    (_OUTPUT, 1, .1, None), (_OUTPUT, 134, .1, 'exit code 134 instead of exit code 1'),
    (_OUTPUT, 1, 2., 'ended 2 s later, at most 1'),
    ('Traceback (most recent call last):', 1, .1, 'does not report it in one sentence'),
    ('', 1, .1, 'does not report it in one sentence')])
def test_a_process_must_end_soon_with_one_sentence_when_another_dies(tmp_path, output, code, seconds, finding):
  with Checkpoints(tmp_path / 'done', max_to_keep=2) as checkpoints:
    checkpoints.save(1, {'params': jnp.arange(3.)})
  program = _STAND_IN.format(output=output, code=code, seconds=seconds)
  findings = hangs.dead_process(_StandIn(tmp_path, program), tmp_path / 'done', max_survival=1.)
  assert len(findings) == (finding is not None) and all(finding in f for f in findings)


def test_the_same_command_must_end_like_the_undisturbed_run(tmp_path):
  for name, value in (('done', 1.), ('other', 2.)):
    with Checkpoints(tmp_path / name, max_to_keep=2) as checkpoints:
      checkpoints.save(1, {'params': jnp.full(3, value)})
  # Only process 0: process 1 may start after process 0 has created the folder.
  trained = "if again and index == '0':\n  shutil.copytree(workdir.parent / 'other', workdir, dirs_exist_ok=True)\n"
  program = _STAND_IN.format(output=_OUTPUT, code=1, seconds=.1) + trained
  findings = hangs.dead_process(_StandIn(tmp_path, program), tmp_path / 'done')
  assert len(findings) == 1 and 'arrays differ' in findings[0]


@pytest.mark.parametrize('fault', injected_faults.HANGS)
def test_a_run_that_hangs_ends_and_is_continued(digits_trainer, undisturbed, fault):
  assert not hangs.hanging(digits_trainer, undisturbed.workdir, fault)


@pytest.mark.skipif(not hangs.has_namespaces(), reason='needs user namespaces')
def test_a_run_on_a_full_disk_ends_and_is_continued(digits_trainer, undisturbed):
  assert not hangs.full_disk(digits_trainer, undisturbed.workdir)


def test_a_run_of_two_processes_of_which_one_dies_ends_and_is_continued(digits_trainer):
  assert not hangs.dead_process(digits_trainer, hangs.two_undisturbed(digits_trainer))
