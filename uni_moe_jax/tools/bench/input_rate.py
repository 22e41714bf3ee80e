"""Suites `input` and `files`: the rate of the input pipeline, from memory and from files, and its cost to the step."""

import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.files import file_dataset, prepare
from uni_moe_jax.data.files.file_dataset_examples import FileExampleBuilder
from uni_moe_jax.data.pipeline.mixtures import Batch, BatchLayout, Mixture
from uni_moe_jax.tools.bench.cases import Context, RepeatedStep
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.settings import Sizes
from uni_moe_jax.tools.bench.timing import interleaved

_BUDGET = Budget(1.05, 1.02)
_PREFETCHED = 4  # batches that the pipeline may have ready: two are waiting, two are being made
_RECORDED = {'images/s': '14,000', 'videos/s': '90,000 frames a second'}  # from memory; _FILE_TYPES has those of files
_STEPS = 100_000  # of a stream: more than are read
_CLASSES = ('a', 'b')
_BATCH_SIZE = 64
_NUM_FRAMES = 8  # of a video in an example
_VIDEO = (64, 96, 128)  # frames, height, width of a video file


def input_rate(context: Context) -> list[Row]:
  """Measure images and videos per second, and the step on real batches against a constant batch."""
  s, config = context.sizes, context.own_config()
  config.train.mixture = 'all_tasks'
  step = RepeatedStep(context.build(config))
  run = step.run
  mixtures = {f'{t.name}, batches of {t.batch_size}': dataclasses.replace(run.mixture(), plan=run.plan.only(t.name))
              for t in run.plan.tasks if t.type.visual}
  rows = _pipeline_rates('input', mixtures, s, lambda _, unit: (
      f'pipeline only, on all cores; recorded on two cores: {_RECORDED[unit]}'))
  real = _batches(run.mixture())

  def constant_steps():
    return [step() for _ in range(s.steps)][-1]

  def real_steps():
    return [step(run.put_batch(batch)) for batch in itertools.islice(real, s.steps)][-1]

  seconds = interleaved({'real': real_steps, 'constant': constant_steps}, s.rounds, before={'real': _skip(real)})
  note = f'{s.steps} steps per round; {_PREFETCHED} batches are skipped before each, so that none is ready'
  slowdown = seconds.figure(seconds['real'] / seconds['constant'])
  return rows + [
      Row('input', 'constant-batch step', seconds.figure(seconds['constant'] / s.steps), 's', note=note),
      Row('input', 'real-data step / constant-batch step', slowdown, 'x', _BUDGET, note)]


def _pipeline_rates(
    suite: str, mixtures: Mapping[str, Mixture], sizes: Sizes, note: Callable[[str, str], str]) -> list[Row]:
  """Measure the pipeline of each mixture of one visual task. note: of (name, unit)."""
  streams = {name: _batches(mixture) for name, mixture in mixtures.items()}
  first = {name: next(stream) for name, stream in streams.items()}
  seconds = interleaved(
      {name: _skip(stream, sizes.steps) for name, stream in streams.items()}, sizes.rounds,
      before={name: _skip(stream) for name, stream in streams.items()})
  rows = []
  for name, mixture in mixtures.items():
    [task], [fields] = mixture.plan.tasks, first[name].values()
    unit = 'videos/s' if fields['pixels'].shape[-4] > 1 else 'images/s'
    rate = seconds.figure(task.batch_size * sizes.steps / seconds[name])
    rows.append(Row(suite, name, rate, unit, note=note(name, unit)))
  return rows


def _batches(mixture: Mixture) -> Iterator[Batch]:
  return (batch for _, batch in mixture.iterate(0, _STEPS))


def _skip(batches: Iterator[Batch], count: int = _PREFETCHED) -> Callable[[], None]:
  """Return a function that discards batches; by default those that may be ready, as they cost a round nothing."""
  def skip():
    for _ in itertools.islice(batches, count):
      pass
  return skip


