"""Bad input ends in one sentence or a counted skip, and the checks detect what does not."""

import pathlib
import sys
import time

import pytest

from tests.stress import bad_files, bad_input
from tests.stress.bad_input import ACCEPTED, FAILED, REFUSED, SKIPPED, Case
from uni_moe_jax.data.formats import media
from uni_moe_jax.utils.errors import RunError


@pytest.mark.parametrize('name, min_outcomes', [('config', 1), ('config_file', 1), ('checkpoint', 1), ('path', 2)])
def test_bad_configs_checkpoints_and_paths_end_in_one_sentence(tmp_path, name, min_outcomes, stress):
  counts = bad_input.check(bad_input.PROPERTIES[name], 100 * stress, 5, tmp_path)
  assert sum(n for outcome, n in counts.items() if outcome in (REFUSED, FAILED)) > sum(counts.values()) / 2, counts
  assert len(counts) >= min_outcomes, counts


@pytest.mark.parametrize('name', bad_files.PROPERTIES)
def test_bad_data_ends_in_one_sentence_or_a_counted_skip(tmp_path, name, stress):
  counts = bad_input.check(bad_files.PROPERTIES[name], 40 * stress, 5, tmp_path)
  assert counts[ACCEPTED] or name == 'image', counts
  if name in ('jsonl', 'image'):  # some are skipped, for several reasons
    assert len([outcome for outcome in counts if outcome.startswith(SKIPPED)]) >= 2, counts


@pytest.mark.parametrize('name, function, replacement, message', [
    ('image', 'formats.media.check_image', lambda data: media.Media(data, (32, 24)), 'TRACEBACK'),
    ('video', 'formats.media.check_video', lambda data: media.Media(data, (8, 24, 24)), 'TRACEBACK CorruptVideo'),
    ('jsonl', 'formats.input_shards._lines', lambda shard: pathlib.Path(shard.file).read_bytes().splitlines()[2:],
     r'5 rows are good, [34] were kept'),
], ids=['an image that TensorFlow cannot decode', 'a video without frames', 'a good row that is lost'])
def test_a_defect_in_reading_data_is_detected(tmp_path, monkeypatch, name, function, replacement, message):
  bad_files._load_libraries()
  monkeypatch.setattr(f'uni_moe_jax.data.{function}', replacement)
  with pytest.raises(AssertionError, match=message):
    bad_input.check(bad_files.PROPERTIES[name], 60, 0, tmp_path)


@pytest.mark.skipif(not bad_files.HAS_VIDEO, reason='needs the extra video')
def test_a_damaged_video_that_no_seek_rewinds_is_sampled():
  data = bytearray(bad_files._video('avi'))
  data[0] ^= 1
  data[129] ^= 32
  assert bad_files._sampled(media.check_video(bytes(data))) == 0


def test_equal_seeds_give_equal_inputs(tmp_path):
  one, two, other = (bad_input.check(bad_files.jsonl, 30, seed, tmp_path, shrink=False) for seed in (1, 1, 2))
  assert one == two != other


def _raise(error):
  raise error


@pytest.mark.parametrize('main, bad, message', [
    (lambda: 0, True, 'accepted, although it is bad'),
    (lambda: {}['x'], False, 'TRACEBACK KeyError'),
    (lambda: sys.exit(0), False, 'TRACEBACK SystemExit'),
    (lambda: time.sleep(9), False, 'HANGS'),
    (lambda: 1, False, 'WITHOUT ONE SENTENCE'),
    (lambda: pathlib.Path('executed').touch() or 'skipped: it', False, 'code was executed'),
], ids=['accepted', 'traceback', 'exit', 'hang', 'silent', 'executed'])
def test_a_violation_is_detected(tmp_path, main, bad, message):
  with pytest.raises(AssertionError, match=message):
    bad_input.check(lambda draw, folder: Case(main, bad, timeout=1), 1, 0, tmp_path, shrink=False)


@pytest.mark.parametrize('main, outcome', [
    (lambda: 0, ACCEPTED), (lambda: 'skipped: no image', 'skipped: no image'),
    (lambda: _raise(RunError('full')), FAILED)])
def test_allowed_outcomes_are_counted(tmp_path, main, outcome):
  assert bad_input.check(lambda draw, folder: Case(main), 1, 0, tmp_path) == {outcome: 1}


@pytest.mark.parametrize('content', [
    {'uni_moe_jax': None}, {'config': {'a.b': 1}}, {'config': {}},
    *({'config': bad_input._changed(*x)} for x in (
        (('model', 'variant'), 'B/17'), (('model', 'variant'), []), (('compat',), 'public')))],
    ids=['null version', 'dot', 'empty', 'unknown variant', 'list', 'unknown compat'])
def test_a_damaged_config_file_is_refused(tmp_path, content):
  bad_input._write_config(tmp_path, content)
  assert bad_input.outcome(Case(lambda: bad_input._load_config(tmp_path))) == REFUSED


@pytest.mark.parametrize('num_bytes', [1, 4, 12])
def test_a_png_without_its_end_is_corrupt(num_bytes):  # Pillow reads it, TensorFlow does not
  with pytest.raises(media.CorruptFile, match='truncated'):
    media.check_image(bad_files._image('PNG', 0)[:-num_bytes])
