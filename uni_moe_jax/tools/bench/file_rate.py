"""Subject: how fast pictures and clips come out of people's own prepared files, decoded and cut as in training."""

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
_BATCH = 64
_FRAMES = 8  # that a model sees of a clip
_CLIP = (64, 96, 128)  # frames, height, width of one in a file


@dataclasses.dataclass(frozen=True)
class Sort:
  """A sort of files.

  Attributes:
    what: for the table. suffix: of the files. write: (path, noise generator) → None.
    pixels: of the model, a side. crop: as of `config.task`. frames: of a clip; 0: pictures.
    share: how many files there are, of `Sizes.files`. recorded: what DATA.md says of it.
  """
  what: str
  suffix: str
  write: Callable[[pathlib.Path, np.random.Generator], None]
  pixels: int
  crop: str
  frames: int
  share: float
  recorded: str


def _picture(height: int, width: int):
  def write(path, rng):
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
  return write


def _clip(path: pathlib.Path, rng: np.random.Generator) -> None:
  import av  # of an extra
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('mpeg4', rate=24)
    stream.height, stream.width = _CLIP[1:]
    stream.pix_fmt = 'yuv420p'
    for _ in range(_CLIP[0]):
      frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (*_CLIP[1:], 3), np.uint8), format='rgb24')
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


_SORTS = {
    'jpeg': Sort('JPEG of 500 × 375, a part of the area', 'jpg', _picture(375, 500), 224, 'random_resized_crop', 0, 1.0,
                 '1,000 with a crop of one size; in memory, undecoded, 14,000'),
    'png': Sort('PNG of 32 × 32', 'png', _picture(32, 32), 32, 'resize_crop', 0, 1.0, '7,200'),
    'clip': Sort('mp4 of {2} × {1}, {0} frames: {3} of them, jittered'.format(*_CLIP, _FRAMES), 'mp4', _clip, 96, 'jittered_crop', _FRAMES,
                 0.125, 'nothing of clips in files; 90,000 frames in memory'),
}


def files(context: Context) -> list[Row]:
  """Examples per second of JPEGs, PNGs and, with the extra `video`, clips. They are noise: harder to decode than photographs."""
  s, calls, before, counts = context.sizes, {}, {}, {}
  sorts = {name: sort for name, sort in _SORTS.items() if not sort.frames or importlib.util.find_spec('av')}
  with tempfile.TemporaryDirectory(prefix='files_') as folder:
    for name, sort in sorts.items():
      stream, batch = _stream(pathlib.Path(folder), name, sort, max(2, int(s.files * sort.share)), s.steps)
      calls[name], before[name], counts[name] = stream.drain, stream.skip, batch * s.steps
    seconds = interleaved(calls, s.rounds, before=before)
  note = 'from prepared own data, pipeline alone, on all cores; recorded on two cores: {}'
  return [Row('files', sort.what, per_second(counts[name], seconds[name]), 'clips/s' if sort.frames else 'pictures/s',
              note=note.format(sort.recorded))
          for name, sort in sorts.items()]


def _stream(folder: pathlib.Path, name: str, sort: Sort, count: int, steps: int) -> tuple[Stream, int]:
  """(training batches of `count` files that are written and prepared below `folder`, examples of a batch)."""
  rng = np.random.default_rng(0)
  for c in _CLASSES:
    (folder / name / c).mkdir(parents=True)
  for i in range(count):
    sort.write(folder / name / _CLASSES[i % 2] / f'{i}.{sort.suffix}', rng)
  prepare.prepare(folder / name, folder, name, test_fraction=0.0)
  c = config_lib.base()
  c.model.image_size = sort.pixels
  c.target_sets.classes = config_lib.target_set(_CLASSES, family='names')
  kind, batch = 'video_classification' if sort.frames else 'image_classification', min(_BATCH, count)
  c.tasks[name] = config_lib.task(
      kind, f'own:{name}', batch_size=batch, target_set='classes', label_column='label', num_frames=sort.frames, crop=sort.crop, random_flip=True)
  plan = make_plan(c)
  builder = FileExampleBuilder(None, {'classes': _CLASSES}, sort.pixels, 3, True, False, 0, 0.0)  # no text, so no tokenizer
  examples = builder.build(plan.tasks[0], file_dataset.load(f'own:{name}', folder, 'train'))
  return Stream(Mixture(plan, {name: examples}, 0, 'all_tasks', c.model.max_num_frames, BatchLayout()), steps), batch
