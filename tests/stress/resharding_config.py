"""The run of resharding.py, over every type of source and so small that its steps cost nothing, and its synthetic data.

  --config=tests/stress/resharding_config.py:all_tasks        every task in every step
  --config=tests/stress/resharding_config.py:one_task,digit   one task per step; some of the tasks
"""

import json
import pathlib

import ml_collections
import numpy as np
from PIL import Image

from uni_moe_jax import config as config_lib

SYNTHETIC = 'synthetic'  # name of the strings in memory and of the TFDS dataset
_COLORS = {'red': (200, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 200)}
_WORDS = 'a small shape moves over the line and returns its value when another calls with two numbers or names'.split()
_IMAGE_SIZE, _FRAMES = 32, 6  # pixels; frames of a video, of which two are used


def get_config(arg: str = 'all_tasks') -> ml_collections.ConfigDict:
  """One layer of width 16 with four experts; batches that eight devices can share."""
  mixture, *chosen = arg.split(',')
  c = config_lib.base()
  c.model.update(dict(num_layers=1, width=16, num_heads=2, mlp_dim=16, image_size=_IMAGE_SIZE, patch_size=16,
                      max_num_frames=4, max_text_len=24, layer_scale_init=0.5, remat=False))
  c.moe.num_experts = 4
  c.tokenizer.vocab_size = 50
  c.optim.warmup_steps = 5
  c.train.update(dict(mixture=mixture, log_every=1, checkpoint_every=1_000_000, ema_decay=0.9))  # saves when it stops
  c.data.max_corrupt_fraction = 0.5  # one of the 16 examples of the TFDS dataset has no class
  target_sets = {
      'digits': config_lib.target_set('digits/name', family='names'),
      'colors': config_lib.target_set(tuple(_COLORS), family='names'),
      'words': config_lib.target_set('vocabulary', family='words', softmax='sampled', num_sampled=32)}
  mlm = dict(batch_size=8, target_set='words', max_len=12, max_predictions=3)
  color = dict(target_set='colors', label_column='color')
  task = config_lib.task
  tasks = {
      # In memory, like the embedded data.
      'digit': task('image_classification', 'digits', batch_size=8, target_set='digits', label_column='name',
                    max_shift=1),
      'corpus': task('text_mlm', SYNTHETIC, **mlm),
      # In files: prepared images and videos, a TFDS dataset, running text.
      'color': task('image_classification', 'own:colors', batch_size=16, crop='random_resized_crop', random_flip=True,
                    random_erasing=0.25, mixup_alpha=0.8, cutmix_alpha=1.0, **color),
      'pair': task('image_retrieval', 'own:colors', batch_size=8, caption_templates=('{captions}',), max_len=8),
      'tfds': task('image_classification', f'tfds:{SYNTHETIC}', batch_size=8, **color),
      'video': task('video_classification', 'own:videos', batch_size=8, num_frames=2, **color),
      'book': task('text_mlm', 'own:book', **mlm)}
  for name in chosen or tasks:
    c.tasks[name] = tasks[name]
    if tasks[name].target_set:
      c.target_sets[tasks[name].target_set] = target_sets[tasks[name].target_set]
  return c


def register() -> None:
  """Register the strings in memory as a source of this process."""
  from uni_moe_jax.data.batches import sources
  from uni_moe_jax.data.examples import npz_records
  sources.SOURCES[SYNTHETIC] = lambda directory, split: npz_records.load(directory, SYNTHETIC, split)


def prepare(folder: pathlib.Path) -> None:
  """Write the data of the run to a data directory."""
  from uni_moe_jax.data.examples import npz_records
  from uni_moe_jax.data.prepare import prepare as prepare_lib
  rng = np.random.default_rng(0)
  with npz_records.atomic_folder(folder / SYNTHETIC) as destination:
    npz_records.save(destination, 'train', {'text': np.array([_sentence(rng) for _ in range(20)])}, {})
  _prepare_images(folder, 'colors', 24, rng)
  # Own data is written as a TFDS dataset, with its labels in a file of their own. Here one example has no class, so
  # that another one replaces it.
  _prepare_images(folder, SYNTHETIC, 16, rng, without_class=5)
  (folder / 'tfds').mkdir()
  (folder / prepare_lib.FOLDER / SYNTHETIC).rename(folder / 'tfds' / SYNTHETIC)
  frames = rng.integers(0, 256, (16, _FRAMES, _IMAGE_SIZE, _IMAGE_SIZE, 3), dtype=np.uint8)
  videos = _input_folder(folder, 'videos')
  np.savez(videos / 'videos.npz', frames=frames)
  _write_jsonl(videos / 'videos.jsonl', [{'color': _color(i), 'split': 'train'} for i in range(len(frames))])
  prepare_lib.prepare(videos, folder, 'videos')
  (folder / 'book.txt').write_text('\n'.join(f'{_sentence(rng)} {i}' for i in range(40)))
  prepare_lib.prepare(folder / 'book.txt', folder, 'book', test_fraction=0.0)


def _prepare_images(
    folder: pathlib.Path, name: str, count: int, rng: np.random.Generator, without_class: int | None = None) -> None:
  """Prepare images with captions and a class."""
  from uni_moe_jax.data.prepare import prepare as prepare_lib
  images, lines = _input_folder(folder, name), []
  for i in range(count):
    color, file = _color(i), f'{i}.png'
    noise = rng.integers(-25, 26, (_IMAGE_SIZE, _IMAGE_SIZE + 8, 3))
    Image.fromarray(np.clip(np.array(_COLORS[color]) + noise, 0, 255).astype(np.uint8)).save(images / file)
    line = {'image': file, 'captions': [f'a {color} shape {i}', f'{i} is {color}'], 'split': 'train'}
    lines.append(line if i == without_class else {**line, 'color': color})
  _write_jsonl(images / 'data.jsonl', lines)
  prepare_lib.prepare(images, folder, name)


def _input_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
  path = folder / 'input' / name
  path.mkdir(parents=True)
  return path


def _write_jsonl(path: pathlib.Path, lines: list[dict]) -> None:
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def _color(i: int) -> str:
  return list(_COLORS)[i % len(_COLORS)]


def _sentence(rng: np.random.Generator) -> str:
  return ' '.join(rng.choice(_WORDS, 10)) + '.'
