"""Small folders of real files as users have them, valid and invalid, made for a test."""

import io
import json
import pathlib

import numpy as np
from PIL import ExifTags, Image

SIDE = 24
COLORS = {'red': (200, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 200)}


def color_image(color: str, seed: int, size: tuple[int, int] = (SIDE, SIDE + 8)) -> Image.Image:
  """A noisy image of one color, [H, W] = size."""
  noise = np.random.default_rng(seed).integers(-25, 26, (*size, 3))
  return Image.fromarray(np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8))


def encode_image(image: Image.Image, file_format: str = 'JPEG', **options) -> bytes:
  image.save(out := io.BytesIO(), file_format, **options)
  return out.getvalue()


def write_image(path: pathlib.Path, *args, **kwargs) -> None:
  """Writes a `color_image`, in the format of the path's suffix."""
  path.parent.mkdir(parents=True, exist_ok=True)
  color_image(*args, **kwargs).save(path)


def write_jsonl(path: pathlib.Path, rows, mode: str = 'w') -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open(mode) as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def read_jsonl(path: pathlib.Path) -> list[dict]:
  return list(map(json.loads, path.read_text().splitlines()))


def write_captioned_images(root: pathlib.Path, count: int = 30) -> pathlib.Path:
  """Images with two captions each, whose color is a field, in a JSONL file."""
  rows = []
  for i in range(count):
    color, path = list(COLORS)[i % 3], f'images/{i:03}.{("jpg", "png")[i % 2]}'
    write_image(root / path, color, i)
    rows.append({'image': path, 'captions': [f'a {color} square number {i}', f'number {i} is {color}'], 'color': color,
                 'split': 'test' if i % 5 == 4 else 'train', 'group': f'roll {i}'})
  write_jsonl(root / 'data.jsonl', rows)
  return root


def append_odd_rows(root: pathlib.Path) -> dict[str, str]:
  """Appends odd rows to captioned images; returns {file: reason to skip its row, or '' if it is valid}."""
  red = color_image('red', 99)
  alpha = red.convert('RGBA')
  alpha.putalpha(0)
  rotated = Image.Exif()
  rotated[ExifTags.Base.Orientation] = 6
  deep = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 100)
  moving = dict(save_all=True, append_images=[color_image('blue', 97)])
  files = {
      'missing.jpg': (None, 'missing file'),
      'cut.jpg': (encode_image(color_image('red', 98, (200, 200)))[:3000], 'corrupt image'),
      'dot.png': (encode_image(red.resize((1, 1)), 'PNG'), 'smaller than 8 pixels'),
      'words.png': (b'no image at all', 'not an image'),
      'tags.png': (b'II*\0\x08\0\0\0' + bytes(6), 'not an image'),  # a TIFF file without its size
      'UPPER.JPG': (encode_image(red), ''),
      'alpha.png': (encode_image(alpha, 'PNG'), ''),
      'palette.png': (encode_image(red.convert('P'), 'PNG'), ''),
      'gray.png': (encode_image(red.convert('L'), 'PNG'), ''),
      'moving.gif': (encode_image(red, 'GIF', **moving), ''),
      'rotated.jpg': (encode_image(red, exif=rotated), ''),
      'print.jpg': (encode_image(red.convert('CMYK')), ''),
      'web.webp': (encode_image(red, 'WEBP'), ''),
      'camera.jpg': (encode_image(red, exif=b'Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0'), ''),  # truncated EXIF data
      'index.bmp': (encode_image(red.convert('P'), 'BMP'), ''),
      'bits.bmp': (encode_image(red.convert('1'), 'BMP'), ''),
      'bits.png': (encode_image(red.convert('1'), 'PNG'), ''),
      'deep.png': (encode_image(deep, 'PNG'), '')}
  for name, (data, _) in files.items():
    if data is not None:
      (root / 'images' / name).write_bytes(data)
  good = {'image': 'images/000.jpg', 'captions': ['once more'], 'split': 'train'}
  rows = [{'image': f'images/{name}', 'captions': [f'рыжий кот {name}'], 'split': 'train'} for name in files]
  rows += [{'image': None, 'captions': ['y']}, {**good, 'image': None, 'video': 'images/000.jpg'}]
  rows += [{**good, 'captions': None}]  # valid: an image without captions
  rows += [{**good, 'image': path} for path in ('images/\0.png', 'images', 'long' * 99)]
  rows += [{**good, 'text_a': 5}, {**good, 'label': {'r': 1}}, {**good, 'captions': ['', ' ']},
           {**good, 'captions': 'a text'}, good, good, ['a list'], {'split': 'train'}, {**good, 'split': 'nowhere'}]
  # Extra fields of a wrong type or name cost no row, but for the list of a color, which is a single one elsewhere.
  rows += [{**good, 'captions': [f'extra {i}'], name: value} for i, (name, value) in enumerate((
      ('color', {'r': 1}), ('color', ['red']), ('sentids', [0, 1, 2]), ('source_location', 'x'),
      ('what / where', 'not a column name'), ('text_length', [14]), ('sentids', [[]])))]
  write_jsonl(root / 'data.jsonl', rows, 'a')
  with (root / 'data.jsonl').open('ab') as file:
    file.write(b'{"image": \n' + b'[' * 100_000 + b'\n')
    file.write(json.dumps({**good, 'captions': ['café']}, ensure_ascii=False).encode('latin-1') + b'\n')
    file.write(json.dumps({**good, 'captions': ['x \ud83d']}).encode() + b'\n')
  (root / '._data.jsonl').write_bytes(b'\0\5\26\7')  # as macOS leaves them
  return {name: reason for name, (_, reason) in files.items()}


