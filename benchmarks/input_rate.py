"""The rate of the input pipeline, from prepared data and from files, and its cost to the step.

  python -m benchmarks.input_rate --output=input.json
"""

import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import pathlib
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import paired, plain_input
from benchmarks.cases import RepeatedStep
from uni_moe_jax import config as config_lib
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.mixtures import Batch, BatchLayout, Mixture
from uni_moe_jax.data.examples.examples import ExampleBuilder
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.text.token_rows import encode_texts, pad_tokens
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from uni_moe_jax.train import run as train_run

_PAUSE = 0.1  # seconds
_STEPS = 100_000  # of a stream: more than are read
_CLASSES = ('a', 'b')
_BATCH_SIZE = 64
_MAX_LEN = 16  # tokens of a caption
_WORDS = ('a', 'the', 'red', 'blue', 'small', 'old', 'cat', 'dog', 'house', 'river', 'near', 'under', 'bright', 'field')
_NUM_FRAMES = 8  # of a video in an example
_VIDEO = (64, 96, 128)  # frames, height, width of a video file


def main() -> None:
  arguments = paired.arguments(__doc__)
  steps, files = (2, 64) if arguments.quick else (10, 256)
  report = paired.Report(arguments)
  _of_config(report, arguments.config, steps)
  _of_files(report, steps, files)
  report.write()


def _of_config(report: paired.Report, file: str, steps: int) -> None:
  """Images and videos per second of a config, and its step on real batches against a constant batch."""
  config = cli.config_from(file, ['train.mixture=all_tasks'])
  step = RepeatedStep(train_run.build(config, jax.devices()[:1]))
  run = step.run
  mixtures = {f'{t.name}, batches of {t.batch_size}': dataclasses.replace(run.mixture(), plan=run.plan.only(t.name))
              for t in run.plan.tasks if t.type.visual}
  _pipeline_rates(report, mixtures, steps)
  real = _batches(run.mixture())
  ahead = run.mixture().num_ahead(next(real))  # as many are skipped before each round, so that none is ready
  report.compare('a step', {
      'constant batch': lambda: [step() for _ in range(steps)][-1],
      'real batches': lambda: [step(run.put_batch(batch)) for batch in itertools.islice(real, steps)][-1]},
                 before={'real batches': _skip(real, ahead)}, per_call=steps)


def _pipeline_rates(
    report: paired.Report, mixtures: Mapping[str, Mixture], min_steps: int,
    by_hand: Mapping[str, tuple[Iterator[Any], int]] = types.MappingProxyType({})) -> None:
  """The rate of each mixture of one visual task, beside the same work in plain tf.data, see plain_input.py.

  by_hand: name of a mixture → batches of the same work, and their size.
  """
  for name, mixture in mixtures.items():
    stream = _batches(mixture)
    first = next(stream)
    ahead = mixture.num_ahead(first)
    steps, [task] = max(min_steps, 2 * ahead), mixture.plan.tasks
    [fields] = first.values()
    unit = 'videos/s' if fields['pixels'].shape[-4] > 1 else 'images/s'
    streams = {'ours': stream, **({'by hand': by_hand[name][0]} if name in by_hand else {})}
    gc.collect()
    gc.freeze()  # as in training, after the first step
    report.compare(name, {k: _skip(x, steps) for k, x in streams.items()}, work=steps * task.batch_size, unit=unit,
                   before={k: _when_idle(_skip(x, ahead)) for k, x in streams.items()})
    gc.unfreeze()


def _batches(mixture: Mixture) -> Iterator[Batch]:
  return (batch for _, batch in mixture.iterate(0, _STEPS))


def _skip(batches: Iterator[Batch], count: int) -> Callable[[], None]:
  """Return a function that discards batches: those that may be ready, as they cost a round nothing, or a round's."""
  def skip():
    for _ in itertools.islice(batches, count):
      pass
  return skip


def _when_idle(prepare: Callable[[], None]) -> Callable[[], None]:
  """Return a function that first waits until all pipelines have filled their buffers, which would slow the next one."""
  def wait_and_prepare():
    while True:
      before = time.process_time()
      time.sleep(_PAUSE)
      if time.process_time() - before < 0.1 * _PAUSE:
        return prepare()
  return wait_and_prepare


