"""Bad data of users by hypothesis: rows, text, images and videos as programs, disks and people leave them."""

import functools
import importlib.util
import io
import itertools
import json
import pathlib
import tempfile

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.data import own_files
from tests.stress import bad_input
from tests.stress.bad_input import JSON, ODD_STRINGS, UNREACHABLE, Case, corrupted, skipped
from uni_moe_jax.data.formats import media, video
from uni_moe_jax.data.formats.rows import LOCATION, MEDIA_TYPES
from uni_moe_jax.data.prepare import prepare
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.utils import exit_codes

_SIZE, _FRAMES = 24, 8
_NUM_GOOD = 5  # rows beside the drawn one, which must be kept
_IMAGE_FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', 'ICO')
HAS_VIDEO = importlib.util.find_spec('av') is not None
_VIDEO_FORMATS = ('npy', *(('mp4', 'avi', 'matroska', 'gif') if HAS_VIDEO else ()))
_FIELDS = ('image', 'video', 'caption', 'captions', 'text', 'text_a', 'label', 'label_name', 'split', 'group', 'key',
           LOCATION, 'question')
_OUTSIDE, _SECRET = '../secret.png', b'secret'  # a sound image, and how it ends
_PATHS = st.sampled_from(
    ('', '.', '..', '/', '/dev/zero', _OUTSIDE, 'gone.png', '\0', '\udcff.png', 'data.jsonl', *UNREACHABLE))
_dataset_number = itertools.count()


def jsonl(draw, folder: pathlib.Path) -> Case:
  """A row among good ones that has values of another type, lacks fields, names an odd file or is damaged."""
  (folder / 'a.png').write_bytes(_image('PNG', draw(st.integers(0, 2))))
  (folder / _OUTSIDE).write_bytes(_image('PNG', 3) + _SECRET)
  (folder / 'b.png').write_bytes(_image('PNG', 3))  # another image, which may be in another split
  good = [{'image': 'a.png', 'captions': [f'number {i}'], 'label': 'ab'[i % 2]} for i in range(_NUM_GOOD)]
  row = {'image': 'b.png', 'captions': ['one more'], 'label': 'a'}
  for _ in range(draw(st.integers(1, 2))):
    name = draw(st.sampled_from(_FIELDS) | ODD_STRINGS)
    row[name] = draw(_PATHS if name in MEDIA_TYPES else JSON | ODD_STRINGS.map(lambda s: [s]))
  line = json.dumps(row, ensure_ascii=draw(st.booleans())).encode(errors='surrogatepass')
  line = draw(st.just(line) | corrupted(line))
  lines = [json.dumps(r).encode() for r in good]
  lines.insert(draw(st.integers(0, _NUM_GOOD)), line)
  (folder / 'data.jsonl').write_bytes(b'\n'.join(lines))
  return _prepared(draw, folder, folder, _NUM_GOOD)


def text(draw, folder: pathlib.Path) -> Case:
  """A text file with an odd line, or damaged."""
  lines = [f'line {i}' for i in range(_NUM_GOOD)]
  lines.insert(draw(st.integers(0, _NUM_GOOD)), draw(ODD_STRINGS))
  content, damaged = '\n'.join(lines).encode(errors='surrogatepass'), draw(st.booleans())
  source = folder / draw(st.sampled_from(('train.txt', 'LINES.TXT', 'odd \udcff name.txt')))
  source.write_bytes(draw(corrupted(content)) if damaged else content)
  return _prepared(draw, folder, source, 0 if damaged else _NUM_GOOD)


def _prepared(draw, folder: pathlib.Path, source: pathlib.Path, num_good: int) -> Case:
  """Prepare a source with `num_good` good rows, and read it again."""
  name = f'odd{next(_dataset_number)}'  # a process caches what it knows of a dataset
  max_corrupt = draw(st.sampled_from((1.0, 0.1)))
  _load_libraries()

  def main() -> int | str:
    summary = prepare.prepare(source, folder / 'out', name, test_fraction=0.0, max_corrupt_fraction=max_corrupt)
    records = [record for split, size in summary['splits'].items()
               for record in file_dataset.load(f'own:{name}', folder / 'out', split).read(np.arange(size))]
    assert not any(record.get('image', b'').endswith(_SECRET) for record in records), 'packs a secret'
    assert len(records) >= num_good, f'{num_good} rows are good, {len(records)} were kept'
    return skipped(*summary['skipped']) if summary['skipped'] else 0
  return Case(main)


@functools.cache
def _load_libraries() -> None:
  """Let TFDS import its modules, so that no input takes that long."""
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, 'one.txt')
    source.write_text('line')
    prepare.prepare(source, pathlib.Path(folder), 'one')
    file_dataset.load('own:one', folder, 'train').read(np.array([0]))


def image(draw, folder: pathlib.Path) -> Case:
  """A damaged image of any format. If it is accepted, the decoder of training must read it."""
  import tensorflow as tf
  path = folder / 'image'
  path.write_bytes(draw(corrupted(_image(draw(st.sampled_from(_IMAGE_FORMATS)), draw(st.integers(0, 3))))
                        | st.builds(_huge_image, *[st.sampled_from((2**10, 2**13, 2**14))] * 2)))

  def main() -> int | str:
    try:
      media_file = media.check_image(media.read_bytes(path))
    except media.CorruptFile as e:
      return skipped(str(e))
    pixels = tf.io.decode_image(media_file.data, channels=3, expand_animations=False).numpy()
    assert pixels.shape == (*media_file.size[::-1], 3), f'an image {media_file.size} is decoded as {pixels.shape}'
    return 0
  return Case(main)


def video_file(draw, folder: pathlib.Path) -> Case:
  """A video of any format, damaged in its header or frames. If it is accepted, training must get frames of it."""
  extension = draw(st.sampled_from(_VIDEO_FORMATS))
  content = _video(extension)
  header = draw(st.sampled_from((len(content), min(200, len(content)))))
  path = folder / f'video.{extension}'
  path.write_bytes(draw(corrupted(content[:header])) + content[header:])

  def main() -> int | str:
    try:
      media_file = media.check_video(media.read_bytes(path))
    except media.CorruptFile as e:
      return skipped(str(e))
    return _sampled(media_file)
  return Case(main)


def _sampled(media_file: media.Media) -> int:
  """Sample frames of a video that was accepted, as training does. Return the exit code."""
  frames = video.sample_frames(
      media_file.data, lambda number, _: video.segment_frames(number, np.array([0.1, 0.5, 0.9])))
  assert (frames.shape, frames.dtype) == ((3, *media_file.size[:0:-1], 3), np.uint8), (
      f'a video of size {media_file.size} gives frames {frames.dtype}{frames.shape}')
  return exit_codes.FINISHED


@functools.cache
def _huge_image(width: int, height: int) -> bytes:
  """A PNG of a few kilobytes."""
  Image.new('1', (width, height)).save(out := io.BytesIO(), 'PNG')
  return out.getvalue()


@functools.cache
def _image(image_format: str, seed: int) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (_SIZE, _SIZE + 8, 3), dtype=np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).convert(('RGB', 'L', 'RGB', 'RGB')[seed]).save(out, image_format)
  return out.getvalue()


@functools.cache
def _video(extension: str) -> bytes:
  frames = np.random.default_rng(0).integers(0, 256, (_FRAMES, _SIZE, _SIZE, 3), dtype=np.uint8)
  return own_files.npy_bytes(frames) if extension == 'npy' else own_files.encode_video(frames, extension)


PROPERTIES: dict[str, bad_input.Property] = {'jsonl': jsonl, 'text': text, 'image': image, 'video': video_file}
