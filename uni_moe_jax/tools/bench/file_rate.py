"""Suite `files`: images and videos per second from prepared files, decoded and cropped."""

import dataclasses
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
from PIL import Image

from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.files import file_dataset, prepare
from uni_moe_jax.data.files.file_dataset_examples import FileExampleBuilder
from uni_moe_jax.data.pipeline.mixtures import BatchLayout, Mixture
from uni_moe_jax.tools.bench.cases import Context
from uni_moe_jax.tools.bench.input_rate import Stream
from uni_moe_jax.tools.bench.results_table import Row
from uni_moe_jax.tools.bench.timing import interleaved, per_second

_CLASSES = ('a', 'b')
_BATCH_SIZE = 64
_NUM_FRAMES = 8  # of a video in an example
_VIDEO = (64, 96, 128)  # frames, height, width of a video file


@dataclasses.dataclass(frozen=True)
class FileType:
  """A type of files.

  Attributes:
    name: for the table. suffix: of the files. write: (path, random generator) → None.
    image_size: of the model. crop: see `config.task`. num_frames: of a video; 0: images.
    share: number of files relative to `Sizes.files`. recorded: rate measured without batches, for the note.
  """
  name: str
  suffix: str
  write: Callable[[pathlib.Path, np.random.Generator], None]
  image_size: int
  crop: str
  num_frames: int
  share: float
  recorded: str


def _write_image(height: int, width: int):
  def write(path, rng):
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
  return write


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


_FILE_TYPES = {
    'jpeg': FileType(
        'JPEG of 500 × 375, random area', 'jpg', _write_image(375, 500), 224, 'random_resized_crop', 0, 1.0,
        '1,000 with a crop of one size; in memory, undecoded, 14,000'),
    'png': FileType('PNG of 32 × 32', 'png', _write_image(32, 32), 32, 'resize_crop', 0, 1.0, '7,200'),
    'mp4': FileType(
        'mp4 of {2} × {1}, {0} frames: {3} of them, jittered'.format(*_VIDEO, _NUM_FRAMES), 'mp4', _write_video, 96,
        'jittered_crop', _NUM_FRAMES, 0.125, 'no video files; 90,000 frames in memory'),
}


def file_rate(context: Context) -> list[Row]:
  """Measure JPEGs, PNGs and, with the extra `video`, videos.

  The files are noise, which is harder to decode than photographs.
  """
  s, calls, before, counts = context.sizes, {}, {}, {}
  types = {name: t for name, t in _FILE_TYPES.items() if not t.num_frames or importlib.util.find_spec('av')}
  with tempfile.TemporaryDirectory(prefix='files_') as folder:
    for name, t in types.items():
      stream, batch_size = _stream(pathlib.Path(folder), name, t, max(2, int(s.files * t.share)), s.steps)
      calls[name], before[name], counts[name] = stream.drain, stream.skip, batch_size * s.steps
    seconds = interleaved(calls, s.rounds, before=before)
  return [Row('files', t.name, per_second(counts[name], seconds[name]), 'videos/s' if t.num_frames else 'images/s',
              note=f'from prepared files, pipeline only, on all cores; recorded on two cores: {t.recorded}')
          for name, t in types.items()]


def _stream(folder: pathlib.Path, name: str, file_type: FileType, count: int, steps: int) -> tuple[Stream, int]:
  """Write and prepare `count` files in a folder; return (their training batches, batch size)."""
  rng = np.random.default_rng(0)
  for c in _CLASSES:
    (folder / name / c).mkdir(parents=True)
  for i in range(count):
    file_type.write(folder / name / _CLASSES[i % 2] / f'{i}.{file_type.suffix}', rng)
  prepare.prepare(folder / name, folder, name, test_fraction=0.0)
  c = config_lib.base()
  c.model.image_size = file_type.image_size
  c.target_sets.classes = config_lib.target_set(_CLASSES, family='names')
  task_type = 'video_classification' if file_type.num_frames else 'image_classification'
  c.tasks[name] = config_lib.task(
      task_type, f'own:{name}', batch_size=min(_BATCH_SIZE, count), target_set='classes', label_column='label',
      num_frames=file_type.num_frames, crop=file_type.crop, random_flip=True)
  plan = make_plan(c)
  [task] = plan.tasks
  # No text, so no tokenizer.
  builder = FileExampleBuilder(None, {'classes': _CLASSES}, file_type.image_size, 3, True, False, 0, 0.0)
  examples = builder.build(task, file_dataset.load(f'own:{name}', folder, 'train'))
  mixture = Mixture(plan, {name: examples}, 0, 'all_tasks', c.model.max_num_frames, BatchLayout())
  return Stream(mixture, steps), task.batch_size
