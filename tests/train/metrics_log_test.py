"""Numbers of a run: averaged between logs, written once, without the lines of steps that are taken again."""

import contextlib
import json
import sys
from unittest import mock

import pytest

from uni_moe_jax.train.metrics_log import TIMINGS, MetricsLog


def _lines(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_a_line_has_the_means_since_the_previous_one(tmp_path):
  with MetricsLog(tmp_path, 0, 4) as log:
    log.add({'loss/total': 1., 'grad_norm': 4.})
    log.add({'loss/total': 2., 'grad_norm': 6.})
    log.write(2)
    log.add({'loss/total': 8.})
    log.write(3)
  first, second = _lines(tmp_path)
  assert (first['step'], first['loss/total'], first['grad_norm']) == (2, 1.5, 5)
  assert (second['step'], second['loss/total']) == (3, 8)
  assert 'grad_norm' not in second


def test_a_metric_missing_in_some_steps_is_averaged_over_the_others(tmp_path):
  with MetricsLog(tmp_path, 0, 3) as log:
    for metrics in ({'loss/a': 1., 'b': 0.}, {'b': 1.}, {'loss/a': 3., 'b': 0.}):
      log.add(metrics)
    log.write(3)
  assert _lines(tmp_path)[0]['loss/a'] == 2


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
  with MetricsLog(tmp_path, 0, 6) as log:
    for step in (2, 4, 6):
      log.record(step, {'loss/total': float(step)})
  with MetricsLog(tmp_path, 4, 6) as log:
    log.record(6, {'loss/total': 60.})
  assert [(line['step'], line['loss/total']) for line in _lines(tmp_path)] == [(2, 2), (4, 4), (6, 60)]


@pytest.mark.parametrize('half', ['{"step": 5, "lo', '{"loss/total": 1}', '[]'])
def test_a_line_that_a_crash_truncated_is_dropped(tmp_path, half):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss/total": 3}\n' + half)
  with MetricsLog(tmp_path, 5, 6) as log:
    log.record(6, {'loss/total': 1.})
  assert [line['step'] for line in _lines(tmp_path)] == [1, 6]


def test_without_a_terminal_lines_show_losses_rate_and_time_left(tmp_path, capsys):
  with mock.patch('time.perf_counter', side_effect=[0., 4.]), MetricsLog(tmp_path, 0, 500) as log:
    for _ in range(2):
      log.add({'loss/total': 2., 'loss/text': 1.5, 'grad_norm': 9.})
    log.write(2)
  # Two steps in 4 seconds: 498 more take 16 minutes and 36 seconds.
  assert capsys.readouterr().out == 'step 2/500  text 1.500 total 2.000  0.50 step/s  16 min 36 s left\n'


def test_labels_that_a_sampled_vocabulary_drops_are_noted_once(tmp_path, capsys):
  with MetricsLog(tmp_path, 0, 500) as log:
    for step, dropped in enumerate((0., 3., 4.), start=1):
      log.add({'loss/total': 2., 'sampled_softmax/dropped_labels': dropped})
      log.write(step)
  notes = [line for line in capsys.readouterr().out.splitlines() if not line.startswith('step')]
  assert notes == ['note: a step has 3.0 more distinct labels than config.target_sets.NAME.num_sampled, and trains '
                   'without them; raise it.']


def test_evaluations_have_a_line_of_their_own_and_cost_no_speed(tmp_path, capsys):
  with mock.patch('time.perf_counter', side_effect=[0., 4., 100., 104.]), MetricsLog(tmp_path, 0, 4) as log:
    log.add({'loss/total': 2.})
    log.write(1)
    log.evaluated(1, {'eval/photos/top-1': .25, 'eval/masked/perplexity': 7.})
    log.add({'loss/total': 2.})
    log.write(2)
    log.evaluated(2, {})  # a stop was requested
  first, second, third = _lines(tmp_path)
  assert second == {'step': 1, 'eval/photos/top-1': .25, 'eval/masked/perplexity': 7.}
  assert first['steps_per_second'] == third['steps_per_second'] == .25
  assert capsys.readouterr().out.splitlines()[1] == 'step 1  photos/top-1 0.250  masked/perplexity 7.000'


def test_the_time_before_a_restart_of_the_clock_costs_no_speed(tmp_path):
  with mock.patch('time.perf_counter', side_effect=[0., 100., 104.]), MetricsLog(tmp_path, 0, 4) as log:
    log.restart_clock()
    log.add({'loss/total': 1.})
    log.add({'loss/total': 1.})
    assert log.write(2)['steps_per_second'] == 0.5


@contextlib.contextmanager
def _terminal():
  """The progress bar that a terminal gets."""
  with mock.patch.object(sys.stderr, 'isatty', return_value=True, create=True), mock.patch('tqdm.tqdm') as tqdm:
    yield tqdm


def test_a_terminal_gets_the_lines_above_a_progress_bar(tmp_path, capsys):
  with _terminal() as tqdm, MetricsLog(tmp_path, 3, 9) as log:
    for _ in range(2):
      log.add({'loss/total': 2.})
    log.write(5)
    log.evaluated(5, {'eval/photos/top-1': .5})
  bar = tqdm.return_value
  (line,), (evaluated,) = (call.args for call in bar.write.call_args_list)
  assert line.startswith('step 5/9  total 2.000  ') and evaluated == 'step 5  photos/top-1 0.500'
  assert tqdm.call_args.kwargs['initial'] == 3 and tqdm.call_args.kwargs['total'] == 9
  assert bar.update.call_count == 2
  bar.set_postfix_str.assert_called_once_with('loss 2.000')
  bar.close.assert_called_once()
  assert capsys.readouterr().out == ''


def test_steps_without_a_finite_loss_do_not_break_the_progress_bar(tmp_path):
  with _terminal() as tqdm, MetricsLog(tmp_path, 0, 9) as log:
    log.add({'nonfinite_streak': 1.})
    log.write(1)
  tqdm.return_value.set_postfix_str.assert_called_once_with('loss nan')


def test_a_line_has_the_speed_of_the_steps_and_their_wait_for_input(tmp_path, capsys):
  with mock.patch('time.perf_counter', side_effect=[0., 4., 8.]), MetricsLog(tmp_path, 0, 4) as log:
    for wait in (.5, 1.5):
      log.add({'loss/total': 2.})
      log.add_work(input_wait=wait, images=600, tokens=40, ideal_seconds=.3)
    log.write(2)
    log.add({'loss/total': 2.})
    log.add_work(input_wait=0., images=0, tokens=40, ideal_seconds=0.)  # only text; the peak of the devices is unknown
    log.write(3)
  first, second = _lines(tmp_path)
  # Two steps in 4 seconds: 1,200 images and 80 tokens; 2 seconds of waiting; 0.6 seconds of products at the peak.
  assert {k: first[k] for k in TIMINGS} == dict(
      steps_per_second=.5, images_per_second=300, tokens_per_second=20, mfu=.15, input_wait=1, input_wait_share=.5)
  assert {k: second[k] for k in TIMINGS if k in second} == dict(
      steps_per_second=.25, tokens_per_second=10, input_wait=0, input_wait_share=0)
  assert '0.50 step/s  300 images/s  20 tokens/s  MFU 15.0%  input wait 50.0%  4 s left' in capsys.readouterr().out
