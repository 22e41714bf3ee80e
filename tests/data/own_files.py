"""Small folders of real files as people have them, good and bad, made for a test."""

import io
import json
import pathlib

import numpy as np
from PIL import Image

SIDE = 24
COLORS = {'red': (200, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 200)}


def color_image(colour: str, seed: int, size: tuple[int, int] = (SIDE, SIDE + 8)) -> Image.Image:
  """A noisy picture of one colour, [H, W] = size."""
  noise = np.random.default_rng(seed).integers(-25, 26, (*size, 3))
  return Image.fromarray(np.clip(np.array(COLORS[colour]) + noise, 0, 255).astype(np.uint8))


def encode_image(image: Image.Image, form: str = 'JPEG', **options) -> bytes:
  out = io.BytesIO()
  image.save(out, form, **options)
  return out.getvalue()


def write_captioned_images(root: pathlib.Path, count: int = 30) -> pathlib.Path:
  """Pictures with two captions each, whose colour is a field, in a JSONL file."""
  (root / 'pictures').mkdir(parents=True)
  names, lines = list(COLORS), []
  for i in range(count):
    colour = names[i % 3]
    path = f'pictures/{i:03}.{("jpg", "png")[i % 2]}'
    (root / path).write_bytes(encode_image(color_image(colour, i), ('JPEG', 'PNG')[i % 2]))
    lines.append({'image': path, 'captions': [f'a {colour} square number {i}', f'number {i} is {colour}'], 'colour': colour,
                  'split': ('train', 'train', 'train', 'train', 'test')[i % 5], 'group': f'roll {i}'})
  (root / 'data.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return root


def append_odd_rows(root: pathlib.Path) -> dict[str, str]:
  """Appends one row of each odd sort to `write_captioned_images`; returns {file or line: reason, or '' where the row is fine}."""
  put = lambda name, data: (root / 'pictures' / name).write_bytes(data)
  red = color_image('red', 99)
  put('cut.jpg', encode_image(color_image('red', 98, (200, 200)))[:3000])
  put('UPPER.JPG', encode_image(red))
  put('dot.png', encode_image(red.resize((1, 1)), 'PNG'))
  alpha = red.convert('RGBA')
  alpha.putalpha(0)
  put('alpha.png', encode_image(alpha, 'PNG'))
  put('palette.png', encode_image(red.convert('P'), 'PNG'))
  put('grey.png', encode_image(red.convert('L'), 'PNG'))
  put('moving.gif', encode_image(red, 'GIF', save_all=True, append_images=[color_image('blue', 97)]))
  put('words.png', b'no picture at all')
  put('tags.png', b'II*\0\x08\0\0\0' + bytes(6))  # a TIFF file that does not say its size
  put('camera.jpg', encode_image(red, exif=b'Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0'))  # whose facts are cut off
  turned = Image.Exif()
  turned[0x0112] = 6
  put('turned.jpg', encode_image(red, exif=turned))
  put('print.jpg', encode_image(red.convert('CMYK')))
  put('web.webp', encode_image(red, 'WEBP'))
  put('index.bmp', encode_image(red.convert('P'), 'BMP'))
  put('bits.bmp', encode_image(red.convert('1'), 'BMP'))
  put('bits.png', encode_image(red.convert('1'), 'PNG'))
  put('deep.png', encode_image(Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 100), 'PNG'))
  rows = {
      'missing.jpg': 'missing file', 'cut.jpg': 'broken picture', 'dot.png': 'smaller than 8 pixels',
      'words.png': 'not a picture', 'tags.png': 'not a picture', 'UPPER.JPG': '', 'alpha.png': '', 'palette.png': '', 'grey.png': '',
      'moving.gif': '', 'turned.jpg': '', 'print.jpg': '', 'web.webp': '', 'camera.jpg': '', 'index.bmp': '', 'bits.bmp': '',
      'bits.png': '', 'deep.png': ''}
  lines = [{'image': f'pictures/{name}', 'captions': [f'рыжий кот {name}'], 'split': 'train'} for name in rows]
  good = {'image': 'pictures/000.jpg', 'captions': ['once more'], 'split': 'train'}
  lines += [{'image': None, 'captions': ['y']}, {**good, 'image': None, 'video': 'pictures/000.jpg'},
            {**good, 'captions': None}]  # the last is a picture of no captions, which is fine
  lines += [{**good, 'image': 'pictures/\0.png'}, {**good, 'image': 'pictures'}, {**good, 'image': 'long' * 99}]
  lines += [{**good, 'text_a': 5}, {**good, 'label': {'r': 1}}]
  lines += [{**good, 'captions': ['', ' ']}, {**good, 'captions': 'a text'}, good, good, ['a list'], {'split': 'train'},
            {**good, 'split': 'nowhere'}]
  # Fields that no one asked for cost no row.
  lines += [{**good, 'captions': [f'extra {i}'], name: value} for i, (name, value) in enumerate((
      ('colour', {'r': 1}), ('colour', ['red']), ('sentids', [0, 1, 2]), ('where', 'here'), ('what / where', 'a name of no column'),
      ('text_length', [14]), ('sentids', [[]])))]
  with (root / 'data.jsonl').open('a') as file:
    file.writelines(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
    file.write('{"image": \n' + '[' * 100_000 + '\n')
  with (root / 'data.jsonl').open('ab') as file:
    file.write(json.dumps({**good, 'captions': ['café']}, ensure_ascii=False).encode('latin-1') + b'\n')
    file.write(json.dumps({**good, 'captions': ['x \ud83d']}).encode() + b'\n')
  (root / '._data.jsonl').write_bytes(b'\0\5\26\7')  # as macOS leaves them
  return rows


def write_text_pairs(root: pathlib.Path, asked: int = 9) -> pathlib.Path:
  """Thirty-six pairs of texts that are about the same colour or not, by split in JSONL files; `asked` of them are the test's."""
  root.mkdir()
  rows = [{'text_a': f'the bar is {a}', 'text_b': f'number {i} is {b}', 'label': int(a == b), 'label_name': 'same' if a == b else
           'other'} for i in range(4) for a in COLORS for b in COLORS]
  for name, part in (('train', rows[asked:]), ('test', rows[:asked])):
    (root / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in part))
  return root


