"""Generated mistakes in people's own data: rows, texts, pictures and clips as programs, disks and people leave them."""

import functools
import importlib.util
import io
import json
import pathlib
import random
import re
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from uni_moe_jax.data.files import check, file_dataset, media, prepare, video
from uni_moe_jax.data.files.formats import LOCATION, MEDIA_TYPES
from uni_moe_jax.faults.bad_configs import ODD_TEXTS, UNREACHABLE, WRONG_TYPES, Case, mangled

SKIPPED = 'skipped: '  # and why
_SIDE, _FRAMES = 24, 8
_GOOD = 5  # rows beside the generated one, which it must not cost
_WRITTEN = 10  # of so many inputs one is written and read again, too: it takes ten times as long
_PICTURES = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', 'ICO')
HAVE_VIDEO = importlib.util.find_spec('av') is not None
_CLIPS = {'mp4': 'mpeg4', 'avi': 'mpeg4', 'matroska': 'mpeg4'}  # format → codec
# Of a row: those that mean something, and one that may be a class or a text.
_FIELDS = ('image', 'video', 'caption', 'captions', 'text', 'text_a', 'label', 'label_name', 'split', 'group', 'key', LOCATION, 'question')
_PATHS = ('', '.', '..', '/', '/dev/zero', 'gone.png', '\0', '\udcff.png', 'data.jsonl', *UNREACHABLE)


def jsonl_case(rng: random.Random, folder: pathlib.Path) -> Case:
  """A row among good ones that is of another type, lacks a field, names an odd file, or is cut in its bytes."""
  source = folder / 'in'
  source.mkdir()
  (source / 'a.png').write_bytes(_picture('PNG', rng.randrange(4)))
  good = [{'image': 'a.png', 'captions': [f'number {i}'], 'label': 'ab'[i % 2]} for i in range(_GOOD)]
  row: dict[str, Any] = {'image': 'a.png', 'captions': ['one more'], 'label': 'a'}
  for _ in range(rng.randrange(1, 3)):
    name = rng.choice(_FIELDS if rng.random() < .9 else ODD_TEXTS)
    values = _PATHS if name in MEDIA_TYPES else (*WRONG_TYPES, *ODD_TEXTS, [rng.choice(ODD_TEXTS)], float('nan'), 10**40)
    row[name] = rng.choice(values)
  line = json.dumps(row, ensure_ascii=rng.random() < .5).encode(errors='surrogatepass')
  if rng.random() < .3:
    line = mangled(rng, line)
  lines = [json.dumps(r).encode() for r in good]
  lines.insert(rng.randrange(_GOOD + 1), line)
  (source / 'data.jsonl').write_bytes(b'\n'.join(lines))
  return _prepared('jsonl', repr(line[:60]), rng, folder, source, _GOOD)


def text_case(rng: random.Random, folder: pathlib.Path) -> Case:
  """Lines of a text file, some of them odd, or its bytes damaged."""
  lines = [f'line {i}' for i in range(_GOOD)]
  lines.insert(rng.randrange(_GOOD), rng.choice(ODD_TEXTS))
  content = '\n'.join(lines).encode(errors='surrogatepass')
  whole = rng.random() < .5
  content = content if whole else mangled(rng, content)
  source = folder / rng.choice(('train.txt', 'LINES.TXT', 'odd \udcff name.txt'))
  source.write_bytes(content)
  return _prepared('text', repr(content[:60]), rng, folder, source, _GOOD if whole else 0)


def _prepared(kind: str, what: str, rng: random.Random, folder: pathlib.Path, source: pathlib.Path, good: int) -> Case:
  """Prepares what lies in `source`, of which so many rows are good."""
  name = f'odd{rng.randrange(10**9)}'  # a process keeps what it knows of data that it has read
  limit, written = rng.choice((1.0, 1.0, 0.1)), not rng.randrange(_WRITTEN)
  if written:
    _load_libraries()

  def main() -> int | str:
    rows, skipped = check.read_checked_rows(source, max_corrupt_fraction=limit)
    if written:
      said = prepare.prepare(source, folder / 'data', name, test_fraction=0.0, max_corrupt_fraction=limit)
      kept = sum(len(file_dataset.load(f'own:{name}', folder / 'data', split).read(np.arange(size)))
                 for split, size in said['splits'].items())
      if kept != len(rows):
        raise AssertionError(f'{len(rows)} rows were sound, {kept} were written')
    if len(rows) < good:
      raise AssertionError(f'{good} rows are good, {len(rows)} were taken')
    return _skipped(*skipped) if skipped else 0
  return Case(kind, what, main, False)


