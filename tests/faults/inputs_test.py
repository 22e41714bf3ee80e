"""Generated mistakes end in one sentence, and what does not is found."""

import pathlib
import time

import pytest

from uni_moe_jax import failures
from uni_moe_jax.faults import bad_configs, inputs


def test_no_generated_input_gets_past_the_boundary(tmp_path):
  result = inputs.through_boundary(300, seed=5, folder=tmp_path)
  assert not result.findings, '\n'.join(result.findings)
  assert sum(result.counts.values()) == 300
  classes = {name.partition(' → ')[0] for name in result.counts}
  assert {f'config: {k.__name__.replace("_", " ")}' for k in bad_configs.CONFIGS} < classes  # every class was tried
  assert sum(n for name, n in result.counts.items() if inputs.REFUSED in name) > 150


def test_equal_seeds_give_equal_inputs(tmp_path):
  one, two, other = (inputs.through_boundary(60, seed, tmp_path).counts for seed in (1, 1, 2))
  assert one == two != other


def _raise(error):
  raise error


@pytest.mark.parametrize('main, bad, said', [
    (lambda: 0, True, 'accepted'),
    (lambda: {}['x'], False, "TRACEBACK KeyError"),
    (lambda: time.sleep(9), False, 'HANGS'),
    (lambda: 1, False, 'WITHOUT ONE SENTENCE'),
    (lambda: pathlib.Path(bad_configs.CANARY).touch() or 0, False, 'code was executed'),
], ids=['accepted', 'traceback', 'hang', 'silent', 'executed'])
def test_what_no_input_may_do_is_found(tmp_path, monkeypatch, main, bad, said):
  monkeypatch.setattr(inputs, '_HANGS', 1)
  kinds = {'planted': lambda *_: bad_configs.Case('planted', 'it', main, bad)}
  [finding] = inputs.through_boundary(1, 0, tmp_path, kinds).findings
  assert finding.startswith('seed 0, input 0, planted, it: ') and said in finding


@pytest.mark.parametrize('main, outcome', [
    (lambda: 0, inputs.ACCEPTED), (lambda: _raise(failures.Failure('full')), inputs.FAILED)])
def test_what_an_input_may_do_is_counted(tmp_path, main, outcome):
  result = inputs.through_boundary(2, 0, tmp_path, {'fine': lambda *_: bad_configs.Case('fine', 'it', main, False)})
  assert (dict(result.counts), result.findings) == ({f'fine → {outcome}': 2}, [])


def test_a_few_commands_end_in_one_sentence(tmp_path):
  result = inputs.through_command_line(4, seed=3, folder=tmp_path)
  assert not result.findings, '\n'.join(result.findings)
  assert sum(result.counts.values()) == 4