@dataclasses.dataclass(frozen=True)
class FileType:
  """A type of files."""
  name: str  # for the table
  write: Callable[[pathlib.Path, np.random.Generator], None]
  image_size: int  # of the model
  crop: str  # see `config.task`
  recorded: str  # rate measured without batches, for the note
  num_frames: int = 0  # of a video; 0: images
  share: float = 1.0  # number of files relative to `Sizes.files`


def _write_image(height: int, width: int, path: pathlib.Path, rng: np.random.Generator) -> None:
  Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)


def _write_video(path: pathlib.Path, rng: np.random.Generator) -> None:
  import av  # of an extra
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('mpeg4', rate=24)
    stream.height, stream.width = _VIDEO[1:]
    stream.pix_fmt = 'yuv420p'
    for _ in range(_VIDEO[0]):
      frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (*_VIDEO[1:], 3), np.uint8), format='rgb24')
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


_FILE_TYPES = {  # by suffix
    'jpg': FileType('JPEG of 500 × 375, random area', functools.partial(_write_image, 375, 500), 224,
                    'random_resized_crop', '1,000 with a crop of one size; in memory, undecoded, 14,000'),
    'png': FileType('PNG of 32 × 32', functools.partial(_write_image, 32, 32), 32, 'resize_crop', '7,200'),
    'mp4': FileType('mp4 of {2} × {1}, {0} frames: {3} of them, jittered'.format(*_VIDEO, _NUM_FRAMES), _write_video,
                    96, 'jittered_crop', 'no video files; 90,000 frames in memory', _NUM_FRAMES, 0.125),
}


def file_rate(context: Context) -> list[Row]:
  """Measure JPEGs, PNGs and, with the extra `video`, videos.

  The files are noise, which is harder to decode than photographs.
  """
  types = {suffix: t for suffix, t in _FILE_TYPES.items() if not t.num_frames or importlib.util.find_spec('av')}
  recorded = {t.name: t.recorded for t in types.values()}
  with tempfile.TemporaryDirectory(prefix='files_') as folder:
    mixtures = {t.name: _file_mixture(pathlib.Path(folder), suffix, t, max(2, int(context.sizes.files * t.share)))
                for suffix, t in types.items()}
    return _pipeline_rates('files', mixtures, context.sizes, lambda name, _: (
        f'from prepared files, pipeline only, on all cores; recorded on two cores: {recorded[name]}'))


def _file_mixture(folder: pathlib.Path, suffix: str, file_type: FileType, count: int) -> Mixture:
  """Write and prepare `count` files in a folder, for training."""
  rng = np.random.default_rng(0)
  for c in _CLASSES:
    (folder / suffix / c).mkdir(parents=True)
  for i in range(count):
    file_type.write(folder / suffix / _CLASSES[i % 2] / f'{i}.{suffix}', rng)
  prepare.prepare(folder / suffix, folder, suffix, test_fraction=0.0)
  c = config_lib.base()
  c.model.image_size = file_type.image_size
  c.target_sets.classes = config_lib.target_set(_CLASSES, family='names')
  task_type = 'video_classification' if file_type.num_frames else 'image_classification'
  c.tasks[suffix] = config_lib.task(
      task_type, f'own:{suffix}', batch_size=min(_BATCH_SIZE, count), target_set='classes', label_column='label',
      num_frames=file_type.num_frames, crop=file_type.crop, random_flip=True)
  plan = make_plan(c)
  # No text, so no tokenizer.
  builder = FileExampleBuilder(None, {'classes': _CLASSES}, 3, file_type.image_size, True, False, 0, 0.0)
  examples = builder.build(plan.tasks[0], file_dataset.load(f'own:{suffix}', folder, 'train'))
  return Mixture(plan, {suffix: examples}, 0, 'all_tasks', c.model.max_num_frames, BatchLayout())
