"""Where metrics go: metrics.jsonl, TensorBoard, and lines on the terminal, above a progress bar."""

import json
import os
import sys
import time

import tensorflow as tf
import tqdm

from uni_moe_jax.io import storage

FILE = 'metrics.jsonl'
# Metrics of time, which differ between equal runs.
TIMINGS = ('steps_per_second', 'images_per_second', 'tokens_per_second', 'mfu', 'input_wait', 'input_wait_share')
_SHOWN = {'images_per_second': '{:,.0f} images/s', 'tokens_per_second': '{:,.0f} tokens/s', 'mfu': 'MFU {:.1%}',
          'input_wait_share': 'input wait {:.1%}'}


class MetricsLog:
  """Averages scalars over the steps between two logs and writes them; a context manager."""

  def __init__(self, workdir: str | os.PathLike[str], first: int, last: int, writes: bool = True):
    """Opens the log of a run from step `first` to `last`; lines after `first` are removed.

    writes: whether this process writes; one of several does, and the others only average.
    """
    self._last, self._sums, self._work, self._count, self._since = last, {}, {}, 0, time.perf_counter()
    self._bar, self._writes, self._drops_labels = None, writes, False
    if not writes:
      return
    self._folder = storage.GrowingFolder(storage.path(workdir))
    path, saved = self._folder.local / FILE, storage.path(workdir) / FILE
    if saved.exists():
      lines = [line for line in saved.read_text().splitlines() if _step_of(line) <= first]
      storage.write_bytes(path, ''.join(line + '\n' for line in lines).encode())  # a process killed here loses no line
    self._file = path.open('a')
    self._board = tf.summary.create_file_writer(os.fspath(self._folder.local / 'tensorboard'))
    self._bar = tqdm.tqdm(total=last, initial=first, unit='step', dynamic_ncols=True) if sys.stderr.isatty() else None

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, *_) -> None:
    if self._writes:
      self._file.close()
      self._board.close()
      self._folder.close()
    if self._bar:
      self._bar.close()

  def restart_clock(self) -> None:
    """Leaves the time since the last write, or since the start, out of the speed of steps."""
    self._since = time.perf_counter()

  def add(self, metrics: dict[str, float]) -> None:
    """Adds one step's scalars."""
    for k, v in metrics.items():
      total, n = self._sums.get(k, (0.0, 0))
      self._sums[k] = total + float(v), n + 1
    self._count += 1
    if self._bar:
      self._bar.update(1)

  def add_work(self, **work: float) -> None:
    """Adds what one step did.

    Args:
      work: `input_wait`, seconds without a batch and without a step that runs; `images` (frames of videos, too) and
        `tokens` of text, without padding, in all processes; `ideal_seconds` that the step's products would take at the
        peak of the devices, 0 if that is unknown.
    """
    for k, v in work.items():
      self._work[k] = self._work.get(k, 0.0) + v

  def write(self, step: int) -> dict[str, float]:
    """Writes and returns the means since the last write. step: number of steps taken."""
    now = time.perf_counter()
    means = {k: total / n for k, (total, n) in self._sums.items()}
    speed = self._speed(max(now - self._since, 1e-9))
    means |= speed
    self._sums, self._work, self._count, self._since = {}, {}, 0, now
    self.record(step, means)
    losses = ' '.join(f'{k.removeprefix("loss/")} {v:.3f}' for k, v in sorted(means.items()) if k.startswith('loss/'))
    rate = means['steps_per_second']
    if self._bar:
      # The means lack losses that are not finite.
      self._bar.set_postfix_str(f'loss {means.get("loss/total", float("nan")):.3f}')
    shown = ''.join('  ' + text.format(speed[k]) for k, text in _SHOWN.items() if k in speed)
    left = _duration((self._last - step) / rate)
    self._print(f'step {step}/{self._last}  {losses}  {rate:.2f} step/s{shown}  {left} left')
    dropped = means.get('sampled_softmax/dropped_labels', 0)
    if dropped and not self._drops_labels:
      self._drops_labels = True
      self._print(f'note: a step has {dropped:.1f} more distinct labels than config.target_sets.NAME.num_sampled, and '
                  'trains without them; raise it.')
    return means

  def _print(self, line: str) -> None:
    self._bar.write(line) if self._bar else print(line)
    sys.stdout.flush()

  def _speed(self, seconds: float) -> dict[str, float]:
    """The `TIMINGS` of the steps since the last write."""
    speed = {'steps_per_second': self._count / seconds}
    speed |= {f'{k}_per_second': self._work[k] / seconds for k in ('images', 'tokens') if self._work.get(k)}
    if self._work.get('ideal_seconds'):
      speed['mfu'] = self._work['ideal_seconds'] / seconds
    if 'input_wait' in self._work:
      wait = self._work['input_wait']
      speed |= {'input_wait': wait / max(self._count, 1), 'input_wait_share': wait / seconds}
    return speed

  def copy(self) -> None:
    """Brings the copy in a bucket up to date, so that a checkpoint never has steps that the log lacks."""
    if self._writes:
      self._folder.copy(wait=True)

  def evaluated(self, step: int, metrics: dict[str, float]) -> None:
    """Writes the metrics of evaluations after a step that is logged; their time does not count as that of steps."""
    if not metrics:
      return
    self.record(step, metrics)
    self._print(f'step {step}  ' + '  '.join(f'{k.removeprefix("eval/")} {v:.3f}' for k, v in metrics.items()))
    self.restart_clock()

  def record(self, step: int, scalars: dict[str, float]) -> None:
    """Writes scalars unchanged."""
    if not self._writes:
      return
    self._file.write(json.dumps({'step': step, **scalars}) + '\n')
    self._file.flush()
    with self._board.as_default(step=step):
      for k, v in scalars.items():
        tf.summary.scalar(k, v)
    self._board.flush()
    self._folder.copy()


def is_evaluated(workdir: str | os.PathLike[str], step: int) -> bool:
  """Whether a work directory has the metrics of evaluations after a step."""
  path = storage.path(workdir) / FILE
  lines = path.read_text().splitlines() if path.exists() else ()
  return any(_step_of(line) == step and any(k.startswith('eval/') for k in json.loads(line)) for line in lines)


def _step_of(line: str) -> int:
  """Step of a line; a line that a crash truncated counts as later than any step."""
  try:
    return int(json.loads(line)['step'])
  except (ValueError, KeyError, TypeError):
    return sys.maxsize


def _duration(seconds: float) -> str:
  minutes, s = divmod(int(seconds), 60)
  return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min {s} s' if minutes else f'{s} s'