def write_text_pairs(root: pathlib.Path, num_test: int = 9) -> pathlib.Path:
  """Thirty-six pairs of texts about equal colors or not, `num_test` in the test split, as JSONL."""
  rows = [{'text_a': f'the bar is {a}', 'text_b': f'number {i} is {b}', 'label': int(a == b),
           'label_name': 'same' if a == b else 'other'} for i in range(4) for a in COLORS for b in COLORS]
  write_jsonl(root / 'train.jsonl', rows[num_test:])
  write_jsonl(root / 'test.jsonl', rows[:num_test])
  return root


def write_videos(root: pathlib.Path, suffix: str = 'mp4', count: int = 6) -> pathlib.Path:
  """Videos of 12 frames by class, in which a bright bar moves to the right or stands still."""
  for i in range(count):
    path = root / ('moves', 'stands')[i % 2] / f'{i}.{suffix}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_video(moving_bar(i % 2 == 0, 255 - i), suffix))  # no two are equal
  return root


def encode_video(
    frames: np.ndarray, suffix: str = 'mp4', rotation: int = 0, codec: str = 'mpeg4', **options: object) -> bytes:
  """uint8 [T, H, W, 3] as a video file. rotation: degrees to the left by which a player rotates it."""
  if suffix == 'gif':
    first, *others = map(Image.fromarray, frames)
    return encode_image(first, 'GIF', save_all=True, append_images=others)
  import av
  out = io.BytesIO()
  with av.open(out, 'w', format={'mkv': 'matroska'}.get(suffix, suffix)) as container:
    stream = container.add_stream(codec, rate=6, options={k: str(v) for k, v in options.items()})
    stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], 'yuv420p'
    stream.bit_rate = 2_000_000
    if rotation:
      stream.set_display_rotation(rotation)
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
    container.mux(stream.encode())
  return out.getvalue()


def npy_bytes(frames: np.ndarray) -> bytes:
  np.save(out := io.BytesIO(), frames)
  return out.getvalue()


def moving_bar(moves: bool, brightness: int = 255) -> np.ndarray:
  """uint8 [12, 32, 48, 3]: a bar at the left, or in frame t at column 4 t if it moves."""
  out = np.zeros((12, 32, 48, 3), np.uint8)
  for t, frame in enumerate(out):
    left = 4 * t if moves else 0
    frame[:, left:left + 4] = brightness
  return out
