"""Two processes of four devices evaluate data in files as one device does, in batches that divide over no devices."""

import json

import numpy as np
import pytest

from tests.data import own_files
from tests.helpers import processes, saved_run, synthetic_records, tiny
from uni_moe_jax import config as config_lib
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.eval import suite

pytestmark = pytest.mark.nightly
_BATCH, _STEP = 5, 3
_EVALUATED = {'photos': 7, 'pairs': 11, 'videos': 6}  # batches of five leave a remainder of each
# Task → its source and the type of its evaluator; every type is among them.
_TASKS = {
    'color': ('photos', 'classification'), 'caption': ('photos', 'caption'), 'match': ('photos', 'retrieval'),
    'question': ('photos', 'vqa'), 'same': ('pairs', 'glue'), 'words': ('pairs', 'mlm'),
    'moves': ('videos', 'classification')}


def _prepare(root, data):
  """Images with captions, a question and its answers; pairs of texts; videos."""
  own_files.write_captioned_images(root / 'photos', 5 * _EVALUATED['photos'])  # every fifth is for the test
  file = root / 'photos/data.jsonl'
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  for i, row in enumerate(rows):
    row.update(question=f'which {row["color"]} has number {i}', answers=synthetic_records.answers(i // 5))
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  prepare.prepare(root / 'photos', data, 'photos')
  prepare.prepare(own_files.write_text_pairs(root / 'pairs', _EVALUATED['pairs']), data, 'pairs')
  videos = own_files.write_videos(root / 'videos', count=_EVALUATED['videos'])
  prepare.prepare(videos, data, 'videos', test_fraction=0.0)


def _config(data):
  c = tiny.config(data_dir=str(data))
  c.model.update(dict(num_layers=1, channels=3, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3, max_text_len=32))
  c.tokenizer.update(dict(vocab_size=100, allow_smaller_vocab=True))
  c.mesh.update(dict(data=-1, expert=2))
  # The value in the records and the name of each entry. The names are such that untrained parameters predict different
  # answers for different examples.
  for name, values, family in (
      ('colors', 'own:photos/color', 'names'), ('moves', (('moves', 'bar'), ('stands', 'small')), 'names'),
      ('same', (('other', 'big'), ('same', 'same')), 'words'),
      ('answers', (('yes', 'alike'), 'no', 'two', 'three'), 'words'), ('vocabulary', 'vocabulary', 'words')):
    c.target_sets[name] = config_lib.target_set(values, family=family)
  captions = dict(caption_templates=('{captions}',), max_len=12)
  fields = {
      'color': dict(type='image_classification', target_set='colors', label_column='color'),
      'caption': dict(type='image_caption', target_set='vocabulary', **captions),
      'match': dict(type='image_retrieval', **captions),
      'question': dict(type='vqa', target_set='answers', label_column='answers', max_predictions=10, max_len=32,
                       template='{question} <spe> <eot>'),
      'same': dict(type='text_classification', target_set='same', label_column='label', max_len=32,
                   template='{text_a} <eot> <spe> , {text_b} <eot>'),
      'words': dict(type='text_mlm', target_set='vocabulary', label_column='text_b', max_len=32, max_predictions=3),
      'moves': dict(type='video_classification', target_set='moves', label_column='label', num_frames=3)}
  more = {'caption': dict(beam_size=2), 'moves': dict(split='train', num_views=2, num_crops=3)}
  for name, (source, evaluator) in _TASKS.items():
    c.tasks[name] = config_lib.task(source=f'own:{source}', batch_size=4, **fields[name])
    options = {'split': 'test', 'batch_size': _BATCH, **more.get(name, {})}
    c.evaluators[name] = config_lib.evaluator(evaluator, name, **options)
  return c


def _num_masked(run, examples):
  """How many words are masked in the examples of 'words', which have a few each."""
  [task] = [t for t in run.plan.tasks if t.name == 'words']
  fields, _ = next(evaluation_batches(run.data.examples(task, 'test'), np.arange(examples), examples))
  return int((fields['weight'] > 0).sum())


def _read(folder):
  """(rows, samples) of an evaluation."""
  return tuple(json.loads((folder / name).read_text()) for name in (suite.EVALUATION_FILE, 'samples.json'))


def test_every_row_and_every_answer_is_that_of_one_device_and_counts_each_example_once(tmp_path):
  _prepare(tmp_path / 'in', tmp_path / 'data')
  c, one, two = _config(tmp_path / 'data'), tmp_path / 'one', tmp_path / 'two'
  saved_run.save(two, c, _STEP, devices=4)  # training batches would not divide over eight

  c.mesh.expert = 1
  run, predictor, _ = saved_run.load(c, two)
  one.mkdir()
  suite.evaluate(run.plan, run.data, predictor, _STEP, one)
  rows, samples = _read(one)
  counts = {name: _EVALUATED[source] for name, (source, _) in _TASKS.items()}
  counts['words'] = _num_masked(run, _EVALUATED['pairs'])
  # Recall of text to image counts texts.
  assert {(r['evaluator'], r['count']) for r in rows if not r['metric'].startswith('t2')} == set(counts.items())
  # The control: answers differ, so that an example in the position of another changes the result.
  assert next(r['value'] for r in rows if r['metric'] == 'Matthews') != 0
  for name in ('color', 'caption', 'question', 'moves'):
    assert len({shown['prediction'] for shown in samples[name]}) > 1

  processes.run([*processes.TWO, '--evaluate', '--', f'--workdir={two}'])
  # A value that follows from a maximum or from an order is the same to the bit; a mean of logarithms is rounded.
  about = lambda row, *fields: {**row, **{field: pytest.approx(row[field], rel=1e-5) for field in fields}}
  rounded = [about(r, 'value', 'standard_error') if r['metric'] == 'perplexity' else r for r in rows]
  assert _read(two) == (rounded, samples)
