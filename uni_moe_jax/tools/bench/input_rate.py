"""Suites `input` and `files`: the rate of the input pipeline, from memory and from files, and its cost to the step."""

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

import numpy as np
from PIL import Image

from uni_moe_jax import config as config_lib
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.data.batches.mixtures import Batch, BatchLayout, Mixture
from uni_moe_jax.data.examples.examples import encode_texts, pad_tokens
from uni_moe_jax.data.examples.file_dataset_examples import FileExampleBuilder
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from uni_moe_jax.tools.bench import plain_input
from uni_moe_jax.tools.bench.cases import Context, RepeatedStep
from uni_moe_jax.tools.bench.results_table import Budget, Row
from uni_moe_jax.tools.bench.settings import Sizes
from uni_moe_jax.tools.bench.timing import interleaved

_BUDGET = Budget(1.05, 1.02)
_OF_BY_HAND = Budget(0.9, 1.0, at_most=False)
_BY_HAND_NOTE = 'the same work in plain tf.data, see tools/bench/plain_input.py'
_RECORDED = {'images/s': '14,000', 'videos/s': '90,000 frames a second'}
_PAUSE = 0.1  # seconds
_STEPS = 100_000  # of a stream: more than are read
_CLASSES = ('a', 'b')
_BATCH_SIZE = 64
_MAX_LEN = 16  # tokens of a caption
_WORDS = ('a', 'the', 'red', 'blue', 'small', 'old', 'cat', 'dog', 'house', 'river', 'near', 'under', 'bright', 'field')
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
  num_ahead = run.mixture().num_ahead(next(real))

  def constant_steps():
    return [step() for _ in range(s.steps)][-1]

  def real_steps():
    return [step(run.put_batch(batch)) for batch in itertools.islice(real, s.steps)][-1]

  seconds = interleaved(
      {'real': real_steps, 'constant': constant_steps}, s.rounds, before={'real': _skip(real, num_ahead)})
  note = f'{s.steps} steps per round; {num_ahead} batches are skipped before each, so that none is ready'
  slowdown = seconds.figure(seconds['real'] / seconds['constant'])
  return rows + [
      Row('input', 'constant-batch step', seconds.figure(seconds['constant'] / s.steps), 's', note=note),
      Row('input', 'real-data step / constant-batch step', slowdown, 'x', _BUDGET, note)]


def _pipeline_rates(
    suite: str, mixtures: Mapping[str, Mixture], sizes: Sizes, note: Callable[[str, str], str],
    by_hand: Mapping[str, tuple[Iterator[Any], int]] = types.MappingProxyType({})) -> list[Row]:
  """Measure the pipeline of each mixture of one visual task.

  note: of (name, unit). by_hand: name of a mixture → batches of the same work in plain tf.data, and their size.
  """
  if not mixtures:  # of texts alone
    return []
  streams: dict[Any, Iterator[Any]] = {name: _batches(mixture) for name, mixture in mixtures.items()}
  first = {name: next(stream) for name, stream in streams.items()}
  ahead = {name: mixture.num_ahead(first[name]) for name, mixture in mixtures.items()}
  for name, (stream, _) in by_hand.items():
    streams[name, 'by hand'], ahead[name, 'by hand'] = stream, ahead[name]
  steps = {name: max(sizes.steps, 2 * number) for name, number in ahead.items()}
  gc.collect()
  gc.freeze()  # as in training, after the first step
  seconds = interleaved(
      {name: _skip(stream, steps[name]) for name, stream in streams.items()}, sizes.rounds,
      before={name: _when_idle(_skip(stream, ahead[name])) for name, stream in streams.items()})
  gc.unfreeze()
  rows = []
  for name, mixture in mixtures.items():
    [task], [fields] = mixture.plan.tasks, first[name].values()
    unit = 'videos/s' if fields['pixels'].shape[-4] > 1 else 'images/s'
    ours = seconds[name] / task.batch_size
    rows.append(Row(suite, name, seconds.figure(steps[name] / ours), unit, note=note(name, unit)))
    if name in by_hand:
      plain = seconds[name, 'by hand'] / by_hand[name][1]
      rows += [Row(suite, f'{name}: by hand', seconds.figure(steps[name] / plain), unit, note=_BY_HAND_NOTE),
               Row(suite, f'{name} / by hand', seconds.figure(plain / ours), 'x', _OF_BY_HAND, _BY_HAND_NOTE)]
  return rows


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
  share: float = 1.0  # number of files relative to `Sizes.files`
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


def file_rate(context: Context) -> list[Row]:
  """Measure JPEGs and PNGs beside the same work by hand and, with the extra `video`, videos.

  The files are noise, which is harder to decode than photographs.
  """
  file_types = {suffix: t for suffix, t in _FILE_TYPES.items() if not t.num_frames or importlib.util.find_spec('av')}
  mixtures, by_hand = {}, {}
  with tempfile.TemporaryDirectory(prefix='files_') as temporary:
    for suffix, t in file_types.items():
      folder = pathlib.Path(temporary)
      count = max(2, int(context.sizes.files * t.share))
      paths, captions = _prepare(folder, suffix, t, count)
      batch_size, classes = min(_BATCH_SIZE, count), [i % 2 for i in range(count)]
      tokenizer = captions and SentencePieceTokenizer.train(sum(captions, []), folder / 'captions.model', 300, True)
      mixtures[t.name] = _file_mixture(folder, suffix, t, batch_size, tokenizer, 'fast')
      if captions:
        rows = encode_texts(sum(captions, []), tokenizer, _MAX_LEN)
        tokens = pad_tokens(rows, _MAX_LEN, tokenizer.pad)[0].reshape(count, t.num_captions, _MAX_LEN)
        by_hand[t.name] = plain_input.pngs(paths, tokens, t.image_size, batch_size), batch_size
      elif not t.num_frames:
        by_hand[t.name] = plain_input.jpegs(paths, classes, t.image_size, batch_size, 'area'), batch_size
        pillow = f"{t.name}, resize='pillow'"
        mixtures[pillow] = _file_mixture(folder, suffix, t, batch_size, tokenizer, 'pillow')
        by_hand[pillow] = plain_input.jpegs(paths, classes, t.image_size, batch_size, 'bicubic'), batch_size
    return _pipeline_rates(
        'files', mixtures, context.sizes, lambda *_: 'from prepared files, pipeline only, on all cores', by_hand)


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


def _file_mixture(folder: pathlib.Path, suffix: str, file_type: FileType, batch_size: int, tokenizer: Tokenizer | None,
                  resize: str) -> Mixture:
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
  builder = FileExampleBuilder(
      tokenizer, {'classes': _CLASSES}, channels=3, size=file_type.image_size, training=True,
      random_special_tokens=False, seed=0, max_corrupt_fraction=0.0, resize=resize)
  examples = builder.build(plan.tasks[0], file_dataset.load(f'own:{suffix}', folder, 'train'))
  return Mixture(plan, {suffix: examples}, 0, 'all_tasks', c.model.max_num_frames, BatchLayout())
