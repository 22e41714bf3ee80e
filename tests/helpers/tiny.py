"""A tiny run: made-up records in the layout of prepared data, and a config with small tasks over them.

Importing this module does not import jax, so a command line can name its config: get_config = tiny.config.
"""

import functools
import pathlib
import tempfile
from collections.abc import Sequence

import ml_collections
import numpy as np

from uni_moe_jax import config as config_lib

IMAGE_SIZE, NUM_FRAMES = 16, 3  # of images and videos
CLASSES = ('bar', 'disc', 'star')
MOTIONS = ('left', 'right')
PACKAGES = ('alpha', 'beta')
COLORS = ('red', 'green', 'blue', 'grey')
WORDS = (
    'a picture of the small shape moves over every line and returns its value when another function calls '
    'with two numbers or one name in order to read write open close find replace all files').split()
TASKS = ('shape', 'motion', 'text', 'caption', 'pair', 'package', 'answer')


def config(*tasks: str, data_dir: str = '') -> ml_collections.ConfigDict:
  """Return a config with the named tasks (of `TASKS`), two layers of width 16 and four experts."""
  c = config_lib.base()
  c.data.dir = str(data_dir)
  c.tokenizer.update(dict(vocab_size=40, allow_smaller_vocab=True))  # a task alone may have few words
  c.model.update(dict(
      num_layers=2, width=16, num_heads=2, mlp_dim=16, image_size=IMAGE_SIZE, patch_size=8, channels=1,
      pixel_mean=(0.5,), pixel_std=(0.5,), max_num_frames=4, max_text_len=20, layer_scale_init=0.5, remat=False))
  c.moe.update(dict(num_experts=4))
  c.optim.update(dict(learning_rate=1e-2, warmup_steps=2))
  c.train.update(dict(steps=6, log_every=1, checkpoint_every=100))
  sets = {
      'shapes': config_lib.target_set('glyphs/class', family='names'),
      'motions': config_lib.target_set('videos/motion', family='names'),
      'words': config_lib.target_set('vocabulary', family='words', softmax='sampled', num_sampled=32),
      'packages': config_lib.target_set('paragraphs/package', family='words'),
      'answers': config_lib.target_set('pairs/label', family='words'),
  }
  all_tasks = {
      'shape': config_lib.task(
          'image_classification', 'glyphs', batch_size=8, target_set='shapes', label_column='class'),
      'motion': config_lib.task(
          'video_classification', 'videos', batch_size=4, target_set='motions', label_column='motion'),
      'text': config_lib.task(
          'text_mlm', 'paragraphs', batch_size=4, target_set='words', max_len=16, max_predictions=3),
      'caption': config_lib.task(
          'image_caption', 'glyphs', batch_size=4, target_set='words', caption_templates=('{name}',), max_len=6),
      'pair': config_lib.task(
          'image_retrieval', 'glyphs', batch_size=4, caption_templates=('{name}', '{name} in {face}'), max_len=8),
      'package': config_lib.task(
          'text_classification', 'paragraphs', batch_size=4, target_set='packages', label_column='package',
          template='{text} <eot> it is <spe> . <eot>', max_len=16),
      'answer': config_lib.task(
          'text_classification', 'pairs', batch_size=2, target_set='answers', label_column='label',
          template='{text_a} <eot> <spe> , {text_b} <eot>', max_len=16),
  }
  for name in tasks:
    c.tasks[name] = task = all_tasks[name]
    if task.target_set:
      c.target_sets[task.target_set] = sets[task.target_set]
  return c


def untrained(init: str) -> ml_collections.ConfigDict:
  """Return a config that trains nothing: it evaluates the run in `init` on a task."""
  c = config('pair', data_dir=data_dir())
  c.tasks.pair.batch_size, c.train.init, c.tokenizer.path = 0, init, tokenizer_file()
  c.evaluators.pair = config_lib.evaluator('retrieval', 'pair', split='train')
  return c


def write_config(file: pathlib.Path, *tasks: str, steps: int = 6) -> str:
  """Write a config file for commands, `config` over `data_dir`. Return the flag that names it."""
  root = str(pathlib.Path(__file__).parents[2])
  file.write_text(
      f'import sys\nsys.path.insert(0, {root!r})\nfrom tests.helpers import tiny\n\n\n'
      f'def get_config():\n  c = tiny.config(*{tasks!r}, data_dir={data_dir()!r})\n  c.train.steps = {steps}\n'
      '  return c\n')
  return f'--config={file}'


def _sentences(rng: np.random.Generator, count: int, words: int) -> np.ndarray:
  return np.array([' '.join(rng.choice(WORDS, words)) + '.' for _ in range(count)])


@functools.cache
def columns() -> dict[str, tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]]:
  """Return (columns, classes) by source."""
  rng = np.random.default_rng(0)
  shapes, colors = rng.choice(CLASSES, 24), rng.choice(COLORS, 24)
  packages = np.array(['alpha', 'beta', ''] * 8)
  return {
      'glyphs': (dict(
          pixels=rng.integers(0, 256, (24, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8),
          face=rng.choice(['serif', 'round'], 24),
          name=np.array([f'{c} {s} of {w}' for c, s, w in zip(colors, shapes, WORDS)]), **{'class': shapes}),
          {'class': CLASSES}),
      'videos': (dict(
          pixels=rng.integers(0, 256, (10, NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8),
          name=np.array(WORDS[-10:]), face=rng.choice(['serif', 'round'], 10), motion=rng.choice(MOTIONS, 10)),
          {'motion': MOTIONS}),
      'paragraphs': (dict(text=_sentences(rng, 24, 14), package=packages), {'package': PACKAGES}),
      'pairs': (dict(
          text_a=_sentences(rng, 12, 4), text_b=_sentences(rng, 12, 12), label=rng.choice(['no', 'yes'], 12)),
          {'label': ('no', 'yes')}),
  }


def records(source: str, **changed: np.ndarray):
  """Return a source's records, in memory; changed: columns by name."""
  from uni_moe_jax.data.shards import file_dataset
  original, classes = columns()[source]
  return file_dataset.in_memory(source, {**original, **changed}, classes)


@functools.cache
def data_dir() -> str:
  """Return a folder of prepared data, made once per process and deleted at its end."""
  for source in columns():
    write(_folder().name, source, ['train'])
  return _folder().name


def write(root: str | pathlib.Path, source: str, splits: Sequence[str]) -> None:
  """Write a source, with equal splits, into a folder of prepared data."""
  from uni_moe_jax.data.shards import file_dataset, writer
  writer.write_dataset(root, file_dataset.embedded_folder(source), lambda: ((s, *columns()[source]) for s in splits))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix='tiny_data_')


@functools.cache
def tokenizer_file() -> str:
  """Return a tokenizer file, trained on all the text once per process."""
  from uni_moe_jax.data.text.tokenizer import SentencePieceTokenizer
  texts = [t for values, _ in columns().values() for c in values.values() if c.dtype.kind == 'U' for t in c.tolist()]
  path = f'{_folder().name}/tiny.model'
  SentencePieceTokenizer.train(texts, path, 60)
  return path