@functools.cache
def _load_libraries() -> None:
  """TFDS loads much of itself at the first use: no input shall take that long."""
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, 'one.txt')
    source.write_text('line')
    prepare.prepare(source, pathlib.Path(folder), 'one')
    file_dataset.load('own:one', folder, 'train').read(np.array([0]))


def _skipped(*reasons: str) -> str:
  """The first reason, without what it quotes of the input."""
  return SKIPPED + re.sub(r"'.*'|\".*\"", '…', sorted(reasons)[0])


def _harmed(rng: random.Random, data: bytes) -> bytes:
  """Cut off, overwritten, empty; or, so that decoders get further, with a few wrong bits."""
  if rng.random() < .5:
    return mangled(rng, data)
  out = bytearray(data)
  for _ in range(rng.randrange(1, 9)):
    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
  return bytes(out)


def picture_case(rng: random.Random, folder: pathlib.Path) -> Case:
  """A picture of any format, damaged; what is taken must be read by the decoder of training."""
  form = rng.choice(_PICTURES)
  data = _harmed(rng, _picture(form, rng.randrange(4)))
  path = folder / 'picture'
  path.write_bytes(data)
  import tensorflow as tf

  def main() -> int | str:
    try:
      found = media.read_image(path)
    except media.CorruptFile as e:
      return _skipped(str(e))
    pixels = tf.io.decode_image(found.data, channels=3, expand_animations=False).numpy()
    if pixels.shape != (*found.size[::-1], 3):
      raise AssertionError(f'a picture of size {found.size} is read as {pixels.shape}')
    return 0
  return Case('picture', f'{form}, {data[:40]!r}', main, False)


def clip_case(rng: random.Random, folder: pathlib.Path) -> Case:
  """A clip of any format, damaged in its header or frames; what is taken must give frames in training."""
  forms = (*_CLIPS, 'gif') if HAVE_VIDEO else ()
  form = rng.choice((*forms, 'npy', 'npz'))
  good = _clip(form)
  # Half of the damage is where a header is.
  cut = len(good) if rng.random() < .5 else min(200, len(good))
  data = _harmed(rng, good[:cut]) + good[cut:]
  path = folder / f'clip.{form}'
  path.write_bytes(data)

  def main() -> int | str:
    try:
      found = media.FrameArrays().read_video(path, 0) if form == 'npz' else media.read_video(path)
    except media.CorruptFile as e:
      return _skipped(str(e))
    frames = video.sample_frames(found.data, np.array([0.1, 0.5, 0.9]))
    if frames.shape != (3, *found.size[:0:-1], 3) or frames.dtype != np.uint8:
      raise AssertionError(f'a clip of size {found.size} gives frames {frames.dtype}{frames.shape}')
    return 0
  return Case('clip', f'{form}, {len(data)} bytes', main, False)


@functools.cache
def _picture(form: str, seed: int) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (_SIDE, _SIDE + 8, 3), dtype=np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).convert(('RGB', 'L', 'RGB', 'RGB')[seed]).save(out, form)
  return out.getvalue()


@functools.cache
def _clip(form: str) -> bytes:
  frames, out = np.random.default_rng(0).integers(0, 256, (_FRAMES, _SIDE, _SIDE, 3), dtype=np.uint8), io.BytesIO()
  if form == 'npy':
    np.save(out, frames)
  elif form == 'npz':
    np.savez_compressed(out, frames=frames[None])
  elif form == 'gif':
    first, *others = map(Image.fromarray, frames)
    first.save(out, 'GIF', save_all=True, append_images=others)
  else:
    import av
    with av.open(out, 'w', format=form) as container:
      stream = container.add_stream(_CLIPS[form], rate=6)
      stream.width, stream.height, stream.pix_fmt = _SIDE, _SIDE, 'yuv420p'
      for frame in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
      container.mux(stream.encode())
  return out.getvalue()


KINDS: dict[str, Callable[[random.Random, pathlib.Path], Case]] = {
    'jsonl': jsonl_case, 'text': text_case, 'picture': picture_case, 'clip': clip_case}
