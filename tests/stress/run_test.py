"""The stress suites: their printed report and exit code with stand-ins, and each of them for real, shortened."""

import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT
from tests.stress import hangs, injected_faults, preemption, run


@pytest.fixture(name='results')
def _results(tmp_path, monkeypatch, capsys):
  """A function that returns (exit code, output) of suites that start no runs."""
  monkeypatch.setattr(run.Suites, '_undisturbed', lambda _: preemption.Undisturbed(tmp_path, 1., .1))

  def results(*suites):
    return run.run(suites, run.QUICK, 0, tmp_path, keep=True), capsys.readouterr().out

  return results


@pytest.mark.parametrize('findings, code', [
    (['killed_0: 2 of 30 arrays differ, .params first', 'a run with a checkpoint of step 10 resumed from nothing',
      'killed_0: the checkpoint of step 10 was left damaged: manifest.json is missing'], 0),
    (['killed_0: 2 of 30 arrays differ, .params first'], 1),  # this is not the effect of 'ignored_checkpoints'
    (['killed_0: exit code 1: AttributeError'], 1), ([], 1)])
def test_an_injected_fault_is_detected_by_the_words_of_the_right_finding(results, monkeypatch, findings, code):
  monkeypatch.setattr(preemption, 'series', lambda *_: preemption.Tally(findings=list(findings)))
  exit_code, output = results('injected_faults')
  assert exit_code == code and ('MISSED' in output) == bool(code)
  assert output.count('MISSED') == output.count('was missed')


def test_an_injected_fault_that_was_missed_is_tried_again(results, monkeypatch):
  seeds = []

  def series(trainer, undisturbed, num_kills, num_saves, seed):
    seeds.append((trainer.fault, seed))
    return preemption.Tally(findings=['3 arrays differ', 'resumed from nothing', 'was left damaged'] if seed else [])

  monkeypatch.setattr(preemption, 'series', series)
  assert results('injected_faults')[0] == 0
  assert seeds == [(name, seed) for name in injected_faults.DETECTED for seed in (0, 1)]


def test_what_was_not_tried_is_reported(results, monkeypatch):
  monkeypatch.setattr(hangs, 'two_undisturbed', lambda _: (None, []))
  for case in ('hanging', 'full_disk', 'separate_folders', 'dead_process', 'failed_process'):
    monkeypatch.setattr(hangs, case, lambda *_: (['one sentence'], []))
  code, output = results('hangs')
  assert code == 0 and output.endswith('no findings\n') and 'NOT TRIED' not in output

  def not_tried(*_):
    raise hangs.NotTried('a full disk: there is none')

  monkeypatch.setattr(hangs, 'full_disk', not_tried)
  code, output = results('hangs')
  assert code == 0 and 'NOT TRIED a full disk: there is none' in output
  assert output.endswith('no findings in what was tried\n')


@pytest.mark.parametrize('flags, message', [
    (['--suites=hang'], "--suites: 'hang' is unknown; did you mean 'hangs'"),
    (['--suites=soak'], '--suites=soak needs --config')])
def test_a_mistake_in_the_command_is_one_sentence(flags, message):
  command = [sys.executable, 'tests/stress/run.py', *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr.count('\n')) == (2, 1) and message in done.stderr


_INJECT_ALL = """
import sys
from tests.stress import injected_faults
sys.argv.append('--workdir=run')
for inject in injected_faults.ALL.values():
  inject()
"""


def test_every_fault_can_be_injected():  # what it replaces still exists
  done = subprocess.run([sys.executable, '-c', _INJECT_ALL], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert set(injected_faults.DETECTED) | set(injected_faults.HANGS) <= set(injected_faults.ALL)


@pytest.mark.parametrize('suite, words', [
    ('preemption', [' during a save (']),
    ('injected_faults', ["injected fault 'flipped_bit'"]),
    ('hangs', [*(f'{name}: exit code 1' for name in injected_faults.HANGS), 'a full disk',
               'exit code 2 and exit code 2', 'one killed', 'one failed']),
    ('preparation', ['preparation, 3 kills: '])])
def test_a_shortened_suite_has_no_findings(tmp_path, capsys, suite, words):
  code = run.run((suite,), run.QUICK, 0, tmp_path, keep=True)
  output = capsys.readouterr().out
  assert code == 0 and 'MISSED' not in output and all(w in output for w in words), output