def write_videos(root: pathlib.Path, form: str = 'mp4', count: int = 6) -> pathlib.Path:
  """Clips of 12 frames by class, in which a bright bar moves to the right or stands."""
  for i in range(count):
    name = ('moves', 'stands')[i % 2]
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / f'{i}.{form}').write_bytes(encode_video(moving_bar(i % 2 == 0), form))
  return root


def encode_video(frames: np.ndarray, form: str = 'mp4', turned: int = 0) -> bytes:
  """uint8 [T, H, W, 3] as the bytes of a file. turned: degrees to the left by which it asks to be turned when it is shown."""
  if form == 'gif':
    first, *others = map(Image.fromarray, frames)
    return encode_image(first, 'GIF', save_all=True, append_images=others)
  import av
  out = io.BytesIO()
  with av.open(out, 'w', format={'mkv': 'matroska'}.get(form, form)) as container:
    stream = container.add_stream('mpeg4', rate=6)
    stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], 'yuv420p'
    stream.bit_rate = 2_000_000
    if turned:
      stream.set_display_rotation(turned)
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
    container.mux(stream.encode())
  return out.getvalue()


def npy_bytes(frames: np.ndarray) -> bytes:
  """The bytes of a file of one array."""
  out = io.BytesIO()
  np.save(out, frames)
  return out.getvalue()


def moving_bar(moves: bool, frames: int = 12) -> np.ndarray:
  """uint8 [frames, 32, 48, 3]: a bar that starts at the left; frame t has it at column 4 t."""
  out = np.zeros((frames, 32, 48, 3), np.uint8)
  for t in range(frames):
    left = 4 * t if moves else 0
    out[t, :, left:left + 4] = 255
  return out