@dataclasses.dataclass(frozen=True)
class FileType:
  """A type of files."""
  name: str  # for the table
  write: Callable[[pathlib.Path, np.random.Generator], None]
  image_size: int  # of the model
  crop: str  # see `config.task`
  num_frames: int = 0  # of a video; 0: images
  share: float = 1.0  # number of files relative to that of images
  num_captions: int = 0  # 0: images by class


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
                    'random_resized_crop'),
    'png': FileType('PNG of 32 × 32 with captions', functools.partial(_write_image, 32, 32), 32, 'resize_crop',
                    num_captions=5),
    'mp4': FileType('mp4 of {2} × {1}, {0} frames: {3} of them, jittered'.format(*_VIDEO, _NUM_FRAMES), _write_video,
                    96, 'jittered_crop', _NUM_FRAMES, 0.5),
}


def _of_files(report: paired.Report, steps: int, files: int) -> None:
  """JPEGs and PNGs beside the same work by hand and, with the extra `video`, videos.

  The files are noise, which is harder to decode than photographs.
  """
  file_types = {suffix: t for suffix, t in _FILE_TYPES.items() if not t.num_frames or importlib.util.find_spec('av')}
  mixtures, by_hand = {}, {}
  with tempfile.TemporaryDirectory(prefix='files_') as temporary:
    for suffix, t in file_types.items():
      folder = pathlib.Path(temporary)
      count = max(2, int(files * t.share))
      paths, captions = _prepare(folder, suffix, t, count)
      batch_size, classes = min(_BATCH_SIZE, count), [i % 2 for i in range(count)]
      tokenizer = captions and SentencePieceTokenizer.train(sum(captions, []), folder / 'captions.model', 300, True)
      mixtures[t.name] = _file_mixture(folder, suffix, t, batch_size, tokenizer)
      if captions:
        rows = encode_texts(sum(captions, []), tokenizer, _MAX_LEN)
        tokens = pad_tokens(rows, _MAX_LEN, tokenizer.pad)[0].reshape(count, t.num_captions, _MAX_LEN)
        by_hand[t.name] = plain_input.pngs(paths, tokens, t.image_size, batch_size), batch_size
      elif not t.num_frames:
        by_hand[t.name] = plain_input.jpegs(paths, classes, t.image_size, batch_size, 'area'), batch_size
    _pipeline_rates(report, mixtures, steps, by_hand)


def _prepare(
    folder: pathlib.Path, suffix: str, file_type: FileType, count: int) -> tuple[list[pathlib.Path], list[list[str]]]:
  """Write and prepare files in a folder: (their paths, the captions of each)."""
  rng, source = np.random.default_rng(0), folder / suffix
  paths = [source / ('' if file_type.num_captions else _CLASSES[i % 2]) / f'{i}.{suffix}' for i in range(count)]
  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    file_type.write(path, rng)
  captions = [[' '.join(rng.choice(_WORDS, 8)) for _ in range(file_type.num_captions)] for _ in paths]
  if file_type.num_captions:
    (source / 'captions.jsonl').write_text('\n'.join(
        json.dumps({'image': path.name, 'captions': texts}) for path, texts in zip(paths, captions, strict=True)))
  prepare.prepare(source, folder, suffix, test_fraction=0.0)
  return paths, captions if file_type.num_captions else []


def _file_mixture(folder: pathlib.Path, suffix: str, file_type: FileType, batch_size: int,
                  tokenizer: Tokenizer | None) -> Mixture:
  """The mixture of prepared files, for training."""
  c = config_lib.base()
  c.model.image_size = file_type.image_size
  c.target_sets.classes = config_lib.target_set(_CLASSES, family='names')
  common = dict(batch_size=batch_size, crop=file_type.crop, random_flip=True)
  if file_type.num_captions:
    c.tasks[suffix] = config_lib.task(
        'image_retrieval', f'own:{suffix}', caption_templates=('{captions}',), max_len=_MAX_LEN, **common)
  else:
    task_type = 'video_classification' if file_type.num_frames else 'image_classification'
    c.tasks[suffix] = config_lib.task(task_type, f'own:{suffix}', target_set='classes', label_column='label',
                                      num_frames=file_type.num_frames, **common)
  plan = make_plan(c)
  builder = ExampleBuilder(
      tokenizer, {'classes': _CLASSES}, channels=3, size=file_type.image_size, training=True,
      random_special_tokens=False, seed=0, max_corrupt_fraction=0.0, resize='fast')
  examples = builder.build(plan.tasks[0], file_dataset.load(f'own:{suffix}', folder, 'train'))
  return Mixture(plan, {suffix: examples}, 0, 'all_tasks', c.model.max_num_frames, BatchLayout())


if __name__ == '__main__':
  main()
