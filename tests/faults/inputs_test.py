"""Generated mistakes end in one sentence, and what does not is found."""

import pathlib
import time

import pytest

from uni_moe_jax.data.files import media
from uni_moe_jax.faults import bad_configs, bad_files, inputs
from uni_moe_jax.utils.errors import RunError


def _tried(result, number) -> set[str]:
  """The classes of so many inputs, of which none did what none may."""
  assert not result.findings, '\n'.join(result.findings)
  assert sum(n for name, n in result.counts.items() if inputs.ACCEPTED not in name) == number
  return {name.partition(' → ')[0] for name in result.counts}


def test_no_generated_config_gets_past_the_boundary(tmp_path):
  result = inputs.through_boundary(320, 5, tmp_path, bad_configs.KINDS)
  assert {*(f'config: {k.__name__.replace("_", " ")}' for k in bad_configs.CONFIGS), 'path'} < _tried(result, 320)
  assert sum(n for name, n in result.counts.items() if inputs.REFUSED in name) > 130
  assert any(name.startswith('path → ' + inputs.FAILED) for name in result.counts)


def test_no_generated_file_of_data_gets_past_the_boundary(tmp_path):
  result = inputs.through_boundary(80, 5, tmp_path, bad_files.KINDS)
  assert _tried(result, 80) == {'jsonl', 'text', 'picture', 'clip'}
  for kind in ('jsonl', 'picture', 'clip'):  # some are skipped, for several reasons, and some are fine
    reasons = {name for name in result.counts if name.startswith(f'{kind} → {inputs.SKIPPED}')}
    assert len(reasons) >= 2 and f'{kind} → {inputs.ACCEPTED}' in result.counts


@pytest.mark.parametrize('kind, planted, said', [
    ('picture', ('media.read_image', lambda path: media.Media(path.read_bytes(), (32, 24))), 'TRACEBACK'),
    ('clip', ('media.read_video', lambda path: media.Media(path.read_bytes(), (8, 24, 24))), 'TRACEBACK CorruptVideo'),
    ('jsonl', ('check.keep_consistent', lambda rows: (rows[1:], [])), '5 rows are good, 4 were taken'),
], ids=['a picture that TensorFlow cannot read', 'a clip without frames', 'a good row that is lost'])
def test_what_data_may_not_do_is_found(tmp_path, monkeypatch, kind, planted, said):
  name, stand_in = planted
  monkeypatch.setattr(f'uni_moe_jax.data.files.{name}', stand_in)
  result = inputs.through_boundary(60, 0, tmp_path, {kind: bad_files.KINDS[kind]})
  assert any(said in finding for finding in result.findings)


def test_both_are_among_the_inputs_of_the_suite():
  assert inputs.KINDS.keys() == bad_configs.KINDS.keys() | bad_files.KINDS.keys()


def test_equal_seeds_give_equal_inputs(tmp_path):
  one, two, other = (inputs.through_boundary(64, seed, tmp_path).counts for seed in (1, 1, 2))
  assert one == two != other


def _raise(error):
  raise error


@pytest.mark.parametrize('main, bad, said', [
    (lambda: 0, True, inputs.ACCEPTED),
    (lambda: {}['x'], False, "TRACEBACK KeyError"),
    (lambda: time.sleep(9), False, 'HANGS'),
    (lambda: 1, False, 'WITHOUT ONE SENTENCE'),
    (lambda: pathlib.Path(bad_configs.CANARY).touch() or 'skipped: it', False, 'code was executed'),
], ids=['accepted', 'traceback', 'hang', 'silent', 'executed'])
def test_what_no_input_may_do_is_found(tmp_path, monkeypatch, main, bad, said):
  monkeypatch.setattr(inputs, '_HANGS', 1)
  kinds = {'planted': lambda *_: bad_configs.Case('planted', 'it', main, bad)}
  [finding] = inputs.through_boundary(1, 0, tmp_path, kinds).findings
  assert finding.startswith('seed 0, input 0, planted, it: ') and said in finding


@pytest.mark.parametrize('main, outcome', [
    (lambda: 0, inputs.ACCEPTED), (lambda: 'skipped: no picture', 'skipped: no picture'), (lambda: _raise(RunError('full')), inputs.FAILED)])
def test_what_an_input_may_do_is_counted(tmp_path, main, outcome):
  result = inputs.through_boundary(2, 0, tmp_path, {'fine': lambda *_: bad_configs.Case('fine', 'it', main, False)})
  # What is accepted was not bad: others are made in its place, and not for ever.
  assert (dict(result.counts), result.findings) == ({f'fine → {outcome}': 20 if outcome == inputs.ACCEPTED else 2}, [])


def test_a_few_commands_end_in_one_sentence(tmp_path):
  assert len(_tried(inputs.through_command_line(4, seed=3, folder=tmp_path), 4)) > 1
