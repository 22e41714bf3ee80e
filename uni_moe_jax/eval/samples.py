"""Some predictions to look at: samples.json for the report."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

FILE = 'samples.json'  # {evaluator: samples}
_SHOWN = 12  # per evaluator
_ENLARGED = 64  # pixels a side


def choose(
    pixels: Callable[[np.ndarray], np.ndarray], ids: np.ndarray, truth: Sequence[str | Sequence[str]],
    predicted: Sequence[str]) -> list[dict[str, Any]]:
  """Returns [{'image' or 'frames' (base64 PNG), 'reference', 'prediction'}], evenly spread over N examples.

  pixels: ids → uint8 [n, T, H, W] or [n, T, H, W, C]; an image is a video of one frame. truth: a reference or several
  of each example.
  """
  chosen = np.unique(np.linspace(0, len(ids) - 1, _SHOWN).astype(int))
  samples = []
  for i, video in zip(chosen, pixels(ids[chosen])):
    frames = [_png(f[..., 0] if f.ndim == 3 and f.shape[-1] == 1 else f) for f in video]
    shown = {'image': frames[0]} if len(frames) == 1 else {'frames': frames}
    reference = truth[i] if isinstance(truth[i], str) else list(truth[i])
    samples.append({**shown, 'reference': reference, 'prediction': str(predicted[i])})
  return samples


def _png(image: np.ndarray) -> str:
  """Base64 PNG of uint8 [H, W] or [H, W, 3]."""
  out = io.BytesIO()
  Image.fromarray(image).resize((_ENLARGED, _ENLARGED), Image.Resampling.NEAREST).save(out, 'PNG')
  return base64.b64encode(out.getvalue()).decode()
