"""A run over every sort of source, so small that its steps cost nothing, and the invented data that it reads: what moves.py moves.

  --config=uni_moe_jax/faults/moved_run.py:mixed            every task in every step
  --config=uni_moe_jax/faults/moved_run.py:sampled,digit    one task a step; some of the tasks
"""

import json
import os
import pathlib

import ml_collections
import numpy as np
from PIL import Image

from uni_moe_jax import config as config_lib

INVENTED = 'invented'  # the texts in memory, and the TFDS data set
_COLOURS = {'red': (200, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 200)}
_WORDS = 'a small shape moves over the line and returns its value when another one calls with two numbers or names'.split()
_SIDE, _FRAMES = 32, 6  # pixels; frames of a clip, of which two are taken


def get_config(arg: str = 'all_tasks') -> ml_collections.ConfigDict:
  """One layer, width 16, four experts; batches that eight devices can share."""
  mixture, *chosen = arg.split(',')
  c = config_lib.base()
  c.model.update(dict(num_layers=1, width=16, num_heads=2, mlp_dim=16, image_size=_SIDE, patch_size=16, max_num_frames=4, max_text_len=24,
                      layer_scale_init=0.5, remat=False))
  c.moe.num_experts = 4
  c.tokenizer.vocab_size = 50
  c.optim.warmup_steps = 5
  c.train.update(dict(mixture=mixture, log_every=1, checkpoint_every=1_000_000, ema_decay=0.9))  # saved where it stops
  c.data.max_corrupt_fraction = 0.5  # one of the 16 examples of the TFDS data set has no class
  task, sets = config_lib.task, {
      'digits': config_lib.target_set('digits/name', family='names'),
      'colours': config_lib.target_set(tuple(_COLOURS), family='names'),
      'words': config_lib.target_set('vocabulary', family='words', softmax='sampled', num_sampled=32)}
  tasks = {
      # In memory, as the embedded data is.
      'digit': task('image_classification', 'digits', batch_size=8, target_set='digits', label_column='name', max_shift=1),
      'corpus': task('text_mlm', INVENTED, batch_size=8, target_set='words', max_len=12, max_predictions=3),
      # In files: prepared pictures and clips, a data set of TFDS, running text.
      'colour': task('image_classification', 'own:colours', batch_size=16, target_set='colours', label_column='colour', crop='random_resized_crop',
                     random_flip=True, random_erasing=0.25, mixup_alpha=0.8, cutmix_alpha=1.0),
      'pair': task('image_retrieval', 'own:colours', batch_size=8, caption_templates=('{captions}',), max_len=8),
      'tfds': task('image_classification', f'tfds:{INVENTED}', batch_size=8, target_set='colours', label_column='colour'),
      'film': task('video_classification', 'own:films', batch_size=8, num_frames=2, target_set='colours', label_column='colour'),
      'book': task('text_mlm', 'own:book', batch_size=8, target_set='words', max_len=12, max_predictions=3)}
  for name in chosen or tasks:
    c.tasks[name] = tasks[name]
    if tasks[name].target_set:
      c.target_sets[tasks[name].target_set] = sets[tasks[name].target_set]
  return c


def register() -> None:
  """Makes the texts in memory known to this process."""
  from uni_moe_jax.data import sources
  from uni_moe_jax.data.pipeline import npz_records
  sources.SOURCES[INVENTED] = lambda directory, split: npz_records.load(os.path.join(directory, INVENTED), split, directory)


def prepare(folder: pathlib.Path) -> None:
  """Writes what the run reads into a data directory."""
  from uni_moe_jax.data.files import prepare as prepared
  from uni_moe_jax.data.pipeline import npz_records
  rng = np.random.default_rng(0)
  with npz_records.atomic_folder(folder / INVENTED) as place:
    npz_records.save(place, 'train', {'text': np.array([_sentence(rng) for _ in range(20)])}, {})
  _prepare_pictures(folder, 'colours', 24, rng)
  # What is written for own data is a data set of TFDS; there it has no labels beside it. One example has no class, so that
  # another one takes its place.
  _prepare_pictures(folder, INVENTED, 16, rng, without=5)
  (folder / 'tfds').mkdir()
  (folder / prepared.FOLDER / INVENTED).rename(folder / 'tfds' / INVENTED)
  _prepare_clips(folder, 'films', 16, rng)
  (folder / 'book.txt').write_text('\n'.join(f'{_sentence(rng)} {i}' for i in range(40)))
  prepared.prepare(folder / 'book.txt', folder, 'book', test_fraction=0.0)


def _prepare_pictures(folder: pathlib.Path, name: str, count: int, rng: np.random.Generator, without: int | None = None) -> None:
  """Pictures with captions and a class, which one may lack."""
  from uni_moe_jax.data.files import prepare as prepared
  given, lines = folder / 'given' / name, []
  given.mkdir(parents=True)
  for i in range(count):
    colour, file = list(_COLOURS)[i % 3], f'{i}.png'
    noise = rng.integers(-25, 26, (_SIDE, _SIDE + 8, 3))
    Image.fromarray(np.clip(np.array(_COLOURS[colour]) + noise, 0, 255).astype(np.uint8)).save(given / file)
    line = {'image': file, 'captions': [f'a {colour} shape {i}', f'{i} is {colour}'], 'split': 'train'}
    lines.append(line if i == without else {**line, 'colour': colour})
  (given / 'data.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  prepared.prepare(given, folder, name)


def _prepare_clips(folder: pathlib.Path, name: str, count: int, rng: np.random.Generator) -> None:
  """Clips of noise with a class, as an array of frames."""
  from uni_moe_jax.data.files import prepare as prepared
  given = folder / 'given' / name
  given.mkdir(parents=True)
  np.savez(given / f'{name}.npz', frames=rng.integers(0, 256, (count, _FRAMES, _SIDE, _SIDE, 3), dtype=np.uint8))
  lines = [{'colour': list(_COLOURS)[i % 3], 'split': 'train'} for i in range(count)]
  (given / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  prepared.prepare(given, folder, name)


def _sentence(rng: np.random.Generator) -> str:
  return ' '.join(rng.choice(_WORDS, 10)) + '.'
