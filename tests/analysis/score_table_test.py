"""The table of several runs: hand-worked means and intervals, costs of training, blanks and the Markdown."""

import json

import pytest

from uni_moe_jax.analysis import score_table


def _row(value, error=None, metric='top-1', **fields):
  return {'evaluator': 'class', 'metric': metric, 'value': value, 'standard_error': error, 'chance': .1,
          'baselines': {'nearest': .4, 'majority': .2}, 'higher_is_better': True, **fields}


def _run(folder, *rows):
  folder.mkdir()
  (folder / 'evaluation.json').write_text(json.dumps(rows))
  return folder


@pytest.mark.parametrize('rows, mean, spread, interval', [
    ([_row(.5)], .5, None, None),
    ([_row(.5, .1)], .5, None, .195996),  # 1.95996 * .1
    # The spread of .4 and .6 is .141421; Student's t with one degree of freedom is 12.7062: times .1.
    ([_row(.4), _row(.6)], .5, .141421, 1.27062),
    ([_row(.4, .1), _row(.6, .3)], .5, .141421, 1.329712),  # sqrt(1.27062^2 + (1.95996 * .2)^2)
])
def test_mean_spread_and_interval(rows, mean, spread, interval):
  summary = score_table.summarize(rows)
  assert summary['values'] == [row['value'] for row in rows]
  assert (summary['mean'], summary['spread'], summary['interval']) == (
      pytest.approx(mean), spread and pytest.approx(spread, abs=1e-5), interval and pytest.approx(interval, abs=1e-5))


def test_columns_are_runs_of_all_seeds_and_what_was_not_measured_is_blank(tmp_path):
  dense = [_run(tmp_path / 'a', _row(.5), _row(8., metric='perplexity', higher_is_better=False, baselines={})),
           _run(tmp_path / 'b', _row(.5), _row(float('nan'), metric='perplexity'))]
  (tmp_path / 'a' / 'metrics.jsonl').write_text(
      ''.join(json.dumps({'step': i, 'loss/total': 16 - i, 'steps_per_second': 4}) + '\n' for i in range(1, 17)))
  (tmp_path / 'a' / 'run.json').write_text(json.dumps({'parameters': {'total': 1234567, 'active': 1000}}))
  table = score_table.tabulate({'dense': dense, 'task': [tmp_path / 'none']})
  assert [(r['metric'], r['columns']['dense']['values'], list(r['columns'])) for r in table] == [
      ('top-1', [.5, .5], ['dense']), ('perplexity', [8.], ['dense']), ('steps', [16], ['dense']),
      ('final loss', [.5], ['dense']),  # of 1 and 0, the last eighth of 16 losses
      ('seconds per step', [.25], ['dense']), ('total parameters', [1234567], ['dense']),
      ('active parameters', [1000], ['dense'])]
  lines = score_table.markdown(table, ['dense', 'task']).splitlines()
  assert lines[0] == '| evaluator | metric | strongest baseline | dense | task |'
  assert lines[2] == '| class | top-1 | 0.400 nearest | 0.500 ± 0.000 |  |'
  assert lines[3] == '| class | perplexity (lower is better) |  | 8.000 |  |'
  assert '| training | total parameters |  | 1,234,567 |  |' in lines
  assert lines[-1].startswith('Runs: dense 2, task 0. ± 95 %')
