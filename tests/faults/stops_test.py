"""The stops subject: its judgements of a run of two processes by stand-ins, and all of it for real."""

import sys

import jax.numpy as jnp
import pytest

from uni_moe_jax.faults import kills, planted, stops, suite
from uni_moe_jax.train.checkpoint import Checkpoints

# Copies the work directory of a whole run, which is what training comes to. As the one whose other dies it says and ends as asked.
_STAND_IN = '''
import pathlib, shutil, sys, time
workdir, index = pathlib.Path(sys.argv[1]), sys.argv[2][-1]
again = workdir.exists()
if index == '0' and not again:
  shutil.copytree(workdir.parent / 'done', workdir)
if workdir.name == 'two_killed' and not again:
  time.sleep({seconds} if index == '0' else 60)
  print({said!r})
  sys.exit({code})
'''
_SAID = 'error: another process of this run has died or cannot be reached (Connection reset).'


class _StandIn(kills.Trainer):
  """Runs `plant`, the text of a program, in place of the trainer."""

  def command(self, workdir):
    return [sys.executable, '-c', self.plant, str(workdir), *self.flags]


@pytest.mark.parametrize('said, code, seconds, found', [
    (_SAID, 1, .1, None), (_SAID, 134, .1, 'exit code 134 instead of exit code 1'), (_SAID, 1, 1.5, 'ended 2 s later, at most 1'),
    ('Traceback (most recent call last):', 1, .1, 'does not say so in one sentence'),
    ('', 1, .1, 'does not say so in one sentence')])
def test_a_process_whose_other_dies_ends_soon_with_a_sentence(tmp_path, monkeypatch, said, code, seconds, found):
  monkeypatch.setattr(stops, '_SURVIVES', 1.)
  with Checkpoints(tmp_path / 'done', max_to_keep=2) as checkpoints:
    checkpoints.save(1, {'params': jnp.arange(3.)})
  program = _STAND_IN.format(said=said, code=code, seconds=seconds)
  seen, findings = stops.dead_process(_StandIn(tmp_path, program), tmp_path / 'done')
  assert len(seen) == 1 and len(findings) == (found is not None) and all(found in f for f in findings)


def test_the_same_command_must_end_as_the_undisturbed_run(tmp_path):
  for name, value in (('done', 1.), ('other', 2.)):
    with Checkpoints(tmp_path / name, max_to_keep=2) as checkpoints:
      checkpoints.save(1, {'params': jnp.full(3, value)})
  # Process 0 alone: the other may start when the first has made the folder.
  trained = "if again and index == '0':\n  shutil.copytree(workdir.parent / 'other', workdir, dirs_exist_ok=True)\n"
  program = _STAND_IN.format(said=_SAID, code=1, seconds=.1) + trained
  _, findings = stops.dead_process(_StandIn(tmp_path, program), tmp_path / 'done')
  assert len(findings) == 1 and 'arrays differ' in findings[0]


@pytest.mark.parametrize('code, found', [(0, None), (3, 'two processes: exit code 3 and exit code 3, see')])
def test_two_undisturbed_begin_anew_and_must_end_well(tmp_path, code, found):
  (tmp_path / 'two_whole').mkdir()
  (tmp_path / 'two_whole/earlier').write_text('')
  workdir, findings = stops.two_undisturbed(_StandIn(tmp_path, f'import sys; sys.exit({code})'))
  assert workdir == tmp_path / 'two_whole' and not workdir.exists()  # a stand-in makes none
  assert len(findings) == (found is not None) and all(found in f for f in findings)


@pytest.mark.nightly
def test_runs_that_cannot_go_on_say_so_and_the_same_command_continues(tmp_path, capsys):
  assert suite.run(('stops',), suite.QUICK, 0, tmp_path, keep=True) == 0, capsys.readouterr().out
  said = capsys.readouterr().out
  assert all(f'{name}: exit code 1' in said for name in planted.HANGS)
  assert 'a full disk' in said and 'one killed' in said and 'one failed' in said
